"""Exact attention, one block of scores at a time, in plain JAX and in memory linear in T.

The softmax is accumulated over blocks of keys: the running maximum of the scores, the sum of
exponentials and the weighted sum of values. A new maximum rescales the sums (Milakov and Gimelshein
2018, "Online normalizer calculation for softmax", section 3; Rabe and Staats 2021, "Self-attention
Does Not Need O(n²) Memory", section 2). The backward pass recomputes the scores of a block from the
logarithm of each query's sum (Dao et al. 2022, "FlashAttention", appendix B). Blocks that are fully
masked by causality or the window are skipped. Forward-mode derivatives are not defined.

Shapes have the letters of `lora_jax.models.llama`. M is N / K, the query heads that share keys;
c is a block.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256
"""Queries, and keys, of a block, at most."""

_UNSEEN = float(np.finfo(np.float32).min) / 2
"""The score of a masked key; its weight is 0 unless all keys of a query are masked."""


@dataclasses.dataclass(frozen=True)
class _Form:
  """The static properties of a call."""

  scale: float
  softcap: float | None
  is_causal: bool
  window: int | None
  slots: int  # keys, without padding
  block_q: int
  block_k: int


def blockwise(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKG: jax.Array,
  *,
  is_causal: bool,
  window: int | jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  positions_BT: jax.Array | None = None,
  mask: jax.Array | None = None,
  scale: float | None,
  softcap: float | None,
  sinks_N: jax.Array | None = None,
) -> jax.Array:
  """Computes `lora_jax.models.attention.attend` up to rounding."""
  batch, length, heads, features = query_BTNH.shape
  slots, kv_heads = key_BSKH.shape[1:3]
  known = window if isinstance(window, int) else None
  form = _Form(
    scale=features**-0.5 if scale is None else scale,
    softcap=softcap,
    is_causal=is_causal and positions_BT is None,
    window=known if positions_BT is None else None,
    slots=slots,
    block_q=_block(length),
    block_k=_block(slots),
  )
  more_q, more_k = -length % form.block_q, -slots % form.block_k
  query = query_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, features)
  sight = {}
  if window is not None:
    sight["window"] = jnp.asarray(window, jnp.int32)
  if positions_BT is not None:
    sight["positions"] = _padded(jnp.asarray(positions_BT), 1, more_q)
  if segments_BT is not None:
    sight["query_segments"] = _padded(segments_BT, 1, more_q)
    sight["key_segments"] = _padded(segments_BT, 1, more_k)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (*mask.shape[:3], slots))
    # A single row for all queries stays as it is.
    sight["mask"] = _padded(_padded(mask, 2, more_q if mask.shape[2] > 1 else 0), 3, more_k)
  made = _attention(
    form,
    _padded(query, 1, more_q),
    _padded(key_BSKH, 1, more_k),
    _padded(value_BSKG, 1, more_k),
    None if sinks_N is None else sinks_N.reshape(kv_heads, -1),
    sight,
  )
  out = cast(jax.Array, made)  # custom_vjp with arguments of its own loses the type
  return out[:, :length].reshape(batch, length, heads, value_BSKG.shape[-1])


def _block(length: int) -> int:
  """The block size that splits the length into the fewest equal blocks, a multiple of 8."""
  count = -(-length // BLOCK)
  return -(-length // (8 * count)) * 8


def _padded(x, axis: int, more: int):
  return jnp.pad(x, [(0, more if n == axis else 0) for n in range(x.ndim)]) if more else x


def _pairs(form: _Form, length: int, slots: int) -> np.ndarray:
  """The blocks (of queries, of keys) where a query may see a key, [P, 2]."""
  rows = np.arange(length // form.block_q)[:, None] * form.block_q
  columns = np.arange(slots // form.block_k)[None] * form.block_k
  seen = np.ones((rows.size, columns.size), bool)
  if form.is_causal:
    seen &= columns <= rows + form.block_q - 1
    if form.window is not None:
      seen &= columns + form.block_k - 1 > rows - form.window
  return np.argwhere(seen).astype(np.int32)


def _cut(x, number, size: int, axis: int = 1):
  return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _put(x, part, number, axis: int = 1):
  return jax.lax.dynamic_update_slice_in_dim(x, part, number * part.shape[axis], axis)


def _seen(form: _Form, sight: dict[str, Any], i, j):
  """Whether queries of block i see keys of block j, broadcastable to [B, K, M, c, c]; and whether
  the keys are not padding, [c]."""
  columns = j * form.block_k + jnp.arange(form.block_k)
  if "positions" in sight:
    rows = _cut(sight["positions"], i, form.block_q)[:, :, None]
  else:
    rows = (i * form.block_q + jnp.arange(form.block_q))[None, :, None]
  seen = jnp.ones((1, form.block_q, form.block_k), bool)
  if form.is_causal or "positions" in sight:
    seen &= columns <= rows
    if "window" in sight:
      seen &= columns > rows - sight["window"]
  if "query_segments" in sight:
    ours = _cut(sight["query_segments"], i, form.block_q)
    theirs = _cut(sight["key_segments"], j, form.block_k)
    seen &= ours[:, :, None] == theirs[:, None, :]
  seen = seen[:, None, None]
  if "mask" in sight:
    mask = _cut(sight["mask"], j, form.block_k, 3)
    mask = _cut(mask, i, form.block_q, 2) if mask.shape[2] > 1 else mask
    # The mask has one head axis for all heads, or one entry per query head.
    return seen, mask, columns < form.slots
  return seen, None, columns < form.slots


def _scores(form: _Form, query, key, sight, i, j):
  """Masked scores in float32, [B, K, M, c, c]; the same before masking; and which are unmasked."""
  raw = form.scale * jnp.einsum("btkmh,bskh->bkmts", query, key, preferred_element_type=jnp.float32)
  capped = raw if form.softcap is None else form.softcap * jnp.tanh(raw / form.softcap)
  seen, mask, real = _seen(form, sight, i, j)
  if mask is not None:
    heads = raw.shape[1] * raw.shape[2]
    if mask.shape[1] == heads and heads > 1:
      mask = mask.reshape(mask.shape[0], *raw.shape[1:3], *mask.shape[2:])
    else:
      mask = mask[:, :, None]
    seen = seen & mask
  scores = jnp.where(real, jnp.where(seen, capped, _UNSEEN), -jnp.inf)
  return scores, capped, seen & real


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: _Form, query, key, value, sinks, sight) -> jax.Array:
  return _forward(form, query, key, value, sinks, sight)[0]


def _forward(form: _Form, query, key, value, sinks, sight):
  """The result [B, T, K, M, G], and the logarithm of each query's sum, [B, K, M, T]."""
  batch, length, kv_heads, shared, _ = query.shape
  features = value.shape[-1]
  shape = (batch, kv_heads, shared, length)
  start = _UNSEEN if sinks is None else sinks.astype(jnp.float32)[None, :, :, None]
  largest = jnp.broadcast_to(jnp.asarray(start, jnp.float32), shape)
  total = jnp.full(shape, 0.0 if sinks is None else 1.0, jnp.float32)
  out = jnp.zeros((*shape, features), jnp.float32)

  def one_block(carry, pair):
    largest, total, out = carry
    i, j = pair
    scores, _, _ = _scores(
      form, _cut(query, i, form.block_q), _cut(key, j, form.block_k), sight, i, j
    )
    before = _cut(largest, i, form.block_q, 3)
    now = jnp.maximum(before, scores.max(axis=-1))
    weights, kept = jnp.exp(scores - now[..., None]), jnp.exp(before - now)
    added = jnp.einsum(
      "bkmts,bskg->bkmtg",
      weights.astype(value.dtype),
      _cut(value, j, form.block_k),
      preferred_element_type=jnp.float32,
    )
    sums = kept * _cut(total, i, form.block_q, 3) + weights.sum(axis=-1)
    part = kept[..., None] * _cut(out, i, form.block_q, 3) + added
    return (_put(largest, now, i, 3), _put(total, sums, i, 3), _put(out, part, i, 3)), None

  pairs = _pairs(form, length, key.shape[1])
  (largest, total, out), _ = jax.lax.scan(one_block, (largest, total, out), (*pairs.T,))
  out = jnp.einsum("bkmtg->btkmg", (out / total[..., None]).astype(value.dtype))
  return out, largest + jnp.log(total)


def _forward_with_residuals(form: _Form, query, key, value, sinks, sight):
  out, logsum = _forward(form, query, key, value, sinks, sight)
  return out, (query, key, value, sinks, sight, out, logsum)


def _backward(form: _Form, residuals, grad):
  query, key, value, sinks, sight, out, logsum = residuals
  # The gradient of a score is its weight times (the weight's gradient minus their weighted mean).
  mean = jnp.einsum("btkmg,btkmg->bkmt", grad, out, preferred_element_type=jnp.float32)

  def one_block(grads, pair):
    i, j = pair
    query_i, key_j = _cut(query, i, form.block_q), _cut(key, j, form.block_k)
    grad_i = _cut(grad, i, form.block_q)
    scores, capped, seen = _scores(form, query_i, key_j, sight, i, j)
    weights = jnp.exp(scores - _cut(logsum, i, form.block_q, 3)[..., None])
    of_weights = jnp.einsum(
      "btkmg,bskg->bkmts",
      grad_i,
      _cut(value, j, form.block_k),
      preferred_element_type=jnp.float32,
    )
    of_scores = weights * (of_weights - _cut(mean, i, form.block_q, 3)[..., None])
    if form.softcap is not None:
      of_scores *= 1 - jnp.square(capped / form.softcap)
    of_scores = jnp.where(seen, form.scale * of_scores, 0).astype(query.dtype)
    sums = {"preferred_element_type": jnp.float32}
    added = (
      jnp.einsum("bkmts,bskh->btkmh", of_scores, key_j, **sums),
      jnp.einsum("bkmts,btkmh->bskh", of_scores, query_i, **sums),
      jnp.einsum("bkmts,btkmg->bskg", weights.astype(grad.dtype), grad_i, **sums),
    )
    return tuple(
      _put(whole, _cut(whole, number, part.shape[1]) + part, number)
      for whole, part, number in zip(grads, added, (i, j, j), strict=True)
    ), None

  sizes = (query, key, value)
  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in sizes)
  pairs = _pairs(form, query.shape[1], key.shape[1])
  grads, _ = jax.lax.scan(one_block, start, (*pairs.T,))
  grads = [part.astype(x.dtype) for part, x in zip(grads, sizes, strict=True)]
  grad_sinks = None
  if sinks is not None:
    shares = jnp.exp(sinks.astype(jnp.float32)[None, :, :, None] - logsum)
    grad_sinks = -jnp.sum(shares * mean, axis=(0, 3)).astype(sinks.dtype)
  return *grads, grad_sinks, None


_attention.defvjp(_forward_with_residuals, _backward)
