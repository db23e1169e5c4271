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
        ...

The shape and dtype of a Weight are derived from its children, never stored: `vmap`, `scan` and
`shard_map` change the children behind its back.
"""

import dataclasses
from typing import Any

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

  def materialize(self) -> jax.Array:
    """The array that this weight stands for."""
    raise NotImplementedError

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

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs: bool, **params):
    """`lax.dot_general` of this weight with an array, this weight on the side that is told."""
    raise NotFactored(f"{type(self).__name__} has no factored product")

  def gather(self, indices, **params):
    """`lax.gather` with this weight as the operand."""
    raise NotFactored(f"{type(self).__name__} has no factored gather")

  def transpose(self, permutation: tuple[int, ...]) -> "Weight":
    """`lax.transpose` as a Weight."""
    raise NotFactored(f"{type(self).__name__} has no factored transpose")

  def astype(self, dtype) -> "Weight":
    """The weight whose array has another dtype."""
    raise NotFactored(f"{type(self).__name__} has no factored cast")

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


# Each of these accepts an array or a Weight, so that a Weight can hold another as its base.


def dot_general(lhs, rhs, dimension_numbers, **params):
  if is_weight(lhs) and is_weight(rhs):
    raise NotFactored("both operands of the product are weights")
  if is_weight(lhs):
    return lhs.dot_general(rhs, dimension_numbers, weight_is_lhs=True, **params)
  if is_weight(rhs):
    return rhs.dot_general(lhs, dimension_numbers, weight_is_lhs=False, **params)
  return lax.dot_general(lhs, rhs, dimension_numbers, **params)


def gather(operand, indices, **params):
  if is_weight(operand):
    return operand.gather(indices, **params)
  return lax.gather(operand, indices, **params)


def transpose(operand, permutation):
  if is_weight(operand):
    return operand.transpose(permutation)
  return lax.transpose(operand, permutation)


def astype(operand, dtype):
  return operand.astype(dtype)
