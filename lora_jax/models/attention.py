"""The parts of attention that all decoders share: rotary positions, the cache, and `attend`.
Shapes are written as suffixes, with the letters of `lora_jax.models.llama`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.models import attention_kernels as kernels
from lora_jax.models.blockwise import blockwise
from lora_jax.models.llama_config import LlamaConfig, rotary_features, value_features
from lora_jax.models.rope import DynamicRope, rotary_frequencies


class KVCache(NamedTuple):
  """One layer's keys and values; slot j holds the token at position j."""

  key_BSKH: jax.Array
  value_BSKG: jax.Array


Cache = dict[str, KVCache]
"""The caches of all layers, named as the blocks are: `block_{i}`, or `blocks` with a leading L."""


def init_cache(
  config: LlamaConfig, batch_size: int, max_length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
  """Returns an empty cache.

  config: of the model that fills it.
  batch_size: B.
  max_length: S, the largest position that will be used, plus one. Keys past it are dropped.
  dtype: of keys and values; the model's `config.dtype` stores them exactly.
  """
  shape = (batch_size, max_length, config.num_kv_heads)
  return empty_cache(
    config.num_layers,
    (*shape, config.head_dim),
    (*shape, value_features(config)),
    dtype,
    stacked=config.scan_layers,
  )


def empty_cache(
  num_layers: int,
  key_BSKH: tuple[int, ...],
  value_BSKG: tuple[int, ...],
  dtype: DTypeLike,
  *,
  stacked: bool,
) -> Cache:
  """Returns an empty cache for so many layers, from the shapes of one layer's keys and values."""

  def empty(*leading: int) -> KVCache:
    return KVCache(*(jnp.zeros((*leading, *shape), dtype) for shape in (key_BSKH, value_BSKG)))

  if stacked:
    return {"blocks": empty(num_layers)}
  return {f"block_{i}": empty() for i in range(num_layers)}


def write(
  cache: KVCache, positions_BT: jax.Array, key_BTKH: jax.Array, value_BTKG: jax.Array
) -> KVCache:
  """Returns the cache with the keys and values written at their positions."""
  rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
  return KVCache(
    cache.key_BSKH.at[rows_B1, positions_BT].set(key_BTKH.astype(cache.key_BSKH.dtype)),
    cache.value_BSKG.at[rows_B1, positions_BT].set(value_BTKG.astype(cache.value_BSKG.dtype)),
  )


class Rotation(NamedTuple):
  """The rotary angles of each position, computed once per call for all layers.

  query_BT: a further factor for queries; None: no factor.
  """

  cos_BTR: jax.Array
  sin_BTR: jax.Array
  query_BT: jax.Array | None = None


def rotation(
  config: LlamaConfig, positions_BT: jax.Array, length: int, rotated: bool = True
) -> Rotation:
  """Returns cos and sin of `position * frequency` in float32 (Su et al. 2021, section 3.2.2).

  length: the longest text that fits, from `room`.
  rotated: False leaves queries and keys as they are.
  """
  features, scaling = rotary_features(config), config.rope_scaling
  query_BT, factor = None, 1.0
  if config.query_growth is not None:
    assert config.query_length is not None  # the config has both or none
    query_BT = 1 + config.query_growth * jnp.log1p(positions_BT // config.query_length)
  if not rotated:
    frequencies_R = np.zeros(features // 2)
  elif scaling is None:
    frequencies_R = rotary_frequencies(config.rope_theta, features)
  else:
    frequencies_R = scaling.frequencies(config.rope_theta, features, length)
    factor = scaling.attention_factor
  angles_BTR = positions_BT[..., None] * jnp.asarray(frequencies_R, jnp.float32)
  return Rotation(factor * jnp.cos(angles_BTR), factor * jnp.sin(angles_BTR), query_BT)


def room(
  config: LlamaConfig,
  positions_BT: jax.Array | None,
  segments_BT: jax.Array | None,
  length: int,
  cache: Cache | None,
) -> int:
  """Returns the longest text that a call can hold: the slots of the cache, or T.

  positions_BT, segments_BT: the arguments of `llama.Llama`.
  length: T.

  Raises ValueError if the rotary frequencies depend on the length of a text, and the texts of a
  call may need different ones.
  """
  slots = length if cache is None else next(iter(cache.values())).key_BSKH.shape[-3]
  scaling = config.rope_scaling
  if scaling is None or scaling.changes_after is None or slots <= scaling.changes_after:
    return slots
  where = f"{type(scaling).__name__}: frequencies change after {scaling.changes_after} tokens, and "
  if cache is not None and isinstance(scaling, DynamicRope):
    raise ValueError(
      f"{where}the cache has {slots} slots, whose keys would be rotated for different lengths; "
      f"use at most {scaling.changes_after} slots, or decode without a cache"
    )
  if cache is None and (segments_BT is not None or positions_BT is not None):
    raise ValueError(
      f"{where}rows of {slots} tokens may hold texts of any length; use rows of at most "
      f"{scaling.changes_after} tokens, or one text a row from position 0"
    )
  return slots


def rotate(x_BTNH: jax.Array, turn: Rotation) -> jax.Array:
  """Rotates the pairs (x[r], x[r + R]) by the angles of their positions; the rest is unchanged."""
  cos_BT1R, sin_BT1R = turn.cos_BTR[:, :, None], turn.sin_BTR[:, :, None]
  rotations = cos_BT1R.shape[-1]
  ends = [end for end in (rotations, 2 * rotations) if end < x_BTNH.shape[-1]]
  x_BTNR, y_BTNR, *rest = jnp.split(x_BTNH.astype(jnp.float32), ends, axis=-1)
  turned = (x_BTNR * cos_BT1R - y_BTNR * sin_BT1R, y_BTNR * cos_BT1R + x_BTNR * sin_BT1R)
  return jnp.concatenate((*turned, *rest), axis=-1).astype(x_BTNH.dtype)


def segment_positions(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
  """Positions that start from 0 in each row, or in each segment."""
  places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  if segments_BT is None:
    return places_BT
  starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
  return places_BT - jax.lax.cummax(jnp.where(starts_BT, places_BT, 0), axis=1)


def visible(positions_BT: jax.Array, slots: int, window: int | jax.Array | None) -> jax.Array:
  """The slots that a token sees, [B, 1, T, S]: the last `window` ones up to its position.

  window: a Python or traced integer; None: all.
  """
  slots_S, last_BT1 = jnp.arange(slots), positions_BT[..., None]
  seen_BTS = slots_S <= last_BT1
  if window is not None:
    seen_BTS &= slots_S > last_BT1 - window
  return seen_BTS[:, None]


def attend(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKG: jax.Array,
  *,
  mask: jax.Array | None = None,
  is_causal: bool = False,
  window: int | jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  positions_BT: jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks_N: jax.Array | None = None,
  choice: kernels.Choice = kernels.BY_DEVICE,
) -> jax.Array:
  """softmax(cap(scale * q kᵀ)) v, as [B, T, N, G]; values may have fewer features than keys.

  mask: True where a query sees a key, broadcast to [B, N, T, S]; None: everywhere. The next four
    arguments restrict attention without an array of that size.
  is_causal: whether a query sees only keys up to its own position.
  window: a query sees only this many last keys, its own included; None: all. Requires `is_causal`
    or `positions_BT`.
  segments_BT: the text of each position; a query sees only keys of its own text. None: one text.
  positions_BT: the slot of each query in the cache; it sees the slots up to its own. None: queries
    and keys have the same positions.
  scale: of the products; None: 1 / sqrt(H).
  softcap: scores x become `softcap * tanh(x / softcap)`; None: no cap.
  sinks_N: for each head the score of an extra key without a value (Xiao et al. 2023, "Efficient
    Streaming Language Models with Attention Sinks"; learned as in gpt-oss); None: no such key.
  choice: the implementation; all agree up to rounding.

  Raises ValueError if the chosen implementation cannot compute this.
  """
  call = kernels.Call(
    length=query_BTNH.shape[1],
    slots=key_BSKH.shape[1],
    features=query_BTNH.shape[-1],
    value_features=value_BSKG.shape[-1],
    dtype=query_BTNH.dtype,
    is_causal=is_causal,
    segments=segments_BT is not None,
    softcap=softcap is not None,
    sinks=sinks_N is not None,
    window=window if window is None or isinstance(window, int) else "traced",
    mask=mask is not None,
    cached=positions_BT is not None,
  )
  arrays, scores = (query_BTNH, key_BSKH, value_BSKG), {"scale": scale, "softcap": softcap}
  sight: dict[str, Any] = {"window": window, "segments_BT": segments_BT}
  match kernels.chosen(choice, call):
    case "blockwise":
      sight |= {"is_causal": is_causal, "positions_BT": positions_BT, "mask": mask}
      return blockwise(*arrays, sinks_N=sinks_N, scale=scale, softcap=softcap, **sight)
    case "splash":
      return kernels.splash(*arrays, mesh=choice.mesh, scale=scale, softcap=softcap, **sight)
    case name:
      mask = _mask(mask, call.length, call.slots, window, segments_BT, positions_BT)
      if softcap is not None or sinks_N is not None:
        return _attend_plainly(*arrays, mask, is_causal, sinks_N=sinks_N, **scores)
      own_keys = key_BSKH.shape[2] == query_BTNH.shape[2]
      if name == "plain" and own_keys and not is_causal and not call.cached:
        return _attend_everywhere(*arrays, mask, scale=scale)
      features, missing = call.value_features, call.features - call.value_features
      if missing:  # JAX's attention requires values of the keys' size
        value_BSKG = jnp.pad(value_BSKG, ((0, 0), (0, 0), (0, 0), (0, missing)))
      if name == "cudnn":
        assert window is None or isinstance(window, int)  # it is chosen for no other
        out_BTNH = kernels.cudnn(query_BTNH, key_BSKH, value_BSKG, window=window, scale=scale)
      else:
        out_BTNH = jax.nn.dot_product_attention(
          query_BTNH, key_BSKH, value_BSKG, mask=mask, is_causal=is_causal, scale=scale
        )
      return out_BTNH[..., :features] if missing else out_BTNH


def _mask(mask, length: int, slots: int, window, segments_BT, positions_BT):
  """Combines the arguments of `attend`, except `is_causal`, into one mask or None."""
  if segments_BT is not None:
    same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    mask = same_B1TT if mask is None else mask & same_B1TT
  if positions_BT is not None or window is not None:
    places_BT = jnp.arange(length)[None] if positions_BT is None else positions_BT
    seen_B1TS = visible(places_BT, slots, window)
    mask = seen_B1TS if mask is None else seen_B1TS & mask
  return mask


def _attend_everywhere(query_BTNH, key_BSNH, value_BSNG, mask, *, scale):
  """Computes `attend` of an encoder, or to its outputs, where each head has its own keys."""
  scores = jnp.einsum("btnh,bsnh->bnts", query_BTNH, key_BSNH, preferred_element_type=jnp.float32)
  scores *= query_BTNH.shape[-1] ** -0.5 if scale is None else scale
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  return jnp.einsum("bnts,bsng->btng", _softmax(scores).astype(value_BSNG.dtype), value_BSNG)


@jax.custom_jvp
def _softmax(scores):
  """The softmax over the last axis, whose result alone is kept for the backward pass.

  In layers that are not scanned, XLA on a CPU otherwise keeps the exponentials and the reciprocals
  of their sums as well, each as large as the scores.
  """
  return jax.nn.softmax(scores, axis=-1)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
  (scores,), (change,) = primals, tangents
  weights = jax.lax.optimization_barrier(jax.nn.softmax(scores, axis=-1))
  weighted = weights * change
  return weights, weighted - weights * weighted.sum(axis=-1, keepdims=True)


def _attend_plainly(query_BTNH, key_BSKH, value_BSKG, mask, is_causal, *, scale, softcap, sinks_N):
  """Computes `attend` with a cap and sinks, which JAX's attention lacks."""
  batch, length, _, features = query_BTNH.shape
  slots, kv_heads = key_BSKH.shape[1:3]
  # Query heads that share keys form a group: N becomes [K, N / K].
  query = query_BTNH.reshape(batch, length, kv_heads, -1, features)
  scores = jnp.einsum("btkgh,bskh->bkgts", query, key_BSKH, preferred_element_type=jnp.float32)
  scores *= features**-0.5 if scale is None else scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  seen = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
  if is_causal:
    seen &= jnp.tril(jnp.ones((length, slots), bool))
  # A mask is the same for all heads, whose axis is split in two here.
  scores = jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min)
  if sinks_N is not None:
    sinks = sinks_N.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
    sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, sinks], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1)[..., :slots].astype(value_BSKG.dtype)
  out = jnp.einsum("bkgts,bskc->btkgc", weights, value_BSKG)
  return out.reshape(batch, length, -1, value_BSKG.shape[-1])
