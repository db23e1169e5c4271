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
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import convolutions, depthwise, limits
from lora_jax.models.convolutions import ConvNorm
from lora_jax.models.decoder import rematerialized

# Channels of the 17 bottlenecks; the first one belongs to the stem.
_CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_FIRST, _LAST = 32, 1280
_OUTPUT_STRIDES = (8, 16, 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetV2Config:
  """The shape of a MobileNetV2 and how it is computed.

  width_multiplier: factor of all channel counts.
  divisor: every channel count is a multiple of it.
  least_channels: the smallest channel count of a layer.
  expansion: channels within a bottleneck, as a multiple of its input channels.
  stem_expands: whether the first bottleneck expands its input like the others; in published models
    the first convolution does that.
  full_output: whether the last convolution has 1,280 channels with a `width_multiplier` below 1.
  output_stride: image pixels per feature position: 32; with 16 or 8 later layers have dilated
    windows instead of strides.
  same_padding: TensorFlow's padding instead of one pixel on each side.
  image_size: pixels per side of the images that it was trained on; other sizes are accepted.
  channels: C.
  norm_eps: added to the variance in BatchNorm.
  activation: a name of `convolutions.ACTIVATIONS`.
  depthwise: a name of `lora_jax.models.depthwise.WAYS`; "shifts" is faster on CPUs. An adapter with
    dropout on a depthwise kernel needs "convolution", which has the input as an operand.
  classes: the names of the head's outputs; () for a model without a head.
  scan_layers: False, as the layers differ.
  remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
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
  depthwise: str = "convolution"
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
    limits.check_choice("MobileNetV2Config", "depthwise", self.depthwise, tuple(depthwise.WAYS))
    if self.output_stride not in _OUTPUT_STRIDES:
      raise ValueError(
        f"MobileNetV2Config: output_stride {self.output_stride} is not one of {_OUTPUT_STRIDES}"
      )

  @property
  def num_layers(self) -> int:
    """The number of bottlenecks."""
    return len(_CHANNELS)


def _divisible(config: MobileNetV2Config, channels: float) -> int:
  """Rounds a channel count to a multiple of the divisor, but not below nine tenths of it."""
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
  """A 1 × 1 expansion, a depthwise 3 × 3 convolution, a 1 × 1 projection, and a residual.

  expanded: channels of the depthwise convolution; None: the input's, without the expansion.
  is_residual: whether the input is added if it has the shape of the output.
  is_tapped: whether the expansion's output is returned as well.
  """

  config: MobileNetV2Config
  features: int
  expanded: int | None
  stride: int
  dilation: int
  is_residual: bool
  is_tapped: bool = False

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    channels = x_BHWC.shape[-1]
    expanded_BHWE = x_BHWC
    if self.expanded is not None:
      expanded_BHWE = ConvNorm(c, self.expanded, 1, activation=c.activation, name="expand")(x_BHWC)
    y_BHWE = ConvNorm(
      c,
      expanded_BHWE.shape[-1],
      3,
      stride=self.stride,
      dilation=self.dilation,
      depthwise=True,
      padding="SAME" if c.same_padding else self.dilation,
      activation=c.activation,
      name="depthwise",
    )(expanded_BHWE)
    y_BHWD = ConvNorm(c, self.features, 1, name="project")(y_BHWE)
    if self.is_residual and self.stride == 1 and channels == self.features:
      y_BHWD = x_BHWC + y_BHWD
    y_BHWD = c.constrain(y_BHWD) if c.constrain else y_BHWD
    return (y_BHWD, expanded_BHWE) if self.is_tapped else y_BHWD


class MobileNetV2(convolutions.Classifier):
  """A MobileNetV2 with the interface of `convolutions.Classifier`.

  tapped: the index of the bottleneck that returns its expansion's output as well; of a subclass.
  """

  config: MobileNetV2Config

  tapped: ClassVar[int | None] = None

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
        # Each omitted stride dilates the windows of the layers after it.
        blocks.append(block(c, width, expanded, 1, dilation, n > 0, n == self.tapped))
        dilation *= own
      else:
        blocks.append(block(c, width, expanded, own, 1, n > 0, n == self.tapped))
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
