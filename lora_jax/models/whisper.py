"""Whisper: an encoder over log-mel frames, and a decoder with self and cross attention.

    config = whisper.WhisperConfig(vocab_size=51864, width=384, mlp_width=1536, num_layers=4,
                                   decoder_layers=4, num_heads=6, head_dim=64)
    model = whisper.Whisper(config)
    params = model.init(jax.random.key(0), mels_BTM, tokens_BU)["params"]
    logits_BUV = model.apply({"params": params}, mels_BTM, tokens_BU)

    frames_BSD = model.apply({"params": params}, mels_BTM, method="frames")
    cache = model.apply({"params": params}, frames_BSD, slots=64, method="start")
    logits_BUV, cache = model.apply({"params": params}, tokens_BU, cache=cache, method="read")

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision" (section 2.2).

Shapes: B clips; T log-mel frames of 10 ms and M mel bands; S = T / 2 encoder frames; U tokens; V
vocabulary; D width; E width of the MLP; N heads of H features; K classes of a head on the frames.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import limits
from lora_jax.models.attention import KVCache, attend, write
from lora_jax.models.decoder import rematerialized

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
  """The shape of a Whisper and how it is computed.

  vocab_size, width, mlp_width, num_heads, head_dim: V, D, E, N and H. In files N H = D.
  num_layers, decoder_layers: of the encoder and of the decoder.
  max_length: the positions of tokens that have an embedding. Texts cannot be longer.
  max_frames: the positions of encoder frames that have an embedding, 20 ms each. A shorter window
    takes the first of them.
  mels: M.
  activation: of the MLP, one of `ACTIVATIONS`; that of the convolutions is always GELU.
  classes: the names of the outputs of a head on the encoder's frames; such a model has no decoder.
    () for a Whisper, whose logits are products with the embeddings of tokens.
  scan_layers: False; the layers of encoder and decoder are apart.
  remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for stacked layers.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  decoder_layers: int
  num_heads: int
  head_dim: int
  max_length: int = 448
  max_frames: int = 1500
  mels: int = 80
  activation: str = "gelu"
  classes: tuple[str, ...] = ()
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "whisper"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("WhisperConfig", field.name, field.type, getattr(self, field.name))
    limits.check_choice("WhisperConfig", "activation", self.activation, ACTIVATIONS)
    limits.check_separate_layers(
      "WhisperConfig", num_layers=self.num_layers, decoder_layers=self.decoder_layers
    )
    for name in ("max_length", "max_frames"):
      if getattr(self, name) > limits.MOST_LEARNED_POSITIONS:
        raise ValueError(
          f"WhisperConfig: {name} {getattr(self, name)} is over the limit of "
          f"{limits.MOST_LEARNED_POSITIONS:,} learned positions"
        )
    if self.scan_layers:
      raise ValueError(
        "WhisperConfig: the layers of encoder and decoder differ and cannot be stacked; set "
        "scan_layers to False"
      )

  @property
  def max_samples(self) -> int:
    """The samples at 16 kHz of the longest clip."""
    return 2 * self.max_frames * 160

  def frames_of(self, samples: int) -> int:
    """The encoder frames of so many samples."""
    return -(-samples // 320)


class DecoderCache(NamedTuple):
  """The cache of one decoder layer: the tokens before, and the encoder's frames."""

  own: KVCache
  cross: KVCache


def _dense(config: WhisperConfig, features: int, name: str | None, use_bias: bool = True):
  return nn.Dense(
    features, use_bias=use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _norm(config: WhisperConfig, name: str | None) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=1e-5,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,  # some features are hundreds of times larger than others
    name=name,
  )


class Attention(nn.Module):
  """Attention of a sequence over itself, or over the encoder's frames; keys have no bias."""

  config: WhisperConfig

  def setup(self):
    c = self.config
    features = c.num_heads * c.head_dim
    self.query = _dense(c, features, None)
    self.key = _dense(c, features, None, use_bias=False)
    self.value = _dense(c, features, None)
    self.out = _dense(c, c.width, None)

  def _heads(self, x):
    return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)

  def pairs(self, x_BSD) -> KVCache:
    """The keys and values of a sequence."""
    return KVCache(self._heads(self.key(x_BSD)), self._heads(self.value(x_BSD)))

  def over(self, x_BUD, pairs: KVCache, **sight):
    """Attends to keys and values; `sight` restricts it, as in `attend`."""
    dtype = self.config.dtype
    out_BUNH = attend(self._heads(self.query(x_BUD)), *(x.astype(dtype) for x in pairs), **sight)
    return self.out(out_BUNH.reshape(*x_BUD.shape[:2], -1))


class Mlp(nn.Module):
  """down(activation(up(x)))."""

  config: WhisperConfig

  @nn.compact
  def __call__(self, x_BUD):
    c = self.config
    up_BUE = _dense(c, c.mlp_width, "up")(x_BUD)
    if c.activation == "relu":
      return _dense(c, c.width, "down")(nn.relu(up_BUE))
    return _dense(c, c.width, "down")(nn.gelu(up_BUE, approximate=c.activation == "gelu_tanh"))


class EncoderBlock(nn.Module):
  """One layer of the encoder: bidirectional attention, then the MLP, each after a norm."""

  config: WhisperConfig

  @nn.compact
  def __call__(self, x_BSD):
    c = self.config
    attn, normed_BSD = Attention(c, name="attn"), _norm(c, "attn_norm")(x_BSD)
    x_BSD = x_BSD + attn.over(normed_BSD, attn.pairs(normed_BSD))
    x_BSD = x_BSD + Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x_BSD))
    return c.constrain(x_BSD) if c.constrain else x_BSD


class DecoderBlock(nn.Module):
  """One layer of the decoder: causal attention, attention over the frames, then the MLP.

  Without a cache the layer attends to `frames_BSD`; with one it writes the keys and values of the
  tokens at their positions, and takes those of the frames as they are.
  """

  config: WhisperConfig

  def setup(self):
    c = self.config
    self.attn_norm, self.attn = _norm(c, None), Attention(c)
    self.cross_attn_norm, self.cross_attn = _norm(c, None), Attention(c)
    self.mlp_norm, self.mlp = _norm(c, None), Mlp(c)

  def __call__(self, x_BUD, positions_BU, frames_BSD, cache: DecoderCache | None):
    c = self.config
    normed_BUD = self.attn_norm(x_BUD)
    pairs = self.attn.pairs(normed_BUD)
    if cache is None:
      own, cross, sight = pairs, self.cross_attn.pairs(frames_BSD), {"is_causal": True}
    else:
      own, cross = write(cache.own, positions_BU, *pairs), cache.cross
      cache, sight = DecoderCache(own, cross), {"positions_BT": positions_BU}
    x_BUD = x_BUD + self.attn.over(normed_BUD, own, **sight)
    x_BUD = x_BUD + self.cross_attn.over(self.cross_attn_norm(x_BUD), cross)
    x_BUD = x_BUD + self.mlp(self.mlp_norm(x_BUD))
    return c.constrain(x_BUD) if c.constrain else x_BUD, cache

  def start(self, frames_BSD, slots: int) -> DecoderCache:
    """The cache before the first token."""
    c = self.config
    shape = (len(frames_BSD), slots, c.num_heads, c.head_dim)
    empty = KVCache(*(jnp.zeros(shape, c.dtype) for _ in range(2)))
    return DecoderCache(empty, self.cross_attn.pairs(frames_BSD))


class Encoder(nn.Module):
  """Two convolutions, the second of which halves the frames, positions, and the layers."""

  config: WhisperConfig

  def setup(self):
    c = self.config
    kernel = {"padding": 1, "dtype": c.dtype, "param_dtype": c.param_dtype}
    self.conv1 = nn.Conv(c.width, (3,), **kernel)
    self.conv2 = nn.Conv(c.width, (3,), strides=2, **kernel)
    self.positions = nn.Embed(c.max_frames, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.block = [rematerialized(EncoderBlock, c)(c) for _ in range(c.num_layers)]
    self.norm = _norm(c, None)

  def __call__(self, mels_BTM):
    c = self.config
    x_BSD = mels_BTM.astype(c.dtype)
    for conv in (self.conv1, self.conv2):
      x_BSD = nn.gelu(conv(x_BSD), approximate=False)
    x_BSD = x_BSD + self.positions(jnp.arange(x_BSD.shape[1]))
    x_BSD = c.constrain(x_BSD) if c.constrain else x_BSD
    for block in self.block:
      x_BSD = block(x_BSD)
    return self.norm(x_BSD)


class Decoder(nn.Module):
  """Embeddings of tokens and positions, the layers, and logits over the vocabulary."""

  config: WhisperConfig

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.positions = nn.Embed(c.max_length, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.block = [rematerialized(DecoderBlock, c)(c) for _ in range(c.decoder_layers)]
    self.norm = _norm(c, None)

  def __call__(self, tokens_BU, frames_BSD, positions_BU, at_BC, cache):
    c = self.config
    x_BUD = self.embed(tokens_BU) + self.positions(positions_BU)
    x_BUD = c.constrain(x_BUD) if c.constrain else x_BUD
    new_cache = {}
    for name, block in self._named():
      layer = None if cache is None else cache[name]
      x_BUD, new_cache[name] = block(x_BUD, positions_BU, frames_BSD, layer)
    if at_BC is not None:
      x_BUD = jnp.take_along_axis(x_BUD, at_BC[..., None], axis=1)
    logits_BUV = self.embed.attend(self.norm(x_BUD))
    return logits_BUV if cache is None else (logits_BUV, new_cache)

  def start(self, frames_BSD, slots: int) -> dict[str, DecoderCache]:
    return {name: block.start(frames_BSD, slots) for name, block in self._named()}

  def _named(self) -> Iterator[tuple[str, Any]]:
    """The layers by their names in the tree and in the cache."""
    return ((f"block_{n}", block) for n, block in enumerate(self.block))


class Whisper(nn.Module):
  """A Whisper: log-mel frames and the tokens before, to the logits of the next token.

  mels_BTM: from `lora_jax.data.log_mel`; T is even and at most twice `max_frames`.
  tokens_BU: token ids, padded on the right with anything; not for a model with a head of classes,
    whose call returns the logits of each frame, [B, S, K].
  """

  config: WhisperConfig

  def setup(self):
    c = self.config
    self.encoder = Encoder(c)
    if c.classes:
      self.head = _dense(c, len(c.classes), None)
    else:
      self.decoder = Decoder(c)

  def __call__(self, mels_BTM, tokens_BU=None):
    frames_BSD = self.frames(mels_BTM)
    if self.config.classes:
      return self.head(frames_BSD)
    assert tokens_BU is not None, "a model without a head of classes takes tokens"
    positions_BU = jnp.broadcast_to(jnp.arange(tokens_BU.shape[1]), tokens_BU.shape)
    return self.decoder(self._checked(tokens_BU), frames_BSD, positions_BU, None, None)

  def frames(self, mels_BTM):
    """The encoder's frames, [B, S, D].

    Raises ValueError for another number of bands, and for an odd number of frames or too many.
    """
    c = self.config
    frames, mels = mels_BTM.shape[1:]
    if mels != c.mels or frames % 2 or not 0 < frames <= 2 * c.max_frames:
      raise ValueError(
        f"mels_BTM: shape {mels_BTM.shape}, and the model takes {c.mels} bands of an even number "
        f"of frames up to {2 * c.max_frames:,}"
      )
    return self.encoder(mels_BTM)

  def start(self, frames_BSD, slots: int) -> dict[str, DecoderCache]:
    """Returns the cache for `read`, with the keys and values of the frames in all layers.

    frames_BSD: from `frames`.
    slots: the largest position of a token, plus one.

    Raises ValueError for more slots than the model has positions.
    """
    if slots > self.config.max_length:
      raise ValueError(
        f"a cache of {slots:,} slots: the model has learned {self.config.max_length:,} positions "
        "(max_target_positions), and no text can be longer; use fewer slots"
      )
    return self.decoder.start(frames_BSD, slots)

  def read(self, tokens_BU, *, positions_BT=None, at_BC=None, cache):
    """Returns the logits after more tokens of each row, and the cache with them.

    positions_BT, at_BC, cache: as in `lora_jax.models.decoder.Decoder`.
    """
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BU.shape[1]), tokens_BU.shape)
    return self.decoder(self._checked(tokens_BU), None, positions_BT, at_BC, cache)

  def _checked(self, tokens_BU):
    if tokens_BU.shape[1] > self.config.max_length:
      raise ValueError(
        f"tokens_BU: rows of {tokens_BU.shape[1]:,} tokens, and the model has learned "
        f"{self.config.max_length:,} positions (max_target_positions); use shorter texts"
      )
    return tokens_BU
