"""Weights that stay weights when their axes are moved, split, joined or sliced.

An operation on an axis of the base is applied to the same axis of every part that has it.
`LAYOUTS` alone says which parts these are. A kind for which this holds derives from `Structured`
and gets every operation that only rearranges axes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.weights import base, explicit
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factor_axes import RANK, part_axes, part_sizes, permuted_part, reshaped_roles


@dataclasses.dataclass(frozen=True)
class Structured(Adapted):
  """An Adapted whose parts follow every operation on the axes of its base."""

  NEUTRAL: ClassVar[float] = 0
  """The value of a part where the base is padded; it must leave the padding unchanged."""

  def astype(self, dtype):
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise NotFactored(f"a cast to {dtype} rounds the sum, not its terms")
    # The parts keep their precision and are cast at their use.
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def transpose(self, permutation):
    roles = self.all_roles
    new_roles = "".join(roles[n] for n in permutation)

    def transposed(part, layout):
      return lax.transpose(part, permuted_part(roles, permutation, new_roles, layout))

    return self._with(base.call("transpose", self.w, permutation), transposed, new_roles)

  def reshape(self, new_sizes, **placed):
    roles = reshaped_roles(self.all_roles, self.shape, new_sizes)
    if roles is None:
      raise NotFactored(f"the reshape to {tuple(new_sizes)} mixes axes of different roles")
    reshape = functools.partial(base.call, "reshape", new_sizes=new_sizes, **placed)
    return self._reshaped(reshape, new_sizes, roles)

  def squeeze(self, dimensions):
    kept = [n for n in range(self.ndim) if n not in dimensions]
    roles = "".join(self.all_roles[n] for n in kept)
    squeeze = functools.partial(base.call, "squeeze", dimensions=dimensions)
    return self._reshaped(squeeze, [self.shape[n] for n in kept], roles)

  def broadcast_in_dim(self, shape, broadcast_dimensions, **placed):
    if any(shape[d] != size for d, size in zip(broadcast_dimensions, self.shape, strict=True)):
      raise NotFactored("an axis of size one is repeated")
    roles = ["s"] * len(shape)  # a new axis is a stack
    for d, role in zip(broadcast_dimensions, self.all_roles, strict=True):
      roles[d] = role
    roles = "".join(roles)

    def broadcast(part, layout):
      old, new = part_axes(self.all_roles, layout), part_axes(roles, layout)
      where = [new.index(None if n is None else broadcast_dimensions[n]) for n in old]
      sizes = part_sizes(shape, roles, layout, self._rank(part, layout))
      spread = functools.partial(lax.broadcast_in_dim, shape=sizes, broadcast_dimensions=where)
      return explicit.laid_out(spread, explicit.part_sharding(sharding, roles, layout))(part)

    def use(w):
      return base.call("broadcast_in_dim", w, shape, broadcast_dimensions, **placed)

    w = use(self.w)
    sharding = self._result_sharding((), w, use)
    return self._with(w, broadcast, roles)

  def slice(self, start_indices, limit_indices, strides):
    strides = strides or (1,) * self.ndim
    bounds = list(zip(start_indices, limit_indices, strides, strict=True))

    def sliced(part, layout):
      axes = part_axes(self.all_roles, layout)
      rank = self._rank(part, layout)
      each = [(0, rank, 1) if n is None else bounds[n] for n in axes]
      return lax.slice(part, *zip(*each, strict=True)) if each else part

    w = base.call("slice", self.w, start_indices, limit_indices, strides)
    return self._with(w, sliced, self.all_roles)

  def dynamic_slice(self, start_indices, slice_sizes):
    bounds = list(zip(start_indices, slice_sizes, strict=True))
    zero = jnp.zeros_like(jnp.asarray(start_indices[0]))

    def sliced(part, layout):
      axes = part_axes(self.all_roles, layout)
      rank = self._rank(part, layout)
      each = [(zero, rank) if n is None else bounds[n] for n in axes]
      return lax.dynamic_slice(part, *zip(*each, strict=True)) if each else part

    w = base.call("dynamic_slice", self.w, start_indices, slice_sizes)
    return self._with(w, sliced, self.all_roles)

  def rev(self, dimensions):
    def reversed_(part, layout):
      axes = part_axes(self.all_roles, layout)
      return lax.rev(part, [n for n, axis in enumerate(axes) if axis in dimensions])

    return self._with(base.call("rev", self.w, dimensions), reversed_, self.all_roles)

  def pad(self, value, config):
    def padded(part, layout):
      each = [(0, 0, 0) if n is None else config[n] for n in part_axes(self.all_roles, layout)]
      return lax.pad(part, jnp.asarray(self.NEUTRAL, part.dtype), each)

    return self._with(base.call("pad", self.w, value, config), padded, self.all_roles)

  def stacks_picked(
    self,
    indices: jax.Array,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    fill_value: Any = None,
    **params: Any,
  ) -> Self:
    """The weights of some layers of a stack: `w[ids]`, where the axes of ids become stacks.

    Args:
      indices: of a gather of whole slices along one axis.
      dimension_numbers: of the gather.
      fill_value: of the gather.
      params: the gather's other parameters.
    """
    d = dimension_numbers
    (axis,) = d.collapsed_slice_dims
    w = base.call("gather", self.w, indices, dimension_numbers=d, fill_value=fill_value, **params)
    whole = iter(n for n in range(self.ndim) if n != axis)
    ndim = indices.ndim - 1 + len(d.offset_dims)
    origin = [next(whole) if n in d.offset_dims else None for n in range(ndim)]
    roles = "".join("s" if n is None else self.all_roles[n] for n in origin)
    batch = [n for n, old in enumerate(origin) if old is None]

    sharding = explicit.sharding_of(w)

    def picked(part, layout):
      old = part_axes(self.all_roles, layout)
      # First the axes of the ids, then the axes that remain, as axes of the result.
      where = [*batch, *(None if n is None else origin.index(n) for n in old if n != axis)]

      def pick(part, indices):
        rows = take_rows(part, indices, old.index(axis), fill_value=self.NEUTRAL, **params)
        return lax.transpose(rows, [where.index(n) for n in part_axes(roles, layout)])

      placed = explicit.part_sharding(sharding, roles, layout)
      return explicit.laid_out(pick, placed)(part, indices)

    return self._with(w, picked, roles)

  def _reshaped(self, use: Callable[[Any], Any], sizes: Sequence[int], roles: str) -> Self:
    """Reshapes this weight to these sizes and roles; `use` reshapes the base."""
    w = use(self.w)
    sharding = self._result_sharding((), w, use)

    def reshaped(part, layout):
      new_sizes = part_sizes(sizes, roles, layout, self._rank(part, layout))
      reshape = functools.partial(lax.reshape, new_sizes=new_sizes)
      return explicit.laid_out(reshape, explicit.part_sharding(sharding, roles, layout))(part)

    return self._with(w, reshaped, roles)

  def _result_sharding(self, x: Any, y: Any, use: Callable[[Any], Any]) -> NamedSharding | None:
    """The sharding of an operation's result over explicit mesh axes: that of the base's result.

    Args:
      x: the other operands.
      y: the result of the base.
      use: the operation, for kinds whose base has no sharding; it is only traced.
    """
    del x, use
    return explicit.sharding_of(y)

  def _rank(self, part: jax.Array, layout: str) -> int:
    """The size of a part's rank axis."""
    return part.shape[part_axes(self.all_roles, layout).index(None)] if RANK in layout else 0

  def _with(self, w, change: Callable[[jax.Array, str], jax.Array], roles: str) -> Self:
    """Returns this weight with base w and `change(part, layout)` for every part."""
    parts = {name: change(part, self.LAYOUTS[name]) for name, part in self.parts.items()}
    return dataclasses.replace(self, w=w, **parts, roles=roles.lstrip("s"))


def take_rows(
  x: jax.Array,
  indices: jax.Array,
  axis: int,
  fill_value: Any,
  slice_sizes: Sequence[int] | None = None,
  **params: Any,
) -> jax.Array:
  """Gathers whole rows along an axis; the result is [*batch, *the other axes]."""
  del slice_sizes  # of the weight; those of a part follow from its shape
  rest = x.ndim - 1
  batch = indices.ndim - 1
  return lax.gather(
    x,
    indices,
    dimension_numbers=lax.GatherDimensionNumbers(
      offset_dims=tuple(range(batch, batch + rest)),
      collapsed_slice_dims=(axis,),
      start_index_map=(axis,),
    ),
    slice_sizes=tuple(1 if n == axis else size for n, size in enumerate(x.shape)),
    fill_value=fill_value,
    **params,
  )
