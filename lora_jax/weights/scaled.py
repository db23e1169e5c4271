"""ScaledOutputs: `c * w`, a number for every output, without forming it.

The result of a product is multiplied, or its other operand where it is the outputs that are summed.
The base may be any array or Weight.
"""

import dataclasses
import string
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factors import Labels, labels, part_labels
from lora_jax.weights.products import dot_labels
from lora_jax.weights.structured import Structured


@jax.tree_util.register_dataclass
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

  c: jax.Array

  def delta(self):
    w = base.materialize(self.w).astype(jnp.promote_types(self.dtype, jnp.float32))
    return times(w, labels(self.ndim), self.c - 1, self._labels)

  # ---- what is contracted

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    other_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)

    def product(x):
      operands = (self.w, x) if weight_is_lhs else (x, self.w)
      return base.dot_general(*operands, dimension_numbers, **params)

    if set(self._labels) <= set(out_labels):
      return times(product(other), out_labels, self.c, self._labels)
    if set(self._labels) <= set(other_labels):
      x = other.astype(jnp.promote_types(other.dtype, self.dtype))  # it may be of integers
      return product(times(x, other_labels, self.c, self._labels))
    return self._summed_over_stacks(other, dimension_numbers, weight_is_lhs=weight_is_lhs, **params)

  def _summed_over_stacks(self, other, dimension_numbers, *, weight_is_lhs, **params):
    """By a product that keeps the stacks, the scaled results of which are summed."""
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
    y = self.dot_general(other, numbers, weight_is_lhs=weight_is_lhs, **params)
    return jnp.sum(y, range(len(batch), len(batch + stacks)))

  def conv_general_dilated(self, x, *, dimension_numbers, batch_group_count, **params):
    _, rhs_spec, out_spec = dimension_numbers
    if any(role != ("o" if n == rhs_spec[0] else "i") for n, role in enumerate(self.all_roles)):
      raise NotFactored(f"the roles {self.all_roles!r} are not those of the convolution's axes")
    y = base.conv_general_dilated(
      x, self.w, dimension_numbers=dimension_numbers, batch_group_count=batch_group_count, **params
    )
    return times(y, string.ascii_uppercase[: y.ndim], self.c, string.ascii_uppercase[out_spec[1]])

  def ragged_dot_general(self, lhs, group_sizes, *, ragged_dot_dimension_numbers, **params):
    d = ragged_dot_dimension_numbers
    if self.all_roles != "sio" or tuple(d.rhs_group_dimensions) != (0,):
      raise NotFactored("only rows by a stack of (in, out) matrices are multiplied by group")
    y = base.ragged_dot_general(lhs, self.w, group_sizes, ragged_dot_dimension_numbers=d, **params)
    rows = jnp.repeat(self.c, group_sizes, axis=0, total_repeat_length=y.shape[0])
    return times(y, "no", rows, "no")

  def gather(self, indices, *, dimension_numbers, mode, **params):
    """Whole rows along one axis, as an embedding is looked up."""
    d = dimension_numbers
    if len(d.collapsed_slice_dims) != 1 or d.start_index_map != d.collapsed_slice_dims:
      raise NotFactored("only whole rows along one axis are gathered in factored form")
    if "s" in self.all_roles or d.operand_batching_dims:
      raise NotFactored("the rows of a stack of weights are gathered")
    rows = base.call("gather", self.w, indices, dimension_numbers=d, mode=mode, **params)
    (axis,) = d.collapsed_slice_dims
    names = labels(self.ndim)
    rest, batches = iter(names.replace(names[axis], "")), iter(string.ascii_uppercase)
    out_labels = "".join(next(rest if n in d.offset_dims else batches) for n in range(rows.ndim))
    batch_labels = "".join(x for x in out_labels if x.isupper())
    ids, c, c_labels = indices[..., 0].astype(jnp.int32), self.c, self._labels
    if self.all_roles[axis] == "o":
      c = jnp.take(c, ids, axis=c_labels.index(names[axis]), mode="clip")
      c_labels = c_labels.replace(names[axis], batch_labels)
    scaled = times(rows, out_labels, c, c_labels)
    if lax.GatherScatterMode.from_any(mode) != lax.GatherScatterMode.FILL_OR_DROP:
      return scaled
    # A row out of bounds is not the weight's, but what the gather fills it with.
    found = (ids >= 0) & (ids < self.shape[axis])
    return jnp.where(spread(found, batch_labels, out_labels), scaled, rows)

  # ---- what stays a weight; see `Structured` for the rest

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c))

  @property
  def _labels(self) -> Labels:
    """The labels of c, given `labels(self.ndim)` of w."""
    return part_labels(labels(self.ndim), self.all_roles, "so")


def times(y: jax.Array, y_labels: Labels, c: jax.Array, c_labels: Labels) -> jax.Array:
  """`y * c` along the axes that c has, in y's dtype; multiplied in at least float32."""
  product = y.astype(jnp.promote_types(y.dtype, c.dtype)) * spread(c, c_labels, y_labels)
  return product.astype(y.dtype)


def spread(x: jax.Array, x_labels: Labels, wanted: Labels) -> jax.Array:
  """The array with its axes where `wanted` has them, and axes of size one elsewhere."""
  order = [x_labels.index(c) for c in wanted if c in x_labels]
  missing = [n for n, c in enumerate(wanted) if c not in x_labels]
  return jnp.expand_dims(lax.transpose(x, order), missing)
