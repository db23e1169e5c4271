"""What a Weight is, and the operations that accept an array or a Weight alike.

A Weight is a frozen pytree that stands for an array: `W + s A B`, a quantised block, a truncated
factorisation. It must say what array it stands for (`materialize`); it may also say how that
array is contracted, gathered or transposed without ever being formed. An operation that it does
not define raises `NotFactored`, and the interpreter then materialises the weight, or, in strict
mode, tells the user why it would have to.

A new kind of weight is one file with one frozen dataclass, registered as a pytree:

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Scaled(Weight):
      w: jax.Array
      c: jax.Array

      def materialize(self):
        return self.w * self.c

      def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
        operands = (self.w, other) if weight_is_lhs else (other, self.w)
        return self.c * dot_general(*operands, dimension_numbers, **params)

The shape and dtype of a Weight are derived from its children, never stored: `vmap`, `scan` and
`shard_map` change the children behind its back.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


class NotFactored(Exception):
  """Raised by a Weight's method that cannot work without forming the full array; says why."""


class Weight:
  """A frozen pytree that stands for an array.

  `path` names the leaf for error messages; `attach` sets it.
  """

  path: str

  IS_DENSE: ClassVar[bool] = False
  """Whether nothing is spared by keeping it apart: `adapt` then forms the array at once."""

  def materialize(self) -> jax.Array:
    """The array that this weight stands for."""
    raise NotImplementedError

  def applied(self) -> Any:
    """The Weight or array by whose operations this weight is applied.

    A kind that comes down to another one, computed from its parts, says so here and needs no
    operation of its own.
    """
    return self

  def trainable(self) -> "Weight":
    """This weight with a bool in the place of every array: True where it trains."""
    return jax.tree.map(lambda _: False, self)

  def with_path(self, path: str) -> "Weight":
    return dataclasses.replace(self, path=path)

  @property
  def aval(self) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array, by tracing alone."""
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
  def is_stacked(self) -> bool:
    """Whether slicing every child along its leading axis slices the weight along its own."""
    return False

  def partition_specs(self, spec: jax.sharding.PartitionSpec) -> "Weight":
    """This weight with a PartitionSpec in the place of every array, derived from its own."""
    raise NotFactored(f"{type(self).__name__} does not say how its parts are sharded")

  def local_specs(self, spec: jax.sharding.PartitionSpec) -> "Weight":
    """`partition_specs` for `shard_map`, where each device computes with its own pieces alone.

    Raises:
      NotFactored: when the pieces of the parts do not make a piece of the array.
    """
    return self.partition_specs(spec)

  def __jax_array__(self):
    raise TypeError(
      f"{self.path or type(self).__name__}: a Weight met a JAX function that does not know it. "
      "Wrap the function, `lora_jax.adapt(f)`, and pass the weights as its argument (a Weight "
      "that the function reaches by closure is not seen), or form the array with "
      "`lora_jax.materialize`."
    )


def is_weight(x: Any) -> bool:
  return isinstance(x, Weight)


def materialize(tree: PyTree) -> PyTree:
  """The same tree with every Weight exchanged for the array that it stands for."""
  return jax.tree.map(lambda x: x.materialize() if is_weight(x) else x, tree, is_leaf=is_weight)


# What follows accepts arrays and Weights alike, so that a Weight can hold another as its base.


def call(op: str, operand, *args, **params):
  """`lax.<op>` of an array, or the method of that name of a Weight.

  Raises:
    NotFactored: when the kind of weight has no such method.
  """
  operand = _applied(operand)
  if not is_weight(operand):
    return getattr(lax, op)(operand, *args, **params)
  if not hasattr(operand, op):
    raise NotFactored(f"{type(operand).__name__} has no factored form of {op}")
  return getattr(operand, op)(*args, **params)


def dot_general(lhs, rhs, dimension_numbers, **params):
  """`lax.dot_general`; a Weight's method is told on which side it stands."""
  lhs, rhs = _applied(lhs), _applied(rhs)
  if is_weight(lhs) and is_weight(rhs):
    raise NotFactored("both operands of the product are weights")
  if is_weight(lhs):
    return call("dot_general", lhs, rhs, dimension_numbers, weight_is_lhs=True, **params)
  if is_weight(rhs):
    return call("dot_general", rhs, lhs, dimension_numbers, weight_is_lhs=False, **params)
  return lax.dot_general(lhs, rhs, dimension_numbers, **params)


def conv_general_dilated(x, kernel, **params):
  """`lax.conv_general_dilated`; a Weight's method takes the input first."""
  x, kernel = _applied(x), _applied(kernel)
  if is_weight(x):
    raise NotFactored("the weight is what is convolved, not the kernel")
  if is_weight(kernel):
    return call("conv_general_dilated", kernel, x, **params)
  return lax.conv_general_dilated(x, kernel, **params)


def ragged_dot_general(lhs, rhs, group_sizes, **params):
  """`lax.ragged_dot_general`; a Weight's method takes the rows first."""
  lhs, rhs = _applied(lhs), _applied(rhs)
  if is_weight(lhs) or is_weight(group_sizes):
    raise NotFactored("the weight is not the stack of matrices")
  if is_weight(rhs):
    return call("ragged_dot_general", rhs, lhs, group_sizes, **params)
  return lax.ragged_dot_general(lhs, rhs, group_sizes, **params)


def astype(operand, dtype):
  return _applied(operand).astype(dtype)


def scaled(operand, c):
  """The operand times a number."""
  operand = _applied(operand)
  return operand.scaled(c) if is_weight(operand) else operand * c


def _applied(operand):
  """The operand, or what it comes down to."""
  while is_weight(operand):
    applied = operand.applied()
    if applied is operand:
      break
    operand = applied
  return operand
