"""ScaledOutputs: `c * w`, with one multiplier per output, without materializing the product.

The multiplier is applied to the result of a product or, if the outputs are summed, to the other
operand. The base may be any array or Weight.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.base import NotFactored, check_zero
from lora_jax.weights.factor_axes import Labels, labels, part_labels
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register
from lora_jax.weights.structured import Structured


@register
@dataclasses.dataclass(frozen=True)
class ScaledOutputs(Structured):
  """`c * w`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight.
    c: [*stack, *outputs], of any float dtype; products are multiplied in at least float32.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"c": "so"}
  TRAINED: ClassVar = ()
  NEUTRAL: ClassVar = 1

  c: jax.Array

  def delta(self):
    w = base.materialize(self.w).astype(promotion.at_least_float32(self.dtype))
    return self._times(w, labels(self.ndim), self.c - 1, self._labels)

  # ---- contractions

  def dot_general(
    self, other, dimension_numbers, *, weight_is_lhs, preferred_element_type=None, **params
  ):
    other_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    asked, dtype = promotion.of_base(preferred_element_type, other.dtype, self.dtype)

    def product(x):
      operands = (self.w, x) if weight_is_lhs else (x, self.w)
      return base.dot_general(*operands, dimension_numbers, preferred_element_type=asked, **params)

    if set(self._labels) <= set(out_labels):
      y = product(other)
      return self._times(y, out_labels, self.c, self._labels).astype(dtype or y.dtype)
    if set(self._labels) <= set(other_labels):
      x = other.astype(promotion.joint(other.dtype, self.dtype))  # it may be of integers
      y = product(self._times(x, other_labels, self.c, self._labels))
      return y.astype(dtype or y.dtype)
    return self._summed_over_stacks(
      other,
      dimension_numbers,
      weight_is_lhs=weight_is_lhs,
      preferred_element_type=preferred_element_type,
      **params,
    )

  def _summed_over_stacks(
    self, other, dimension_numbers, *, weight_is_lhs, out_sharding=None, **params
  ):
    """Computes a product that keeps the stacks, scales it and sums over the stacks."""
    pairs, batch = (list(zip(*axes, strict=True)) for axes in dimension_numbers)
    role = {pair: self.all_roles[pair[0 if weight_is_lhs else 1]] for pair in pairs}
    if "o" in role.values():
      raise NotFactored("some of its outputs are summed and others are not")
    stacks = [pair for pair in pairs if role[pair] == "s"]
    inputs = [pair for pair in pairs if role[pair] == "i"]
    numbers = tuple(
      tuple(tuple(pair[side] for pair in kept) for side in (0, 1))
      for kept in (inputs, batch + stacks)
    )

    def summed(self, other):
      y = self.dot_general(other, numbers, weight_is_lhs=weight_is_lhs, **params)
      return jnp.sum(y, range(len(batch), len(batch + stacks)))

    def use(w):
      operands = (w, other) if weight_is_lhs else (other, w)
      return lax.dot_general(*operands, dimension_numbers, out_sharding=out_sharding)

    return explicit.laid_out(summed, explicit.of_result(use, self, other))(self, other)

  def conv_general_dilated(
    self, x, *, dimension_numbers, feature_group_count, preferred_element_type, **params
  ):
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    asked, dtype = promotion.of_base(preferred_element_type, x.dtype, self.dtype)
    params |= {
      "dimension_numbers": dimension_numbers,
      "feature_group_count": feature_group_count,
      "preferred_element_type": asked,
    }
    names = string.ascii_uppercase[: x.ndim]
    of_convolution = "".join(self.all_roles[n] for n in rhs_spec)
    windows = "i" * len(rhs_spec[2:])
    if of_convolution == "io" + windows and feature_group_count == 1:
      x = x.astype(promotion.joint(x.dtype, self.dtype))
      x = self._times(x, names, self.c, names[lhs_spec[1]])
      y = base.conv_general_dilated(x, self.w, **params)
      return y.astype(dtype or y.dtype)
    if of_convolution != "oi" + windows:
      raise NotFactored(f"the roles {self.all_roles!r} are not those of the convolution's axes")
    y = base.conv_general_dilated(x, self.w, **params)
    return self._times(y, names, self.c, names[out_spec[1]]).astype(dtype or y.dtype)

  def ragged_dot_general(
    self, lhs, group_sizes, *, ragged_dot_dimension_numbers, preferred_element_type, **params
  ):
    d = ragged_dot_dimension_numbers
    if self.all_roles != "sio" or tuple(d.rhs_group_dimensions) != (0,):
      raise NotFactored("only rows are multiplied by group, by a stack of (in, out) matrices")
    asked, dtype = promotion.of_base(preferred_element_type, lhs.dtype, self.dtype)
    y = base.ragged_dot_general(
      lhs,
      self.w,
      group_sizes,
      ragged_dot_dimension_numbers=d,
      preferred_element_type=asked,
      **params,
    )

    def by_group(y, c, group_sizes):
      rows = jnp.repeat(c, group_sizes, axis=0, total_repeat_length=y.shape[0])
      return times(y, "no", rows, "no")

    y = explicit.laid_out(by_group, explicit.sharding_of(y))(y, self.c, group_sizes)
    return y.astype(dtype or y.dtype)

  def gather(self, indices, *, dimension_numbers, mode, **params):
    """Looks up whole rows along one axis, as for an embedding."""
    d = dimension_numbers
    if len(d.collapsed_slice_dims) != 1 or d.start_index_map != d.collapsed_slice_dims:
      raise NotFactored("only whole rows along one axis are gathered in factored form")
    (axis,) = d.collapsed_slice_dims
    if self.all_roles[axis] == "s" and not d.operand_batching_dims:
      return self.stacks_picked(indices, dimension_numbers=d, mode=mode, **params)
    if "s" in self.all_roles or d.operand_batching_dims:
      raise NotFactored("rows of each layer of a stack are gathered")
    rows = base.call("gather", self.w, indices, dimension_numbers=d, mode=mode, **params)
    names = labels(self.ndim)
    rest, batches = iter(names.replace(names[axis], "")), iter(string.ascii_uppercase)
    out_labels = "".join(next(rest if n in d.offset_dims else batches) for n in range(rows.ndim))
    batch_labels = "".join(x for x in out_labels if x.isupper())
    by_row, size = self.all_roles[axis] == "o", self.shape[axis]

    def scaled(rows, c, indices):
      ids, c_labels = indices[..., 0].astype(jnp.int32), self._labels
      if by_row:
        c = jnp.take(c, ids, axis=c_labels.index(names[axis]), mode="clip")
        c_labels = c_labels.replace(names[axis], batch_labels)
      scaled = times(rows, out_labels, c, c_labels)
      if lax.GatherScatterMode.from_any(mode) != lax.GatherScatterMode.FILL_OR_DROP:
        return scaled
      # A row out of bounds is the gather's fill value, which is not scaled.
      found = (ids >= 0) & (ids < size)
      return jnp.where(spread(found, batch_labels, out_labels), scaled, rows)

    return explicit.laid_out(scaled, explicit.sharding_of(rows))(rows, self.c, indices)

  # ---- operations that stay a weight; see `Structured` for the others

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c))

  def pad(self, value, config):
    check_zero(value)
    return super().pad(value, config)

  def times(self, x, axes):
    return dataclasses.replace(self, w=scaled_along(self.w, x, axes))

  def _times(self, y, y_labels: Labels, c, c_labels: Labels):
    """`times`, with the sharding of y over explicit mesh axes."""

    def product(y, c):
      return times(y, y_labels, c, c_labels)

    return explicit.laid_out(product, explicit.sharding_of(y))(y, c)

  @property
  def _labels(self) -> Labels:
    """The labels of c, given `labels(self.ndim)` of w."""
    return part_labels(labels(self.ndim), self.all_roles, "so")


def scaled_along(operand: Any, x: jax.Array, axes: Sequence[int]) -> Any:
  """An array or Weight times an array that has some of its axes.

  Args:
    operand: the array or Weight to multiply.
    x: the multiplier, [the sizes of these axes].
    axes: the axes of the operand that x has, ascending.
  """
  if not base.is_weight(operand):
    wide = jnp.expand_dims(x, [n for n in range(operand.ndim) if n not in axes])
    return promotion.multiplied(operand, wide).astype(operand.dtype)
  if hasattr(operand, "times"):
    return operand.times(x, axes)
  # Any other kind is scaled at its use. An "output" here is an axis that x has.
  stacks = 1 if operand.is_stacked else 0
  if stacks and 0 not in axes:
    x = lax.broadcast_in_dim(x, (operand.shape[0], *x.shape), range(1, x.ndim + 1))
  roles = "".join("o" if n in axes else "i" for n in range(operand.ndim))
  return ScaledOutputs(operand, x, roles=roles[stacks:], path=operand.path)


def times(y: jax.Array, y_labels: Labels, c: jax.Array, c_labels: Labels) -> jax.Array:
  """`y * c` along the axes that c has, in y's dtype; multiplied in at least float32."""
  return promotion.multiplied(y, spread(c, c_labels, y_labels)).astype(y.dtype)


def spread(x: jax.Array, x_labels: Labels, wanted: Labels) -> jax.Array:
  """The array with its axes in the places of `wanted`, and axes of size one elsewhere."""
  order = [x_labels.index(c) for c in wanted if c in x_labels]
  missing = [n for n, c in enumerate(wanted) if c not in x_labels]
  return jnp.expand_dims(lax.transpose(x, order), missing)
