"""Decoders of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    config = llama.LlamaConfig(vocab_size=256, width=64, mlp_width=192, num_layers=2, num_heads=4,
                               num_kv_heads=2, head_dim=16, max_length=128)
    model = llama.Llama(config)
    params = model.init(jax.random.key(0), tokens_BT)["params"]
    logits_BTV = model.apply({"params": params}, tokens_BT)

    cache = llama.init_cache(config, batch_size, max_length, jnp.float32)
    logits_BTV, cache = model.apply({"params": params}, tokens_BT, cache=cache)

    hidden_BTD = model.apply({"params": params}, tokens_BT, method="hidden")
    logits_BTV = model.apply({"params": params}, hidden_BTD, method="logits")

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (section 2.2), and its
grouped-query successors. Qwen 2 and 3, Mistral, Gemma 2 and 3 and others are the same program with
switches of the configuration (`lora_jax.models.llama_config`). Shapes are written as suffixes:

    B batch        T tokens of a call    S slots of the cache    C chosen positions
    D width        E width of the MLP    V vocabulary            H features of a head
    N query heads  K key/value heads     R rotations, H / 2      L layers
    G features of a head's values, equal to H unless the model was compressed
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.attention import (
  Cache,
  KVCache,
  Rotation,
  attend,
  init_cache,
  room,
  rotate,
  rotation,
  segment_positions,
  write,
)
from lora_jax.models.decoder import Decoder, check_segments, name_of, rematerialized, scanned
from lora_jax.models.experts import ExpertConfig, Experts
from lora_jax.models.llama_config import (
  LlamaConfig,
  layer_config,
  layer_kinds,
  value_features,
)
from lora_jax.models.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope

__all__ = [
  "Attention",
  "Block",
  "Cache",
  "DynamicRope",
  "ExpertConfig",
  "KVCache",
  "LinearRope",
  "Llama",
  "Llama3Rope",
  "LlamaConfig",
  "LongRope",
  "Mlp",
  "Rotation",
  "YarnRope",
  "init_cache",
  "rotate",
  "rotation",
  "value_features",
]


def _dense(
  config: LlamaConfig, features: int, name: str | None, use_bias: bool = False
) -> nn.Dense:
  return nn.Dense(
    features, use_bias=use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


class OffsetNorm(nn.Module):
  """RMSNorm that multiplies by 1 + scale, in float32."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], c.param_dtype)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + c.norm_eps)
    return (y * (1 + scale.astype(jnp.float32))).astype(c.dtype)


def _norm(config: LlamaConfig, name: str | None) -> nn.Module:
  if config.unit_offset:
    return OffsetNorm(config, name=name)
  return nn.RMSNorm(
    epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _times(factor: float | None, x: jax.Array) -> jax.Array:
  return x if factor is None else x * jnp.asarray(factor, x.dtype)


def _parts(joined: jax.Array, widths: list[int]) -> list[jax.Array]:
  """Splits the output of a fused kernel into its consecutive parts."""
  ends = np.cumsum(widths)
  return [joined[..., end - width : end] for end, width in zip(ends, widths, strict=True)]


def _kinds(config: LlamaConfig) -> list[tuple[bool, bool]]:
  """The distinct kinds of layers."""
  return sorted({*layer_kinds(config)})


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions.

  segments_BT: the text of each token, which sees only its own text; None: one text per row.
  kind: the index of this layer's kind in `layer_kinds`, if scanned layers differ; `turn` then has a
    leading axis of kinds. None: all layers have the same configuration.
  """

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x_BTD, positions_BT, turn: Rotation, segments_BT, cache: KVCache | None, kind=None
  ):
    c, window = self.config, self.config.window
    if kind is not None:
      turn = jax.tree.map(lambda each: each[kind], turn)
      if window is not None:
        everywhere = jnp.iinfo(jnp.int32).max
        window = jnp.asarray([c.window if x else everywhere for x, _ in _kinds(c)])[kind]

    query_BTNH, key_BTKH, value_BTKG = self._projected(x_BTD)
    query_BTNH, key_BTKH = rotate(query_BTNH, turn), rotate(key_BTKH, turn)
    if turn.query_BT is not None:
      query_BTNH *= turn.query_BT[..., None, None].astype(c.dtype)

    scale = c.attention_multiplier if c.query_divisor is None else c.query_divisor**-0.5
    options = {"scale": scale, "softcap": c.attn_softcap, "window": window}
    if c.attn_sinks:
      sinks = nn.initializers.zeros
      options["sinks_N"] = self.param("sinks", sinks, (c.num_heads,), c.param_dtype)
    if cache is None:
      options |= {"is_causal": True, "segments_BT": segments_BT}
      key_BSKH, value_BSKG = key_BTKH, value_BTKG
    else:
      cache = write(cache, positions_BT, key_BTKH, value_BTKG)
      options["positions_BT"] = positions_BT
      key_BSKH, value_BSKG = cache.key_BSKH.astype(c.dtype), cache.value_BSKG.astype(c.dtype)
    out_BTNG = attend(query_BTNH, key_BSKH, value_BSKG, choice=c.attention, **options)
    out_BTD = _dense(c, c.width, "out", c.out_bias)(out_BTNG.reshape(*x_BTD.shape[:2], -1))
    return out_BTD, cache

  def _projected(self, x_BTD):
    """Queries, keys and values per head, before rotation."""
    c = self.config
    shapes = {
      "query": (c.num_heads, c.head_dim),
      "key": (c.num_kv_heads, c.head_dim),
      "value": (c.num_kv_heads, value_features(c)),
    }
    widths = [heads * features for heads, features in shapes.values()]
    if c.fused:
      parts = _parts(_dense(c, sum(widths), "qkv", c.qkv_bias)(x_BTD), widths)
    else:
      parts = [
        _dense(c, width, name, c.qkv_bias)(x_BTD)
        for name, width in zip(shapes, widths, strict=True)
      ]
    found = []
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
      norm = _norm(c, f"{name}_norm") if c.qk_norm and name != "value" else None
      if norm is not None and c.whole_qk_norm:
        part, norm = norm(part), None
      part = part.reshape(*part.shape[:2], *shape)
      found.append(part if norm is None else norm(part))
    return found


class Mlp(nn.Module):
  """SwiGLU, down(silu(gate(x)) * up(x)), or GeGLU (Shazeer 2020, section 2)."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    if c.fused:
      gate_BTE, up_BTE = _parts(_dense(c, 2 * c.mlp_width, "gate_up")(x_BTD), [c.mlp_width] * 2)
    else:
      gate_BTE = _dense(c, c.mlp_width, "gate")(x_BTD)
      up_BTE = _dense(c, c.mlp_width, "up")(x_BTD)
    act = nn.silu if c.activation == "silu" else functools.partial(nn.gelu, approximate=True)
    return _dense(c, c.width, "down")(act(gate_BTE) * up_BTE)


def _mlp(config: LlamaConfig) -> nn.Module:
  if config.experts is None:
    return Mlp(config, name="mlp")
  return Experts(config.experts, config.dtype, config.param_dtype, name="mlp")


class Block(nn.Module):
  """One layer: attention, then the MLP, each after a norm and added to the residual stream."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x_BTD, positions_BT, turn: Rotation, segments_BT, cache: KVCache | None, kind=None
  ):
    c = self.config

    def taken(name, x_BTD):
      return _norm(c, f"{name}_norm")(x_BTD) if c.pre_norms else x_BTD

    def with_(name, x_BTD, added_BTD):
      added_BTD = _norm(c, f"{name}_post_norm")(added_BTD) if c.post_norms else added_BTD
      return x_BTD + _times(c.residual_multiplier, added_BTD)

    added_BTD, cache = Attention(c, name="attn")(
      taken("attn", x_BTD), positions_BT, turn, segments_BT, cache, kind
    )
    x_BTD = with_("attn", x_BTD, added_BTD)
    x_BTD = with_("mlp", x_BTD, _mlp(c)(taken("mlp", x_BTD)))
    return c.constrain(x_BTD) if c.constrain else x_BTD, cache


class Llama(Decoder):
  """A decoder of the family with the interface of `lora_jax.models.decoder.Decoder`."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    block = rematerialized(Block, c)
    if c.scan_layers:
      config = c if self._differ else layer_config(c, _kinds(c)[0][0])
      self.blocks = scanned(block, c, shared=3)(config)
    else:  # their names are block_0, block_1, ...
      self.block = [block(layer_config(c, local)) for local, _ in layer_kinds(c)]
    self.norm = _norm(c, None)
    if c.classes or not c.tie_embeddings:
      self.head = _dense(c, len(c.classes) or c.vocab_size, None)

  def hidden(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, at_BC=None, cache: Cache | None = None
  ):
    """The normalized hidden states, which the head is applied to; arguments as in a call."""
    check_segments(segments_BT, cache)
    c, kinds_L = self.config, layer_kinds(self.config)
    length = room(c, positions_BT, segments_BT, tokens_BT.shape[1], cache)
    if positions_BT is None:
      positions_BT = segment_positions(tokens_BT, segments_BT)
    turns = {
      (local, rotated): rotation(layer_config(c, local), positions_BT, length, rotated)
      for local, rotated in _kinds(c)
    }
    x_BTD = self.embed(tokens_BT)
    x_BTD = _times(math.sqrt(c.width) if c.scale_embeddings else c.embedding_multiplier, x_BTD)
    x_BTD = c.constrain(x_BTD) if c.constrain else x_BTD

    if c.scan_layers:
      turn, numbers_L = turns[kinds_L[0]], None
      if self._differ:
        turn = jax.tree.map(lambda *each: jnp.stack(each), *turns.values())
        numbers_L = jnp.asarray([_kinds(c).index(kind) for kind in kinds_L], jnp.int32)
      layers = None if cache is None else cache["blocks"]
      x_BTD, layers = self.blocks(x_BTD, positions_BT, turn, segments_BT, layers, numbers_L)
      new_cache = {"blocks": layers}
    else:
      new_cache = {}
      for block, kind in zip(self.block, kinds_L, strict=True):
        layer = None if cache is None else cache[name_of(block)]
        x_BTD, new_cache[name_of(block)] = block(
          x_BTD, positions_BT, turns[kind], segments_BT, layer
        )

    if at_BC is not None:
      x_BTD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1)
    x_BTD = self.norm(x_BTD)
    return x_BTD if cache is None else (x_BTD, new_cache)

  def logits(self, hidden_BTD):
    """The head."""
    c = self.config
    if c.classes:
      return self.head(hidden_BTD)
    logits = self.embed.attend(hidden_BTD) if c.tie_embeddings else self.head(hidden_BTD)
    logits = logits if c.logit_divisor is None else logits / c.logit_divisor
    return (
      logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
    )

  @property
  def _differ(self) -> bool:
    """Whether layers differ in their window or rotation."""
    return len(_kinds(self.config)) > 1
