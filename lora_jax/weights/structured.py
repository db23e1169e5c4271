"""Weights that stay weights when their axes are moved, split, joined or sliced.

What is done to an axis of the base is done to the same axis of every part that has it, and which
parts those are is said by `LAYOUTS` and nothing else. A kind for which that is true derives from
`Structured`, and has every operation that only rearranges.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factors import RANK, part_axes, part_sizes, permuted_part, reshaped_roles


@dataclasses.dataclass(frozen=True)
class Structured(Adapted):
  """An Adapted whose parts follow every change of the axes of its base."""

  def astype(self, dtype):
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise NotFactored(f"a cast to {dtype} rounds the sum, not its terms")
    # The parts keep their precision: they are cast where they are used.
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def transpose(self, permutation):
    roles = self.all_roles
    new_roles = "".join(roles[n] for n in permutation)

    def transposed(part, layout):
      return lax.transpose(part, permuted_part(roles, permutation, new_roles, layout))

    return self._with(base.call("transpose", self.w, permutation), transposed, new_roles)

  def reshape(self, new_sizes):
    roles = reshaped_roles(self.all_roles, self.shape, new_sizes)
    if roles is None:
      raise NotFactored(f"the reshape to {tuple(new_sizes)} mixes axes of different roles")
    return self._reshaped(base.call("reshape", self.w, new_sizes), new_sizes, roles)

  def squeeze(self, dimensions):
    kept = [n for n in range(self.ndim) if n not in dimensions]
    w = base.call("squeeze", self.w, dimensions)
    roles = "".join(self.all_roles[n] for n in kept)
    return self._reshaped(w, [self.shape[n] for n in kept], roles)

  def broadcast_in_dim(self, shape, broadcast_dimensions):
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
      return lax.broadcast_in_dim(part, sizes, where)

    w = base.call("broadcast_in_dim", self.w, shape, broadcast_dimensions)
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

  def _reshaped(self, w, sizes: Sequence[int], roles: str) -> Self:
    def reshaped(part, layout):
      return part.reshape(part_sizes(sizes, roles, layout, self._rank(part, layout)))

    return self._with(w, reshaped, roles)

  def _rank(self, part: jax.Array, layout: str) -> int:
    """The size of the axis of a part that is none of the base's."""
    return part.shape[part_axes(self.all_roles, layout).index(None)] if RANK in layout else 0

  def _with(self, w, change: Callable[[jax.Array, str], jax.Array], roles: str) -> Self:
    """This weight with another base, and every part changed by `change(part, its layout)`."""
    parts = {name: change(part, self.LAYOUTS[name]) for name, part in self.parts.items()}
    return dataclasses.replace(self, w=w, **parts, roles=roles.lstrip("s"))
