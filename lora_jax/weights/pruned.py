"""Pruned: an array some of whose numbers are zero, and stay zero whatever is learned beside them.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": Pruned(w=W * mask, mask)}}
    adapted   {"query": {"kernel": Pruned(w=LowRank(W * mask, a, b), mask)}}

An adapter goes inside: what is used and merged is `mask * (W + a b)`, so healing trains what will
be kept. Alone it is used as the array that it is. With an adapter the masked sum is formed for one
use, a temporary of that product, which the backward pass forms again: a product of a mask and of
thin factors has no thin form.
"""

import dataclasses
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
    w: an array, which is zero where the mask is; or a Weight, which need not be.
    mask: bool, of w's shape; False where it is zero for good.
    path: the leaf's path, for messages.
  """

  w: Any
  mask: jax.Array
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  @classmethod
  def of(cls, w: jax.Array, mask: jax.Array, path: str) -> Self:
    """An array with zeros where the mask has them."""
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

  # ---- what is contracted, with a Weight inside

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

  # ---- what stays pruned

  def astype(self, dtype):
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c))

  def _moved(self, op: str, *args, **placed) -> Self:
    mask = getattr(lax, op)(self.mask, *args, **placed)
    return dataclasses.replace(self, w=base.call(op, self.w, *args, **placed), mask=mask)
