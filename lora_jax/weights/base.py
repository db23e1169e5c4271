"""The class Weight, and the operations that accept an array or a Weight alike.

A Weight is a frozen pytree that represents an array: `W + s A B`, a quantized block, a truncated
factorization. It must define `materialize`, which returns that array. It may also define how the
array is contracted, gathered or transposed without being materialized. An operation that it does
not define raises `NotFactored`. The interpreter then materializes the weight or, in strict mode,
raises an error with the reason.

A new kind of weight is one file with one frozen dataclass, registered as a pytree:

    @register  # of lora_jax.weights, or jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Scaled(Weight):
      w: jax.Array
      c: jax.Array

      def materialize(self):
        return self.w * self.c

      def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
        operands = (self.w, other) if weight_is_lhs else (other, self.w)
        return self.c * dot_general(*operands, dimension_numbers, **params)

The shape and dtype of a Weight are derived from its children and never stored, since `vmap`, `scan`
and `shard_map` replace the children.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from lora_jax.weights import promotion
from lora_jax.weights.pytree import let_flax_serialize

PyTree = Any
Operand = Any
"""An array or a Weight."""


class NotFactored(Exception):
  """Raised by a Weight's method that would have to materialize the Weight; carries the reason.

  Attributes:
    weight: the Weight in question, where the operation has several.
  """

  def __init__(self, reason: str, weight: "Weight | None" = None):
    super().__init__(reason)
    self.weight = weight


class Weight:
  """A frozen pytree that represents an array.

  `path` names the leaf for error messages; `attach` sets it.
  """

  path: str

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
  """Every kind is a dataclass."""

  apart: ClassVar[tuple[str, ...]] = ()
  """The names of arrays that are not leaves; see `Adapted.seal`."""

  IS_DENSE: ClassVar[bool] = False
  """True if keeping it factored saves nothing; `adapt` then materializes it up front."""

  def __post_init__(self):
    let_flax_serialize(type(self))

  def materialize(self) -> jax.Array:
    """The array that this weight represents."""
    raise NotImplementedError

  def applied(self) -> Any:
    """The Weight or array whose operations this weight uses.

    A kind that can be computed from its parts as another kind returns that one here, and then
    needs no operations of its own.
    """
    return self

  def trainable(self) -> "Weight":
    """This weight with a bool in place of every array: True for those that train."""
    return jax.tree.map(lambda _: False, self)

  def with_path(self, path: str) -> Self:
    return dataclasses.replace(self, path=path)

  @property
  def aval(self) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array, without computing it."""
    return jax.eval_shape(materialize, self)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.aval.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.aval.dtype

  @property
  def explicit_sharding(self) -> NamedSharding | None:
    """The array's sharding over explicit mesh axes, from the parts; None without such axes."""
    return None

  @property
  def is_stacked(self) -> bool:
    """True if slicing every child along its leading axis slices the weight along its own."""
    return False

  def partition_specs(self, spec: jax.sharding.PartitionSpec) -> "Weight":
    """This weight with a PartitionSpec in place of every array, derived from the array's spec."""
    raise NotFactored(f"{type(self).__name__} does not say how its parts are sharded")

  def local_specs(self, spec: jax.sharding.PartitionSpec) -> "Weight":
    """`partition_specs` for `shard_map`, where each device uses only its own shards.

    Raises:
      NotFactored: if the shards of the parts do not determine the shard of the array.
    """
    return self.partition_specs(spec)

  def __jax_array__(self):
    raise TypeError(
      f"{self.path or type(self).__name__}: a Weight met a JAX function that does not know it. "
      "Wrap the function, `lora_jax.adapt(f)`, and pass the weights as its argument (a Weight "
      "that the function reaches by closure is not seen), or materialize the array with "
      "`lora_jax.materialize`."
    )


def is_weight(x: Any) -> bool:
  return isinstance(x, Weight)


def materialize(tree: PyTree) -> PyTree:
  """Returns the tree with every Weight replaced by the array that it represents."""
  return jax.tree.map(lambda x: x.materialize() if is_weight(x) else x, tree, is_leaf=is_weight)


# The functions below accept arrays and Weights alike, so that a Weight can be another's base.


def call(op: str, operand: Operand, *args: Any, **params: Any) -> Operand:
  """Calls `lax.<op>` on an array, or the method of that name on a Weight.

  Raises:
    NotFactored: if the kind of weight has no such method.
  """
  operand = applied(operand)
  if not is_weight(operand):
    return getattr(lax, op)(operand, *args, **params)
  method = getattr(operand, op, None)
  if method is None:
    raise NotFactored(f"{type(operand).__name__} has no factored form of {op}")
  return method(*args, **params)


def dot_general(
  lhs: Operand, rhs: Operand, dimension_numbers: lax.DotDimensionNumbers, **params: Any
) -> Operand:
  """`lax.dot_general`; a Weight's method is told which side the weight is on."""
  lhs, rhs = applied(lhs), applied(rhs)
  if is_weight(lhs) and is_weight(rhs):
    raise NotFactored("both operands of the product are weights")
  if is_weight(lhs):
    return call("dot_general", lhs, rhs, dimension_numbers, weight_is_lhs=True, **params)
  if is_weight(rhs):
    return call("dot_general", rhs, lhs, dimension_numbers, weight_is_lhs=False, **params)
  return lax.dot_general(lhs, rhs, dimension_numbers, **params)


def conv_general_dilated(x: Operand, kernel: Operand, **params: Any) -> Operand:
  """`lax.conv_general_dilated`; a Weight's method takes the input first."""
  x, kernel = applied(x), applied(kernel)
  if is_weight(x):
    raise NotFactored("the weight is the convolution's input, not its kernel")
  if is_weight(kernel):
    return call("conv_general_dilated", kernel, x, **params)
  return lax.conv_general_dilated(x, kernel, **params)


def ragged_dot_general(lhs: Operand, rhs: Operand, group_sizes: Operand, **params: Any) -> Operand:
  """`lax.ragged_dot_general`; a Weight's method takes the rows first."""
  lhs, rhs = applied(lhs), applied(rhs)
  if is_weight(lhs) or is_weight(group_sizes):
    raise NotFactored("the weight is not the stack of matrices")
  if is_weight(rhs):
    return call("ragged_dot_general", rhs, lhs, group_sizes, **params)
  return lax.ragged_dot_general(lhs, rhs, group_sizes, **params)


def astype(operand: Operand, dtype: DTypeLike) -> Operand:
  return applied(operand).astype(dtype)


def scaled(operand: Operand, c: jax.Array | float) -> Operand:
  """The operand times a scalar."""
  operand = applied(operand)
  return operand.scaled(c) if is_weight(operand) else promotion.multiplied(operand, c)


def resharded(operand: Operand, sharding: NamedSharding) -> Operand:
  """`jax.sharding.reshard`; the parts of a Weight are sharded along with its array.

  Raises:
    NotFactored: if the parts cannot be sharded like the array.
  """
  if not is_weight(operand):
    return jax.sharding.reshard(operand, sharding)

  def moved(part, spec):
    target = NamedSharding(sharding.mesh, spec)
    try:
      target.shard_shape(part.shape)
    except ValueError as error:
      raise NotFactored(f"its parts cannot be sharded over {spec}") from error
    return jax.sharding.reshard(part, target)

  return jax.tree.map(moved, operand, operand.partition_specs(sharding.spec))


def aligned(weight: Weight) -> Weight:
  """The Weight with its parts sharded like its array, on a mesh with explicit axes."""
  sharding = weight.explicit_sharding
  return weight if sharding is None else resharded(weight, sharding)


def check_zero(value: Any) -> None:
  """Raises `NotFactored` if a padding value is not known to be zero."""
  if isinstance(value, jax.core.Tracer) or value != 0:
    raise NotFactored("it is padded with values that may not be zero")


def is_stacked(operand: Operand) -> bool:
  """True if slicing every array of the operand along its leading axis slices the operand."""
  return operand.is_stacked if is_weight(operand) else operand.ndim > 0


def alike(operands: Iterable[Operand]) -> bool:
  """True if all are Weights of one kind and structure, of any sizes."""
  return len(set(map(jax.tree.structure, operands))) == 1


def joined(f: Callable[..., Any], operands: Sequence[Weight]) -> Weight:
  """`f(*leaves)` over the leaves of Weights that are `alike`; keeps the path of the first."""
  leaves = zip(*map(jax.tree.leaves, operands), strict=True)
  return jax.tree.unflatten(jax.tree.structure(operands[0]), [f(*each) for each in leaves])


def applied(operand: Operand) -> Operand:
  """The operand, or the Weight that `Weight.applied` replaces it by."""
  while is_weight(operand):
    simpler = operand.applied()
    if simpler is operand:
      break
    operand = simpler
  return operand
