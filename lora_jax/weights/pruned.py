"""Pruned: an array with zeros that stay zero when an adapter trains alongside it.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": Pruned(w=W * mask, mask)}}
    adapted   {"query": {"kernel": Pruned(w=LowRank(W * mask, a, b), mask)}}

The adapter goes inside the mask. The model uses and merges `mask * (W + a b)`, so healing trains
only values that are kept. Without an adapter, a Pruned is used as the plain array w. With one, the
masked sum is materialized temporarily at each use, and again in the backward pass, since the
product of a mask and thin factors has no thin form.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base, explicit
from lora_jax.weights.base import is_weight
from lora_jax.weights.moved import Moved
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class Pruned(Moved):
  """`mask * w`, an array of w's shape and dtype.

  Attributes:
    w: an array that is zero where the mask is False; or a Weight, which need not be.
    mask: bool, of w's shape; False where the value stays zero.
    path: the leaf's path, for messages.
  """

  w: Any
  mask: jax.Array
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  @classmethod
  def of(cls, w: jax.Array, mask: jax.Array, path: str) -> Self:
    """Returns an array with the values outside the mask set to zero."""
    return cls(jnp.where(mask, w, 0), mask, path=path)

  def applied(self) -> Any:
    return self if is_weight(self.w) else self.w

  def materialize(self):
    return jnp.where(self.mask, base.materialize(self.w), 0)

  def trainable(self):
    w = self.w.trainable() if is_weight(self.w) else False
    return dataclasses.replace(self, w=w, mask=False)

  @property
  def shape(self):
    return tuple(self.mask.shape)

  @property
  def dtype(self):
    return self.w.dtype

  @property
  def explicit_sharding(self):
    return explicit.sharding_of(self.w)

  @property
  def is_stacked(self):
    return self.w.is_stacked if is_weight(self.w) else True

  def partition_specs(self, spec):
    w = self.w.partition_specs(spec) if is_weight(self.w) else spec
    return dataclasses.replace(self, w=w, mask=spec)

  # ---- contractions, with a Weight inside

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    def product(w, other):
      operands = (w, other) if weight_is_lhs else (other, w)
      return lax.dot_general(*operands, dimension_numbers, **params)

    return self._used(product, other)

  def conv_general_dilated(self, x, **params):
    return self._used(lambda w, x: lax.conv_general_dilated(x, w, **params), x)

  def ragged_dot_general(self, lhs, group_sizes, **params):
    return self._used(lambda w, lhs: lax.ragged_dot_general(lhs, w, group_sizes, **params), lhs)

  def gather(self, indices, **params):
    return self._used(lambda w, indices: lax.gather(w, indices, **params), indices)

  def _used(self, use, other):
    return jax.checkpoint(lambda self, other: use(self.materialize(), other))(self, other)

  # ---- operations that stay pruned

  def astype(self, dtype):
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c))

  def _moved(self, op: str, *args, **placed) -> Self:
    mask = getattr(lax, op)(self.mask, *args, **placed)
    return dataclasses.replace(self, w=base.call(op, self.w, *args, **placed), mask=mask)


def unmasked(leaf: Any) -> Any:
  """Returns the array or Weight inside a leaf's mask, or the leaf itself if it has none."""
  return leaf.w if isinstance(leaf, Pruned) else leaf


def inside_mask(change: Callable[[Any], Any], leaf: Any) -> Any:
  """Returns a leaf whose part inside the mask is changed, or all of it if it has no mask."""
  if isinstance(leaf, Pruned):
    return dataclasses.replace(leaf, w=change(leaf.w))
  return change(leaf)
