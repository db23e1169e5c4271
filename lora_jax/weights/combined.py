"""Weights made of several arrays or Weights, and the sum: `w + y` is `Sum((w, y))`.

Each operation is applied to every part and the results are summed, so every part keeps its own
factored form. Such Weights exist only while `adapt` evaluates a function.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.base import Weight, is_weight
from lora_jax.weights.moved import Moved
from lora_jax.weights.pytree import register
from lora_jax.weights.scaled import scaled_along


@dataclasses.dataclass(frozen=True)
class Combined(Weight):
  """A Weight made of parts."""

  parts: tuple[Any, ...]
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  @property
  def ndim(self):
    return self.parts[0].ndim

  @property
  def dtype(self):
    return self.parts[0].dtype

  @property
  def explicit_sharding(self):
    return explicit.sharding_of(self.parts[0])

  def partition_specs(self, spec):
    return self._each(lambda part: part.partition_specs(spec) if is_weight(part) else spec)

  def local_specs(self, spec):
    return self._each(lambda part: part.local_specs(spec) if is_weight(part) else spec)

  def astype(self, dtype):
    return self._each(lambda part: base.astype(part, dtype))

  def scaled(self, c):
    return self._each(lambda part: base.scaled(part, c))

  def _each(self, change: Callable[[Any], Any], **fields) -> Self:
    return dataclasses.replace(self, parts=tuple(map(change, self.parts)), **fields)


@register
@dataclasses.dataclass(frozen=True)
class Sum(Combined, Moved):
  """The sum of arrays and Weights of one shape and dtype."""

  def materialize(self):
    return functools.reduce(jnp.add, map(base.materialize, self.parts))

  @property
  def shape(self):
    return tuple(self.parts[0].shape)

  @property
  def is_stacked(self):
    return all(base.is_stacked(part) for part in self.parts)

  # ---- contractions

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    def product(part, **params):
      operands = (part, other) if weight_is_lhs else (other, part)
      return base.dot_general(*operands, dimension_numbers, **params)

    return summed(product, self.parts, self.dtype, other.dtype, params)

  def conv_general_dilated(self, x, **params):
    def product(kernel, **params):
      return base.conv_general_dilated(x, kernel, **params)

    return summed(product, self.parts, self.dtype, x.dtype, params)

  def ragged_dot_general(self, lhs, group_sizes, **params):
    def product(part, **params):
      return base.ragged_dot_general(lhs, part, group_sizes, **params)

    return summed(product, self.parts, self.dtype, lhs.dtype, params)

  def gather(self, indices, *, fill_value=None, **params):
    # A row out of bounds takes its fill value from the first term alone.
    fills = [fill_value, *[0] * (len(self.parts) - 1)]
    rows = [
      base.call("gather", part, indices, fill_value=fill, **params)
      for part, fill in zip(self.parts, fills, strict=True)
    ]
    return added(*rows)

  # ---- operations that stay a sum

  def times(self, x, axes):
    return self._each(lambda part: scaled_along(part, x, axes))

  def pad(self, value, config):
    first, *rest = self.parts
    zero = jnp.zeros_like(value)
    padded = [base.call("pad", first, value, config)]
    padded += [base.call("pad", part, zero, config) for part in rest]
    return dataclasses.replace(self, parts=tuple(padded))

  def _moved(self, op: str, *args, **placed) -> Self:
    return self._each(lambda part: base.call(op, part, *args, **placed))


def added(*operands: base.Operand) -> base.Operand:
  """The sum of arrays and Weights of one shape and dtype."""
  return functools.reduce(_plus, operands)


def subtracted(operand: base.Operand, x: jax.Array) -> base.Operand:
  """The difference between an array or Weight and an array."""
  if not is_weight(operand):
    return operand - x
  return operand.minus(x) if hasattr(operand, "minus") else added(operand, -x)


def _plus(x, y):
  if is_weight(y) and not is_weight(x):
    x, y = y, x
  if not is_weight(x):
    return x + y
  if not is_weight(y) and hasattr(x, "plus"):
    return x.plus(y)
  return Sum((x, y), path=x.path)


def summed(
  product: Callable,
  parts: Sequence[Any],
  dtype: DTypeLike,
  other_dtype: DTypeLike,
  params: dict[str, Any],
) -> jax.Array:
  """Sums products in at least float32; the dtype is the one that a single product would have."""
  wanted = params.get("preferred_element_type")
  if wanted is None:
    wanted = dtype if dtype == other_dtype else promotion.joint(dtype, other_dtype)
  precise = promotion.at_least_float32(wanted)
  params = params | {"preferred_element_type": precise}
  terms = [product(part, **params).astype(precise) for part in parts]
  return functools.reduce(jnp.add, terms).astype(wanted)
