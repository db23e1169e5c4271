"""GPT-2: learned positions, pre-LayerNorm, and attention with one fused kernel.

    config = gpt2.GPT2Config(vocab_size=50257, width=768, mlp_width=3072, num_layers=12,
                             num_heads=12, head_dim=64, max_length=1024)
    model = gpt2.GPT2(config)
    params = model.init(jax.random.key(0), tokens_BT)["params"]
    logits_BTV = model.apply({"params": params}, tokens_BT)

    cache = gpt2.init_cache(config, batch_size, max_length, jnp.float32)
    logits_BTV, cache = model.apply({"params": params}, tokens_BT, cache=cache)

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (section 2.3).
Shapes have the letters of `lora_jax.models.llama`. Every head has its own keys and values, so G = H
and K = N. P is the number of learned positions.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import limits
from lora_jax.models.attention import (
  Cache,
  KVCache,
  attend,
  empty_cache,
  segment_positions,
  write,
)
from lora_jax.models.attention_kernels import BY_DEVICE, Choice
from lora_jax.models.decoder import Decoder, check_segments, name_of, rematerialized, scanned

ACTIVATIONS = ("gelu_tanh", "gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
  """The shape of a GPT-2 and how it is computed.

  vocab_size, width, mlp_width, num_layers, num_heads, head_dim: V, D, E, L, N and H. In files
    N H = D.
  max_length: P, the positions that have an embedding. Texts cannot be longer.
  norm_eps: added to the variance in LayerNorm.
  activation: of the MLP, "gelu_tanh" or "gelu" (Hendrycks and Gimpel 2016; Cerebras-GPT).
  scale_scores: scores are divided by the square root of a head's features.
  scale_by_layer: scores are also divided by the number of the layer, counted from 1 (Mistral's
    GPT-2 of Stanford CRFM).
  tie_embeddings: the head is the transposed embedding and has no parameters.
  scan_layers, remat_policy, constrain, attention, dtype, param_dtype, classes: as in
    `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  head_dim: int
  max_length: int
  norm_eps: float = 1e-5
  activation: str = "gelu_tanh"
  scale_scores: bool = True
  scale_by_layer: bool = False
  tie_embeddings: bool = True
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  attention: Choice = BY_DEVICE
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "gpt2"
  classes: tuple[str, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("GPT2Config", field.name, field.type, getattr(self, field.name))
    if self.max_length > limits.MOST_LEARNED_POSITIONS:
      raise ValueError(
        f"GPT2Config: max_length {self.max_length} is over the limit of "
        f"{limits.MOST_LEARNED_POSITIONS:,} learned positions"
      )
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"GPT2Config: activation {self.activation!r:.40} is not one of {', '.join(ACTIVATIONS)}"
      )


def init_cache(
  config: GPT2Config, batch_size: int, max_length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
  """Returns an empty cache; arguments as in `lora_jax.models.attention.init_cache`.

  Raises ValueError for more slots than the model has positions.
  """
  if max_length > config.max_length:
    raise ValueError(
      f"a cache of {max_length:,} slots: the model has learned {config.max_length:,} positions "
      "(n_positions), and no text can be longer; use fewer slots"
    )
  shape = (batch_size, max_length, config.num_heads, config.head_dim)
  return empty_cache(config.num_layers, shape, shape, dtype, stacked=config.scan_layers)


def _dense(config: GPT2Config, features: int, name: str | None, use_bias: bool = True) -> nn.Dense:
  return nn.Dense(
    features, use_bias=use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _norm(config: GPT2Config, name: str | None) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,  # some features are hundreds of times larger than others
    name=name,
  )


class Attention(nn.Module):
  """Causal attention whose queries, keys and values are the thirds of one product, F = 3 N H.

  segments_BT: the text of each token, which sees only its own text; None: one text per row.
  layer: the number of this layer, from 0.
  """

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT, cache: KVCache | None, layer):
    c = self.config
    fused_BTF = _dense(c, 3 * c.num_heads * c.head_dim, "qkv")(x_BTD)
    query_BTNH, key_BTNH, value_BTNH = (
      each.reshape(*x_BTD.shape[:2], c.num_heads, c.head_dim)
      for each in jnp.split(fused_BTF, 3, axis=-1)
    )
    if c.scale_by_layer:
      query_BTNH /= jnp.asarray(layer + 1, c.dtype)
    scale = None if c.scale_scores else 1.0
    if cache is None:
      options = {"is_causal": True, "segments_BT": segments_BT}
    else:
      cache = write(cache, positions_BT, key_BTNH, value_BTNH)
      options = {"positions_BT": positions_BT}
      key_BTNH, value_BTNH = cache.key_BSKH.astype(c.dtype), cache.value_BSKG.astype(c.dtype)
    out_BTNH = attend(query_BTNH, key_BTNH, value_BTNH, scale=scale, choice=c.attention, **options)
    return _dense(c, c.width, "out")(out_BTNH.reshape(*x_BTD.shape[:2], -1)), cache


class Mlp(nn.Module):
  """down(gelu(up(x)))."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    up_BTE = _dense(c, c.mlp_width, "up")(x_BTD)
    return _dense(c, c.width, "down")(nn.gelu(up_BTE, approximate=c.activation == "gelu_tanh"))


class Block(nn.Module):
  """One layer: attention, then the MLP, each after a norm and added to the residual stream."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT, cache: KVCache | None, layer):
    c = self.config
    added_BTD, cache = Attention(c, name="attn")(
      _norm(c, "attn_norm")(x_BTD), positions_BT, segments_BT, cache, layer
    )
    x_BTD = x_BTD + added_BTD
    x_BTD = x_BTD + Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x_BTD))
    return c.constrain(x_BTD) if c.constrain else x_BTD, cache


class GPT2(Decoder):
  """A decoder with the interface of `lora_jax.models.decoder.Decoder`.

  A row of more than P tokens is refused unless it holds several texts (`segments_BT`). Shapes do
  not reveal positions of P or more in segments or with a cache. The outputs there are NaN, and
  without a cache so is the rest of the row.
  """

  config: GPT2Config

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.positions = nn.Embed(c.max_length, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    block = rematerialized(Block, c)
    if c.scan_layers:
      self.blocks = scanned(block, c, shared=2)(c)
    else:  # their names are block_0, block_1, ...
      self.block = [block(c) for _ in range(c.num_layers)]
    self.norm = _norm(c, None)
    if c.classes or not c.tie_embeddings:
      self.head = _dense(c, len(c.classes) or c.vocab_size, None, use_bias=False)

  def hidden(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, at_BC=None, cache: Cache | None = None
  ):
    """The normalized hidden states, which the head is applied to; arguments as in a call."""
    c = self.config
    check_segments(segments_BT, cache)
    if segments_BT is None and tokens_BT.shape[1] > c.max_length:
      raise ValueError(
        f"tokens_BT: rows of {tokens_BT.shape[1]:,} tokens, and the model has learned "
        f"{c.max_length:,} positions (n_positions); use shorter texts"
      )
    if positions_BT is None:
      positions_BT = segment_positions(tokens_BT, segments_BT)
    x_BTD = self.embed(tokens_BT) + self.positions(positions_BT)
    x_BTD = c.constrain(x_BTD) if c.constrain else x_BTD

    if c.scan_layers:
      layers = None if cache is None else cache["blocks"]
      numbers_L = jnp.arange(c.num_layers)
      x_BTD, layers = self.blocks(x_BTD, positions_BT, segments_BT, layers, numbers_L)
      new_cache = {"blocks": layers}
    else:
      new_cache = {}
      for i, block in enumerate(self.block):
        layer = None if cache is None else cache[name_of(block)]
        x_BTD, new_cache[name_of(block)] = block(x_BTD, positions_BT, segments_BT, layer, i)

    if at_BC is not None:
      x_BTD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1)
    x_BTD = self.norm(x_BTD)
    return x_BTD if cache is None else (x_BTD, new_cache)

  def logits(self, hidden_BTD):
    """The head."""
    tied = self.config.tie_embeddings and not self.config.classes
    return self.embed.attend(hidden_BTD) if tied else self.head(hidden_BTD)
