"""Concatenated: arrays and Weights that a model concatenates along an axis at run time.

    [q | k | v]      Concatenated((q, k, v), axis=-1)

Each operation is applied to every part and the results are concatenated or summed, so every part
keeps its own factored form. It exists only while `adapt` evaluates a function.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base
from lora_jax.weights.base import NotFactored, is_weight
from lora_jax.weights.combined import Combined, summed
from lora_jax.weights.factor_axes import labels
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register
from lora_jax.weights.scaled import scaled_along


@register
@dataclasses.dataclass(frozen=True)
class Concatenated(Combined):
  """Arrays and Weights concatenated along an axis.

  Attributes:
    parts: two or more, with equal sizes in all other axes.
    axis: the axis, counted from the end as -1, so that it stays valid when a scan slices the parts.
  """

  axis: int = dataclasses.field(kw_only=True, metadata={"static": True})

  def materialize(self):
    return lax.concatenate([base.materialize(part) for part in self.parts], self._axis)

  @property
  def shape(self):
    sizes = list(self.parts[0].shape)
    sizes[self._axis] = sum(self._sizes)
    return tuple(sizes)

  @property
  def is_stacked(self):
    return self._axis > 0 and all(base.is_stacked(part) for part in self.parts)

  def partition_specs(self, spec):
    # Along the concatenated axis, the shards of a part are not the shards of the whole.
    names = [*spec, *[None] * (self.ndim - len(spec))]
    names[self._axis] = None
    return super().partition_specs(jax.P(*names))

  def local_specs(self, spec):
    if self._axis < len(spec) and spec[self._axis] is not None:
      raise NotFactored("it is sharded along the axis of the concatenation")
    return super().local_specs(spec)

  # ---- contractions

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    other_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    label = labels(self.ndim)[self._axis]

    def product(pair, **params):
      part, x = pair
      operands = (part, x) if weight_is_lhs else (x, part)
      return base.dot_general(*operands, dimension_numbers, **params)

    others = [other] * len(self.parts)
    if label in other_labels:
      others = self._cut(other, other_labels.index(label))
    pairs = list(zip(self.parts, others, strict=True))
    if label in out_labels:
      return lax.concatenate([product(pair, **params) for pair in pairs], out_labels.index(label))
    return summed(product, pairs, self.dtype, other.dtype, params)

  def conv_general_dilated(
    self, x, *, dimension_numbers, feature_group_count, batch_group_count, **params
  ):
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    if feature_group_count != 1 or batch_group_count != 1:
      raise NotFactored("the convolution has groups")
    params |= {
      "dimension_numbers": dimension_numbers,
      "feature_group_count": 1,
      "batch_group_count": 1,
    }

    def product(pair, **params):
      return base.conv_general_dilated(pair[1], pair[0], **params)

    if self._axis == rhs_spec[0]:
      found = [product((part, x), **params) for part in self.parts]
      return lax.concatenate(found, out_spec[1])
    if self._axis == rhs_spec[1]:
      pairs = list(zip(self.parts, self._cut(x, lhs_spec[1]), strict=True))
      return summed(product, pairs, self.dtype, x.dtype, params)
    raise NotFactored("its windows are concatenated")

  def gather(self, indices, *, dimension_numbers, slice_sizes, **params):
    (axis,) = dimension_numbers.collapsed_slice_dims
    if axis == self._axis:
      raise NotFactored("the rows of several concatenated weights are looked up")
    place = dimension_numbers.offset_dims[self._axis - (self._axis > axis)]
    rows = []
    for part in self.parts:
      sizes = list(slice_sizes)
      sizes[self._axis] = part.shape[self._axis]
      rows.append(
        base.call(
          "gather",
          part,
          indices,
          dimension_numbers=dimension_numbers,
          slice_sizes=tuple(sizes),
          **params,
        )
      )
    return concatenated(rows, place)

  # ---- operations that stay concatenated

  def times(self, x, axes):
    if self._axis not in axes:
      return self._each(lambda part: scaled_along(part, x, axes))
    pieces = self._cut(x, axes.index(self._axis))
    parts = [scaled_along(part, x, axes) for part, x in zip(self.parts, pieces, strict=True)]
    return dataclasses.replace(self, parts=tuple(parts))

  def transpose(self, permutation):
    axis = list(permutation).index(self._axis) - self.ndim
    return self._each(lambda part: base.call("transpose", part, permutation), axis=axis)

  def squeeze(self, dimensions):
    if self._axis in dimensions:
      raise NotFactored("the concatenated axis is squeezed")
    axis = self.axis + sum(n > self._axis for n in dimensions)
    return self._each(lambda part: base.call("squeeze", part, dimensions), axis=axis)

  def broadcast_in_dim(self, shape, broadcast_dimensions):
    place = broadcast_dimensions[self._axis]

    def broadcast(part):
      sizes = list(shape)
      sizes[place] = part.shape[self._axis]
      return base.call("broadcast_in_dim", part, tuple(sizes), broadcast_dimensions)

    return self._each(broadcast, axis=place - len(shape))

  def reshape(self, new_sizes):
    """Splits and joins axes on either side of the concatenated one."""
    place = _kept_axis(self.shape, new_sizes, self._axis)

    def reshaped(part):
      sizes = list(new_sizes)
      sizes[place] = part.shape[self._axis]
      return base.call("reshape", part, tuple(sizes))

    return self._each(reshaped, axis=place - len(new_sizes))

  def slice(self, start_indices, limit_indices, strides):
    strides = strides or (1,) * self.ndim
    axis = self._axis
    start, limit, stride = start_indices[axis], limit_indices[axis], strides[axis]
    if stride != 1:
      raise NotFactored("a slice with a stride runs along the concatenated axis")

    parts, offset = [], 0
    for part in self.parts:
      size = part.shape[axis]
      first, last = max(start - offset, 0), min(limit - offset, size)
      offset += size
      if first < last:
        starts, limits = list(start_indices), list(limit_indices)
        starts[axis], limits[axis] = first, last
        parts.append(base.call("slice", part, tuple(starts), tuple(limits), tuple(strides)))
    if len(parts) == 1:
      return parts[0]
    if not parts:
      raise NotFactored("the slice is empty")
    return dataclasses.replace(self, parts=tuple(parts))

  def dynamic_slice(self, start_indices, slice_sizes):
    if slice_sizes[self._axis] != self.shape[self._axis]:
      raise NotFactored("a slice at a traced index may span several parts")
    zero = jnp.zeros_like(jnp.asarray(start_indices[0]))
    starts = [zero if n == self._axis else start for n, start in enumerate(start_indices)]

    def sliced(part):
      sizes = list(slice_sizes)
      sizes[self._axis] = part.shape[self._axis]
      return base.call("dynamic_slice", part, starts, tuple(sizes))

    return self._each(sliced)

  def rev(self, dimensions):
    parts = self.parts[::-1] if self._axis in dimensions else self.parts
    return dataclasses.replace(
      self, parts=tuple(base.call("rev", part, dimensions) for part in parts)
    )

  def pad(self, value, config):
    low, high, interior = config[self._axis]
    if interior:
      raise NotFactored("interior padding runs along the concatenated axis")
    last = len(self.parts) - 1

    def padded(n, part):
      ends = (low if n == 0 else 0, high if n == last else 0, 0)
      each = [ends if axis == self._axis else c for axis, c in enumerate(config)]
      return base.call("pad", part, value, tuple(each))

    return dataclasses.replace(self, parts=tuple(padded(*pair) for pair in enumerate(self.parts)))

  # ---- the places of the parts

  @property
  def _axis(self) -> int:
    return self.ndim + self.axis

  @property
  def _sizes(self) -> list[int]:
    return [part.shape[self._axis] for part in self.parts]

  def _cut(self, x: jax.Array, axis: int) -> Sequence[jax.Array]:
    """Splits an array into the pieces that meet each part."""
    return lax.split(x, self._sizes, axis)


def concatenated(operands: Sequence[base.Operand], axis: int) -> base.Operand:
  """Concatenates arrays and Weights; along a stack axis, Weights of one kind stay one Weight."""
  if not any(map(is_weight, operands)):
    return lax.concatenate(operands, axis)
  if axis == 0 and all(is_weight(x) and x.is_stacked for x in operands) and base.alike(operands):
    return base.joined(lambda *leaves: lax.concatenate(leaves, 0), operands)
  path = next(x.path for x in operands if is_weight(x))
  return Concatenated(tuple(operands), axis=axis - operands[0].ndim, path=path)


def _kept_axis(before: Sequence[int], after: Sequence[int], axis: int) -> int:
  """Where a reshape puts an axis that it keeps whole.

  Raises:
    NotFactored: if it splits the axis or joins it with another.
  """
  size = math.prod(before[:axis])
  place, product = 0, 1
  while place < len(after) and (product < size or after[place] == 1 != before[axis]):
    product *= after[place]
    place += 1
  if product != size or place == len(after) or after[place] != before[axis]:
    raise NotFactored(f"the reshape to {tuple(after)} splits or joins the concatenated axis")
  return place
