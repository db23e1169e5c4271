"""The text model of Gemma 4: two head sizes, shared keys and values, per-layer embeddings.

    config = gemma4.Gemma4Config(
      vocab_size=256, width=64, mlp_width=192, num_layers=4, num_heads=4, num_kv_heads=2,
      head_dim=16, max_length=128, window=32, local_layers=(True, False, True, False),
      shared_layers=2, per_layer_width=8, per_layer_vocab=256)
    model = gemma4.Gemma4(config)
    params = model.init(jax.random.key(0), tokens_BT)["params"]
    logits_BTV = model.apply({"params": params}, tokens_BT)

    cache = gemma4.init_cache(config, batch_size, max_length, jnp.float32)
    logits_BTV, cache = model.apply({"params": params}, tokens_BT, cache=cache)

The parts shared with Gemma 3 follow Gemma Team 2025, "Gemma 3 Technical Report", arXiv 2503.19786,
section 2. The new parts follow transformers' `Gemma4TextConfig`; see the configuration below.
Layers differ in the shapes of their parameters, so they are never stacked and scanned.

Shapes have the letters of `lora_jax.models.llama`; H and K depend on the kind of the layer. P is
the width of the per-layer embeddings. Norms multiply by their scale, not by 1 + scale.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.models import limits
from lora_jax.models.attention import (
  Cache,
  KVCache,
  Rotation,
  attend,
  rotate,
  segment_positions,
  write,
)
from lora_jax.models.attention_kernels import BY_DEVICE, Choice
from lora_jax.models.decoder import Decoder, check_segments, name_of, rematerialized
from lora_jax.models.rope import rotary_frequencies

_OPTIONAL = {"logit_softcap": float, "per_layer_width": int, "per_layer_vocab": int}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config:
  """The shape of a text model of Gemma 4.

  vocab_size, width, mlp_width, num_layers, num_heads: V, D, E, L and N.
  num_kv_heads, head_dim: K and H of the layers with the window.
  full_kv_heads, full_head_dim: K and H of the layers without it.
  max_length: the longest context that the model was trained for, in tokens; not enforced.
  window: a token of a layer with the window sees only the `window` last tokens, itself included.
  local_layers: for each layer whether it has the window; the last one does not.
  shared_layers: the number of layers at the end without keys and values of their own. They use
    those of the last earlier layer of their kind.
  wide_shared_mlp: the MLPs of these layers are twice as wide, 2 E.
  keys_are_values: in the layers without the window the values are the unrotated, normalized keys,
    and have no kernel.
  per_layer_width: P; None: there are no per-layer embeddings.
  per_layer_vocab: the rows of their table, at least V; None if P is None.
  local_rope_theta, rope_theta: the bases of the rotary frequencies, theta ** (-2 r / H), of the
    layers with the window and of those without it.
  rotary_dim: the number of features of a head that are rotated in the layers without the window:
    the pairs (x[r], x[r + H / 2]) for r below half of it, with the first frequencies of H features.
  norm_eps, logit_softcap, tie_embeddings, attention, remat_policy, constrain, dtype, param_dtype,
    classes: as in `llama_config.LlamaConfig`.
  scan_layers: False, as the layers differ.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  full_kv_heads: int
  full_head_dim: int
  max_length: int
  window: int
  local_layers: tuple[bool, ...]
  rotary_dim: int
  shared_layers: int = 0
  wide_shared_mlp: bool = False
  keys_are_values: bool = False
  per_layer_width: int | None = None
  per_layer_vocab: int | None = None
  rope_theta: float = 1e6
  local_rope_theta: float = 1e4
  norm_eps: float = 1e-6
  logit_softcap: float | None = None
  tie_embeddings: bool = True
  scan_layers: bool = False
  attention: Choice = BY_DEVICE
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "gemma4_text"
  classes: tuple[str, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      kind, value = _OPTIONAL.get(field.name, field.type), getattr(self, field.name)
      if field.name == "shared_layers" and type(value) is int and value == 0:
        continue
      if field.name not in _OPTIONAL or value is not None:
        limits.check("Gemma4Config", field.name, kind, value)
    for name in ("num_kv_heads", "full_kv_heads"):
      if self.num_heads % getattr(self, name):
        raise ValueError(
          f"Gemma4Config: num_heads {self.num_heads} is not a multiple of {name} "
          f"{getattr(self, name)}"
        )
    for name, most in (
      ("head_dim", self.head_dim),
      ("full_head_dim", self.full_head_dim),
      ("rotary_dim", self.full_head_dim),
    ):
      if (size := getattr(self, name)) % 2 or size > most:
        raise ValueError(f"Gemma4Config: {name} {size} must be even and up to {most}")
    if self.scan_layers:
      raise ValueError(
        "scan_layers: the layers of a Gemma 4 have parameters of different shapes and cannot be "
        "stacked; use scan_layers=False"
      )
    if (self.per_layer_width is None) != (self.per_layer_vocab is None):
      raise ValueError(
        "Gemma4Config: per_layer_width and per_layer_vocab are given both or neither"
      )
    if self.per_layer_vocab is not None and self.per_layer_vocab < self.vocab_size:
      raise ValueError(
        f"Gemma4Config: per_layer_vocab {self.per_layer_vocab} is less than the vocab_size "
        f"{self.vocab_size}, and every token has a row of its own for the layers"
      )
    self._check_layers()

  def _check_layers(self) -> None:
    flags = self.local_layers
    if not (
      isinstance(flags, tuple)
      and len(flags) == self.num_layers
      and all(type(x) is bool for x in flags)
      and not flags[-1]
    ):
      raise ValueError(
        f"Gemma4Config: local_layers {flags!r:.40} must be True or False for each of the "
        f"{self.num_layers} layers, and False for the last"
      )
    own = self.num_layers - self.shared_layers
    if own < 1 or not {*flags[own:]} <= {*flags[:own]}:
      raise ValueError(
        f"Gemma4Config: the last {self.shared_layers} of {self.num_layers} layers share keys and "
        "values, and no layer before them has some of each kind"
      )


def sources(config: Gemma4Config) -> tuple[int, ...]:
  """For each layer the number of the layer whose keys and values it uses, usually its own."""
  own, found = config.num_layers - config.shared_layers, []
  for i, local in enumerate(config.local_layers):
    alike = [n for n in range(min(i + 1, own)) if config.local_layers[n] == local]
    found.append(alike[-1])
  return tuple(found)


def init_cache(
  config: Gemma4Config, batch_size: int, max_length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
  """Returns an empty cache of the layers that have keys and values.

  Arguments are as in `lora_jax.models.attention.init_cache`.
  """
  cache = {}
  for i in sorted({*sources(config)}):
    heads, features = _head_sizes(config, config.local_layers[i])
    shape = batch_size, max_length, heads, features
    cache[f"block_{i}"] = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
  return cache


def _head_sizes(config: Gemma4Config, local: bool) -> tuple[int, int]:
  """K and H of a layer."""
  if local:
    return config.num_kv_heads, config.head_dim
  return config.full_kv_heads, config.full_head_dim


def _dense(config: Gemma4Config, features: int, name: str | None) -> nn.Dense:
  return nn.Dense(
    features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _norm(config: Gemma4Config, name: str | None, use_scale: bool = True) -> nn.RMSNorm:
  return nn.RMSNorm(
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_scale=use_scale,
    name=name,
  )


def _gelu(x: jax.Array) -> jax.Array:
  return nn.gelu(x, approximate=True)


def _rotation(config: Gemma4Config, positions_BT: jax.Array, local: bool) -> Rotation:
  """cos and sin of each position; unrotated features have frequency zero."""
  if local:
    frequencies_R = rotary_frequencies(config.local_rope_theta, config.head_dim)
  else:
    frequencies_R = rotary_frequencies(config.rope_theta, config.full_head_dim)
    frequencies_R = np.where(
      np.arange(len(frequencies_R)) < config.rotary_dim // 2, frequencies_R, 0
    )
  angles_BTR = positions_BT[..., None] * jnp.asarray(frequencies_R, jnp.float32)
  return Rotation(jnp.cos(angles_BTR), jnp.sin(angles_BTR))


class Attention(nn.Module):
  """Causal grouped-query attention with normalized queries, keys and values, and unscaled scores.

  layer: its number, from 0.
  cache: its own, or that of the layer whose keys and values it uses; None: there is no cache.
  seen: the keys and values of that layer, without a cache; None: it has its own.

  Returns its output, and its keys and values or the updated cache.
  """

  config: Gemma4Config
  layer: int

  @nn.compact
  def __call__(
    self,
    x_BTD,
    positions_BT,
    turn: Rotation,
    segments_BT,
    cache: KVCache | None,
    seen: KVCache | None,
  ):
    c, local = self.config, self.config.local_layers[self.layer]
    kv_heads, features = _head_sizes(c, local)

    def heads(name, count):
      return _dense(c, count * features, name)(x_BTD).reshape(*x_BTD.shape[:2], count, features)

    query_BTNH = rotate(_norm(c, "query_norm")(heads("query", c.num_heads)), turn)
    if sources(c)[self.layer] == self.layer:
      key_BTKH = heads("key", kv_heads)
      is_key = c.keys_are_values and not local
      value_BTKH = key_BTKH if is_key else heads("value", kv_heads)
      key_BTKH = rotate(_norm(c, "key_norm")(key_BTKH), turn)
      value_BTKH = _norm(c, "value_norm", use_scale=False)(value_BTKH)
      seen = KVCache(key_BTKH, value_BTKH)
      if cache is not None:
        cache = write(cache, positions_BT, *seen)

    held = cache or seen
    assert held is not None  # a layer without keys of its own is after their source
    out_BTNH = attend(
      query_BTNH,
      held.key_BSKH.astype(c.dtype),
      held.value_BSKG.astype(c.dtype),
      is_causal=cache is None,
      window=c.window if local else None,
      segments_BT=segments_BT,
      positions_BT=None if cache is None else positions_BT,
      scale=1.0,
      choice=c.attention,
    )
    return _dense(c, c.width, "out")(out_BTNH.reshape(*x_BTD.shape[:2], -1)), held


class Mlp(nn.Module):
  """GeGLU, down(gelu(gate(x)) * up(x)) (Shazeer 2020, section 2)."""

  config: Gemma4Config
  features: int

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    gate_BTE, up_BTE = (_dense(c, self.features, name)(x_BTD) for name in ("gate", "up"))
    return _dense(c, c.width, "down")(_gelu(gate_BTE) * up_BTE)


class Block(nn.Module):
  """One layer: attention, the MLP and the per-layer embedding, each between norms.

  layer, cache, seen: as in `Attention`.
  per_layer_BTP: the layer's own embedding of each token, or None.
  """

  config: Gemma4Config
  layer: int

  @nn.compact
  def __call__(self, x_BTD, per_layer_BTP, positions_BT, turn: Rotation, segments_BT, cache, seen):
    c = self.config
    added_BTD, held = Attention(c, self.layer, name="attn")(
      _norm(c, "attn_norm")(x_BTD), positions_BT, turn, segments_BT, cache, seen
    )
    x_BTD = x_BTD + _norm(c, "attn_post_norm")(added_BTD)
    is_wide = c.wide_shared_mlp and self.layer >= c.num_layers - c.shared_layers
    mlp = Mlp(c, c.mlp_width * (1 + is_wide), name="mlp")
    x_BTD = x_BTD + _norm(c, "mlp_post_norm")(mlp(_norm(c, "mlp_norm")(x_BTD)))
    if per_layer_BTP is not None:
      assert c.per_layer_width is not None
      gate_BTP = _gelu(_dense(c, c.per_layer_width, "per_layer_gate")(x_BTD))
      added_BTD = _dense(c, c.width, "per_layer_out")(gate_BTP * per_layer_BTP)
      x_BTD = x_BTD + _norm(c, "per_layer_norm")(added_BTD)
    x_BTD *= self.param("scalar", nn.initializers.ones, (1,), c.param_dtype).astype(c.dtype)
    return c.constrain(x_BTD) if c.constrain else x_BTD, held


class Gemma4(Decoder):
  """A decoder with the interface of `lora_jax.models.decoder.Decoder`."""

  config: Gemma4Config

  def setup(self):
    c = self.config
    embed = functools.partial(nn.Embed, dtype=c.dtype, param_dtype=c.param_dtype)
    self.embed = embed(c.vocab_size, c.width)
    if c.per_layer_width is not None:
      assert c.per_layer_vocab is not None  # the config has both or none
      features = c.num_layers * c.per_layer_width
      self.embed_per_layer = embed(c.per_layer_vocab, features)
      self.per_layer_model = _dense(c, features, None)
      self.per_layer_norm = _norm(c, None)
    block = rematerialized(Block, c)
    self.block = [block(c, i) for i in range(c.num_layers)]
    self.norm = _norm(c, None)
    if c.classes or not c.tie_embeddings:
      self.head = _dense(c, len(c.classes) or c.vocab_size, None)

  def hidden(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, at_BC=None, cache: Cache | None = None
  ):
    """The normalized hidden states, which the head is applied to; arguments as in a call."""
    c = self.config
    check_segments(segments_BT, cache)
    if positions_BT is None:
      positions_BT = segment_positions(tokens_BT, segments_BT)
    turns = {local: _rotation(c, positions_BT, local) for local in {*c.local_layers}}
    x_BTD = self.embed(tokens_BT)
    x_BTD = x_BTD * jnp.asarray(math.sqrt(c.width), x_BTD.dtype)
    per_layer_BTLP = self._per_layer(tokens_BT, x_BTD)
    x_BTD = c.constrain(x_BTD) if c.constrain else x_BTD

    held = {} if cache is None else {i: cache[name_of(self.block[i])] for i in sources(c)}
    for i, (block, source) in enumerate(zip(self.block, sources(c), strict=True)):
      own_BTP = None if per_layer_BTLP is None else per_layer_BTLP[:, :, i]
      of_cache, seen = (held.get(source), None) if cache else (None, held.get(source))
      x_BTD, held[source] = block(
        x_BTD, own_BTP, positions_BT, turns[c.local_layers[i]], segments_BT, of_cache, seen
      )

    if at_BC is not None:
      x_BTD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1)
    x_BTD = self.norm(x_BTD)
    if cache is None:
      return x_BTD
    return x_BTD, {self.block[i].name: held[i] for i in sorted(held)}

  def logits(self, hidden_BTD):
    """The head."""
    c = self.config
    if c.classes:
      return self.head(hidden_BTD)
    logits = self.embed.attend(hidden_BTD) if c.tie_embeddings else self.head(hidden_BTD)
    cap = c.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def _per_layer(self, tokens_BT, x_BTD):
    """The input of each layer for each token: a row of a table plus a projected embedding."""
    c = self.config
    if c.per_layer_width is None:
      return None
    shape = (*tokens_BT.shape, c.num_layers, c.per_layer_width)
    rows = self.embed_per_layer(tokens_BT)
    rows = rows * jnp.asarray(math.sqrt(c.per_layer_width), rows.dtype)
    projected = self.per_layer_model(x_BTD) * jnp.asarray(c.width**-0.5, x_BTD.dtype)
    projected = self.per_layer_norm(projected.reshape(shape))
    return (projected + rows.reshape(shape)) * jnp.asarray(0.5**0.5, x_BTD.dtype)
