"""TokenRows: `w` with changes to a few rows, looked up and multiplied without a copy of `w`.

    w (V, D)             roles "io"    dw (n, D)           an embedding, tied to a head or not
    w (D, V)             roles "oi"    dw (n, D)           the kernel of an untied head

The role `i` always marks the axis of the tokens, for either side of a product.
"""

import dataclasses
import string
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factor_axes import RANK, labels, part_labels, permuted_part, reordered
from lora_jax.weights.low_rank import plus
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class TokenRows(Adapted):
  """`w` with `dw[n]` added to its row `ids[n]`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight, with one axis of tokens; None in an adapter.
    dw: [*stack, len(ids), *the other axes], the change of the rows.
    ids: the token ids, without duplicates.
    roles: `i` for the axis of the tokens, `o` for all others except leading stacks.
    frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"dw": "sro"}
  TRAINED: ClassVar = ("dw",)
  LINEAR: ClassVar = "dw"

  dw: jax.Array
  ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  @property
  def rows(self) -> jax.Array:
    """The changed rows, [*stack, len(ids), *the other axes], as PEFT stores them."""
    names = labels(self.ndim)

    def summed(w, dw):
      rows = jnp.take(w, self._places, axis=self._tokens)
      return reordered(rows + self._change(dw, rows.dtype), names, self._dw_labels(names))

    sharding = explicit.part_sharding(self.explicit_sharding, self.all_roles, "sro")
    return explicit.laid_out(summed, sharding)(base.materialize(self.w), self.dw)

  def delta(self) -> jax.Array:
    dtype = promotion.at_least_float32(self.dtype)

    def change(dw):
      return self._added(jnp.zeros(self.shape, dtype), self._tokens, self._change(dw, dtype))

    return explicit.laid_out(change, self.explicit_sharding)(self.dw)

  def fits(self):
    rows = self.dw.shape[self.all_roles.count("s")] if self.dw.ndim == self.ndim else 0
    last = max(self.ids, default=-1)
    return super().fits() and rows == len(self.ids) and last < self.shape[self._tokens]

  # ---- contractions and look-ups

  def dot_general(
    self,
    other,
    dimension_numbers,
    *,
    weight_is_lhs,
    precision=None,
    preferred_element_type=None,
    **params,
  ):
    asked, dtype = promotion.of_base(preferred_element_type, other.dtype, self.dtype)
    lhs, rhs = (self.w, other) if weight_is_lhs else (other, self.w)
    y = base.dot_general(
      lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=asked, **params
    )
    other_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    names = labels(self.ndim)
    token = names[self._tokens]
    wide = promotion.joint(other.dtype, self.dtype)  # the other operand may be of integers

    def summed(y, x, dw):
      x = x.astype(wide)
      if token in other_labels:
        x = jnp.take(x, self._places, axis=other_labels.index(token))
      product = f"{other_labels},{self._dw_labels(names)}->{out_labels}"
      delta = jnp.einsum(product, x, dw.astype(x.dtype), precision=precision).astype(y.dtype)
      return self._added(y, out_labels.index(token), delta) if token in out_labels else y + delta

    y = explicit.laid_out(summed, explicit.sharding_of(y))(y, other, self.dw)
    return y.astype(dtype or y.dtype)

  def gather(self, indices, *, dimension_numbers, slice_sizes, mode, fill_value=None, **params):
    """Looks up rows of tokens: `w[t]`, plus `dw[n]` where t is `ids[n]`."""
    d = dimension_numbers
    full = [n == self._tokens or size == self.shape[n] for n, size in enumerate(slice_sizes)]
    if d.start_index_map != (self._tokens,) or d.operand_batching_dims or not all(full):
      raise NotFactored("only whole rows along the axis of the tokens are gathered")
    if "s" in self.all_roles or d.collapsed_slice_dims != (self._tokens,):
      raise NotFactored("rows of a stack, or slices of several rows, are gathered")
    rows = base.call(
      "gather",
      self.w,
      indices,
      dimension_numbers=d,
      slice_sizes=slice_sizes,
      mode=mode,
      fill_value=fill_value,
      **params,
    )
    if not self.ids:
      return rows
    # The place of each token among the sorted ids; a token out of bounds equals none of them.
    order = np.argsort(self.ids)
    ids = np.asarray(self.ids, np.int32)[order]
    batch, rest = string.ascii_uppercase[: indices.ndim - 1], labels(self.ndim - 1)
    offsets, batches = iter(rest), iter(batch)
    out = "".join(next(offsets if n in d.offset_dims else batches) for n in range(rows.ndim))

    def summed(rows, indices, dw):
      tokens = indices[..., 0]
      if mode == lax.GatherScatterMode.CLIP:
        tokens = jnp.clip(tokens, 0, self.shape[self._tokens] - 1)
      tokens = tokens.astype(jnp.int32)
      place = jnp.searchsorted(ids, tokens).clip(max=len(ids) - 1)
      found = (jnp.asarray(ids)[place] == tokens).reshape(*tokens.shape, *[1] * (self.ndim - 1))
      delta = jnp.where(found, dw[order][place], 0)
      return plus(rows, reordered(delta, batch + rest, out)).astype(rows.dtype)

    return explicit.laid_out(summed, explicit.sharding_of(rows))(rows, indices, self.dw)

  # ---- operations that stay a weight

  def astype(self, dtype):
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise NotFactored(f"a cast to {dtype} rounds the sum, not its terms")
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def transpose(self, permutation):
    roles = "".join(self.all_roles[n] for n in permutation)
    dw = lax.transpose(self.dw, permuted_part(self.all_roles, permutation, roles, "sro"))
    w = base.call("transpose", self.w, permutation)
    return dataclasses.replace(self, w=w, dw=dw, roles=roles.lstrip("s"))

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c), dw=promotion.multiplied(self.dw, c))

  # ---- the rows

  @property
  def _tokens(self) -> int:
    """The axis of the tokens."""
    return self.all_roles.index("i")

  @property
  def _places(self) -> np.ndarray:
    return np.asarray(self.ids, np.int32)

  def _dw_labels(self, names: str) -> str:
    """The labels of dw, given those of w; its rows have the label of the token axis."""
    return part_labels(names, self.all_roles, "sro").replace(RANK, names[self._tokens])

  def _change(self, dw, dtype) -> jax.Array:
    """dw in the order of w's axes."""
    names = labels(self.ndim)
    return reordered(dw.astype(dtype), self._dw_labels(names), names)

  def _added(self, x, axis: int, change):
    """Adds a change to x at the ids along an axis."""
    where = (*[slice(None)] * axis, self._places)
    return x.at[where].add(change, unique_indices=True, mode="promise_in_bounds")
