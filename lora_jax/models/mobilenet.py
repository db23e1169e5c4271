"""MobileNetV2: inverted residuals of depthwise convolutions with linear bottlenecks.

    config = mobilenet.MobileNetV2Config(classes=("cat", "dog"))
    model = mobilenet.MobileNetV2(config)
    params = model.init(jax.random.key(0), images_BHWC)["params"]
    logits_BK = model.apply({"params": params}, images_BHWC)

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (table 2). Shapes have
the letters of `lora_jax.models.convolutions`.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import convolutions, limits
from lora_jax.models.convolutions import ConvNorm
from lora_jax.models.decoder import rematerialized

# The 17 bottlenecks have these; the first is the stem's.
_CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_FIRST, _LAST = 32, 1280
_OUTPUT_STRIDES = (8, 16, 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetV2Config:
  """The shape of a MobileNetV2 and how it is computed.

  width_multiplier: of all numbers of channels.
  divisor: every number of channels is a multiple of it.
  least_channels: that a layer has.
  expansion: channels within a bottleneck, as a multiple of those that it takes.
  stem_expands: whether the first bottleneck expands its input as the others do; in published models
    the first convolution stands for that.
  full_output: whether the last convolution has 1,280 channels under a `width_multiplier` below 1.
  output_stride: pixels of the image for a place of the features: 32; with 16 or 8 later layers have
    dilated windows instead of strides.
  same_padding: TensorFlow's padding and not one pixel on each side.
  image_size: pixels of a side of the images that it was trained on; any other size is taken.
  channels: C.
  norm_eps: added to the variance in BatchNorm.
  activation: a name of `convolutions.ACTIVATIONS`.
  classes: the names of the head's outputs; () for a model without a head.
  scan_layers: False, as the layers differ.
  remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: what files call the model; nothing is computed by it.

  Raises ValueError for a number of another type, one that no model has, and values that do not fit
  each other.
  """

  width_multiplier: float = 1.0
  divisor: int = 8
  least_channels: int = 8
  expansion: float = 6.0
  stem_expands: bool = False
  full_output: bool = True
  output_stride: int = 32
  same_padding: bool = False
  image_size: int = 224
  channels: int = 3
  norm_eps: float = 1e-5
  activation: str = "relu6"
  classes: tuple[str, ...] = ()
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "mobilenet_v2"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("MobileNetV2Config", field.name, field.type, getattr(self, field.name))
    convolutions.check(self)
    if self.output_stride not in _OUTPUT_STRIDES:
      raise ValueError(
        f"MobileNetV2Config: output_stride {self.output_stride} is none of {_OUTPUT_STRIDES}"
      )

  @property
  def num_layers(self) -> int:
    """The bottlenecks."""
    return len(_CHANNELS)


def _divisible(config: MobileNetV2Config, channels: float) -> int:
  """A number of channels, rounded to a multiple that is no less than nine tenths of it."""
  divisor = config.divisor
  found = max(config.least_channels, int(channels + divisor / 2) // divisor * divisor)
  return found + divisor if found < 0.9 * channels else found


def widths(config: MobileNetV2Config) -> tuple[int, tuple[int, ...], int]:
  """Returns the channels of the first convolution, of each bottleneck, and of the last one."""

  def scaled(channels: int) -> int:
    return _divisible(config, round(channels * config.width_multiplier))

  keeps = config.full_output and config.width_multiplier < 1
  return scaled(_FIRST), tuple(map(scaled, _CHANNELS)), _LAST if keeps else scaled(_LAST)


class Bottleneck(nn.Module):
  """1 × 1 to more channels, a depthwise 3 × 3, and 1 × 1 to few; added to its input if it may be.

  expanded: channels of the depthwise convolution; None: those of the input, without the first
    convolution.
  is_residual: whether the input is added where it has the shape of the output.
  """

  config: MobileNetV2Config
  features: int
  expanded: int | None
  stride: int
  dilation: int
  is_residual: bool

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    channels = x_BHWC.shape[-1]
    y_BHWE = x_BHWC
    if self.expanded is not None:
      y_BHWE = ConvNorm(c, self.expanded, 1, activation=c.activation, name="expand")(x_BHWC)
    y_BHWE = ConvNorm(
      c, y_BHWE.shape[-1], 3, stride=self.stride, dilation=self.dilation, depthwise=True,
      padding="SAME" if c.same_padding else self.dilation, activation=c.activation,
      name="depthwise",
    )(y_BHWE)  # fmt: skip
    y_BHWD = ConvNorm(c, self.features, 1, name="project")(y_BHWE)
    if self.is_residual and self.stride == 1 and channels == self.features:
      y_BHWD = x_BHWC + y_BHWD
    return c.constrain(y_BHWD) if c.constrain else y_BHWD


class MobileNetV2(convolutions.Classifier):
  """Called as `convolutions.Classifier` says."""

  config: MobileNetV2Config

  def setup(self):
    c = self.config
    first, channels, last = widths(c)
    self.stem = ConvNorm(
      c, first, 3, stride=2, padding="SAME" if c.same_padding else 1, activation=c.activation
    )
    block = rematerialized(Bottleneck, c)
    blocks, stride, dilation = [], 2, 1
    for n, (width, own) in enumerate(zip(channels, _STRIDES, strict=True)):
      if n == 0:
        expanded = first if c.stem_expands else None
      else:
        expanded = _divisible(c, round(channels[n - 1] * c.expansion))
      if stride == c.output_stride:
        # A stride that is left out widens the windows of the layers after it.
        blocks.append(block(c, width, expanded, 1, dilation, n > 0))
        dilation *= own
      else:
        blocks.append(block(c, width, expanded, own, 1, n > 0))
        stride *= own
    self.block = blocks
    self.last = ConvNorm(c, last, 1, activation=c.activation)
    self.head = self.make_head()

  def features(self, images_BHWC):
    """[B, H / 32, W / 32, D]."""
    x_BHWD = self.stem(images_BHWC)
    for block in self.block:
      x_BHWD = block(x_BHWD)
    return self.last(x_BHWD)
