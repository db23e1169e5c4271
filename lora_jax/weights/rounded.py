"""Rounded: a weight after its future merge and quantization, with the gradient of the weight.

    before    {"kernel": LowRank(W, A, B)}                      trained, then merged and quantized
    after     {"kernel": Rounded(LowRank(W, A, B), format)}     quantized at every step

The gradient ignores the rounding (the straight-through estimator), so the factors learn a change
that survives it. Source: Bengio et al. 2013, arXiv 1308.3432, section 4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import base, explicit
from lora_jax.weights.base import NotFactored
from lora_jax.weights.formed import Formed
from lora_jax.weights.pytree import register
from lora_jax.weights.quantized import Format, quantized


@register
@dataclasses.dataclass(frozen=True)
class Rounded(Formed):
  """The array of `quantized(w, format, columns)`, with the gradient of w.

  Attributes:
    w: an array or a Weight, such as an adapter on its base.
    format, columns: as in `weights.quantized.quantized`.
    to: the dtype of the array; "" for that of w.
    path: the leaf's path, for messages.
  """

  w: Any
  format: Format = dataclasses.field(kw_only=True, metadata={"static": True})
  columns: tuple[int, ...] = dataclasses.field(kw_only=True, metadata={"static": True})
  to: str = dataclasses.field(default="", kw_only=True, metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  def materialize(self):
    def rounded(w):
      nearest = quantized(w, self.format, self.columns).astype(self.dtype).materialize()
      return _pass_by(w.astype(self.dtype), nearest)

    return explicit.laid_out(rounded, self.explicit_sharding)(base.materialize(self.w))

  def trainable(self):
    return dataclasses.replace(self, w=self.w.trainable() if base.is_weight(self.w) else False)

  @property
  def shape(self):
    return tuple(self.w.shape)

  @property
  def dtype(self):
    return jnp.dtype(self.to or self.w.dtype)

  @property
  def explicit_sharding(self):
    return explicit.sharding_of(self.w)

  @property
  def is_stacked(self):
    return len(self.shape) not in [-n for n in self.columns]

  def partition_specs(self, spec):
    w = self.w.partition_specs(spec) if base.is_weight(self.w) else spec
    return dataclasses.replace(self, w=w)

  def astype(self, dtype):
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise NotFactored(f"a cast to {dtype} rounds the values after they are dequantized")
    return dataclasses.replace(self, to=jnp.dtype(dtype).name)

  def scaled(self, c):
    raise NotFactored("a multiple of it has other quantized values")


@jax.custom_jvp
def _pass_by(w, rounded):
  """Returns the rounded array; its derivative by w is that of w itself."""
  del w
  return rounded


@_pass_by.defjvp
def _(primals, tangents):
  return _pass_by(*primals), tangents[0]
