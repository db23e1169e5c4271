"""wav2vec2: convolutions over samples, a positional convolution, and an encoder of frames.

    config = wav2vec2.Wav2Vec2Config(width=768, mlp_width=3072, num_layers=12, num_heads=12,
                                     head_dim=64, classes=("<pad>", "|", "a", "b"))
    model = wav2vec2.Wav2Vec2(config)
    params = model.init(jax.random.key(0), samples_BT)["params"]
    logits_BSK = model.apply({"params": params}, samples_BT)

Baevski et al. 2020, "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech
Representations" (section 2), fine-tuned with a layer of characters (section 3.2).

The positional convolution has a plain kernel. In files it is weight-normed (Salimans and Kingma
2016), as a direction and a length; `lora_jax.io.weight_norm` joins them, so that the kernel is
adapted as any other.

Shapes: B clips of T samples; S frames; D width; E width of the MLP; N heads of H features; C
channels of the convolutions; K classes.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import limits
from lora_jax.models.attention import attend
from lora_jax.models.decoder import rematerialized

_MOST_SAMPLES = 1 << 20  # 65 s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
  """The shape of a wav2vec2 and how it is computed.

  width, mlp_width, num_layers, num_heads, head_dim: D, E, the number of layers, N and H. In files
    N H = D.
  conv_channels, conv_windows, conv_strides: of each convolution over the samples.
  conv_bias: whether these have biases.
  layer_norms: whether each of them is followed by a norm over its channels ("layer" in files).
    Otherwise the first one alone has a norm, over time ("group").
  pre_norm: whether attention and MLP come after their norms, rather than before
    (`do_stable_layer_norm`).
  position_window, position_groups: of the positional convolution.
  norm_eps: added to the variance in LayerNorm.
  classes: the names of the outputs of the head on the frames; () for a model without one.
  scan_layers: False; the layers are separate.
  remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  head_dim: int
  conv_channels: tuple[int, ...] = (512,) * 7
  conv_windows: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
  conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
  conv_bias: bool = False
  layer_norms: bool = False
  pre_norm: bool = False
  position_window: int = 128
  position_groups: int = 16
  norm_eps: float = 1e-5
  classes: tuple[str, ...] = ()
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "wav2vec2"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("Wav2Vec2Config", field.name, field.type, getattr(self, field.name))
    limits.check_separate_layers("Wav2Vec2Config", num_layers=self.num_layers)
    if self.scan_layers:
      raise ValueError("Wav2Vec2Config: its layers are not stacked; set scan_layers to False")
    sizes = {
      "channels": self.conv_channels,
      "windows": self.conv_windows,
      "strides": self.conv_strides,
    }
    for name, values in sizes.items():
      for value in values:
        limits.check("Wav2Vec2Config", f"conv_{name}", int, value)
    if not 0 < len(self.conv_channels) == len(self.conv_windows) == len(self.conv_strides) <= 32:
      raise ValueError(
        f"Wav2Vec2Config: {len(self.conv_channels)} channels, {len(self.conv_windows)} windows and "
        f"{len(self.conv_strides)} strides are not those of as many convolutions"
      )
    if self.width % self.position_groups:
      raise ValueError(
        f"Wav2Vec2Config: width {self.width} is no multiple of position_groups "
        f"{self.position_groups}"
      )
    if self.samples_of(2) > _MOST_SAMPLES:
      raise ValueError(
        f"Wav2Vec2Config: two frames of these convolutions take {self.samples_of(2):,} samples, "
        f"over the limit of {_MOST_SAMPLES:,}"
      )

  @property
  def max_samples(self) -> int:
    """The samples at 16 kHz of the longest clip, a limit of memory alone."""
    return _MOST_SAMPLES

  def frames_of(self, samples: int) -> int:
    """The frames of so many samples; 0 for too few."""
    for window, stride in zip(self.conv_windows, self.conv_strides, strict=True):
      samples = max(0, (samples - window) // stride + 1)
    return samples

  def samples_of(self, frames: int) -> int:
    """The fewest samples that give so many frames."""
    for window, stride in zip(self.conv_windows[::-1], self.conv_strides[::-1], strict=True):
      frames = (frames - 1) * stride + window
    return frames


def _dense(config: Wav2Vec2Config, features: int, name: str | None) -> nn.Dense:
  return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _norm(config: Wav2Vec2Config, name: str | None) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,
    name=name,
  )


class Convolutions(nn.Module):
  """The convolutions over samples, [B, S, C]."""

  config: Wav2Vec2Config

  @nn.compact
  def __call__(self, samples_BT):
    c = self.config
    x_BSC = samples_BT[..., None].astype(c.dtype)
    shapes = zip(c.conv_channels, c.conv_windows, c.conv_strides, strict=True)
    for number, (channels, window, stride) in enumerate(shapes):
      x_BSC = nn.Conv(
        channels,
        (window,),
        strides=stride,
        padding="VALID",
        use_bias=c.conv_bias,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        name=f"conv_{number}",
      )(x_BSC)
      name = f"norm_{number}"
      if c.layer_norms:
        # PyTorch's default; the config's value is for other norms.
        x_BSC = nn.LayerNorm(
          epsilon=1e-5, dtype=c.dtype, param_dtype=c.param_dtype, use_fast_variance=False, name=name
        )(x_BSC)
      elif number == 0:
        x_BSC = nn.GroupNorm(
          num_groups=channels,
          epsilon=1e-5,
          dtype=c.dtype,
          param_dtype=c.param_dtype,
          use_fast_variance=False,
          name=name,
        )(x_BSC)
      x_BSC = nn.gelu(x_BSC, approximate=False)
    return x_BSC


class Attention(nn.Module):
  """Bidirectional attention."""

  config: Wav2Vec2Config

  @nn.compact
  def __call__(self, x_BSD):
    c = self.config
    heads = (
      _dense(c, c.num_heads * c.head_dim, name)(x_BSD).reshape(
        *x_BSD.shape[:2], c.num_heads, c.head_dim
      )
      for name in ("query", "key", "value")
    )
    return _dense(c, c.width, "out")(attend(*heads).reshape(*x_BSD.shape[:2], -1))


class Mlp(nn.Module):
  """down(gelu(up(x)))."""

  config: Wav2Vec2Config

  @nn.compact
  def __call__(self, x_BSD):
    c = self.config
    return _dense(c, c.width, "down")(
      nn.gelu(_dense(c, c.mlp_width, "up")(x_BSD), approximate=False)
    )


class Block(nn.Module):
  """One layer: attention and the MLP, added to the residual stream, each with its norm."""

  config: Wav2Vec2Config

  @nn.compact
  def __call__(self, x_BSD):
    c = self.config
    for name, part in {"attn": Attention, "mlp": Mlp}.items():
      module, norm = part(c, name=name), _norm(c, f"{name}_norm")
      x_BSD = x_BSD + module(norm(x_BSD)) if c.pre_norm else norm(x_BSD + module(x_BSD))
    return c.constrain(x_BSD) if c.constrain else x_BSD


class Wav2Vec2(nn.Module):
  """A wav2vec2: samples to the logits of each frame, or to its frames without a head.

  samples_BT: at 16 kHz, each clip of mean 0 and variance 1, padded on the right with zeros.
  """

  config: Wav2Vec2Config

  def setup(self):
    c = self.config
    self.convolutions = Convolutions(c)
    self.project_norm, self.project = _norm(c, None), _dense(c, c.width, None)
    self.positions = nn.Conv(
      c.width,
      (c.position_window,),
      padding=c.position_window // 2,
      feature_group_count=c.position_groups,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
    )
    self.block = [rematerialized(Block, c)(c) for _ in range(c.num_layers)]
    self.norm = _norm(c, None)
    if c.classes:
      self.head = _dense(c, len(c.classes), None)

  def __call__(self, samples_BT):
    frames_BSD = self.frames(samples_BT)
    return self.head(frames_BSD) if self.config.classes else frames_BSD

  def frames(self, samples_BT):
    """The frames, [B, S, D]; raises ValueError for clips too short to have one."""
    c = self.config
    if not c.frames_of(samples_BT.shape[1]):
      raise ValueError(f"samples_BT: {samples_BT.shape[1]} samples are too few for a frame")
    x_BSD = self.project(self.project_norm(self.convolutions(samples_BT)))
    around_BSD = self.positions(x_BSD)[:, : x_BSD.shape[1]]  # an even window has one frame more
    x_BSD = x_BSD + nn.gelu(around_BSD, approximate=False)
    if not c.pre_norm:
      x_BSD = self.norm(x_BSD)
    x_BSD = c.constrain(x_BSD) if c.constrain else x_BSD
    for block in self.block:
      x_BSD = block(x_BSD)
    return self.norm(x_BSD) if c.pre_norm else x_BSD
