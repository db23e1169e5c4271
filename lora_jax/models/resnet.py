"""ResNet: residual convolutional layers in stages of decreasing resolution.

    config = resnet.ResNetConfig(widths=(64, 128, 256, 512), depths=(2, 2, 2, 2), bottleneck=False)
    model = resnet.ResNet(config)
    params = model.init(jax.random.key(0), images_BHWC)["params"]
    pooled_BD = model.apply({"params": params}, images_BHWC)

He et al. 2015, "Deep Residual Learning for Image Recognition" (table 1, figure 5). Shapes have the
letters of `lora_jax.models.convolutions`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import convolutions, limits
from lora_jax.models.convolutions import ConvNorm
from lora_jax.models.decoder import rematerialized

_REDUCTION = 4  # divides the channels within a bottleneck
_MOST_STAGES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
  """The shape of a ResNet and how it is computed.

  stem_width: channels of the first convolution.
  widths, depths: for each stage, its output channels and its number of layers.
  bottleneck: whether a layer has 1 × 1, 3 × 3 and 1 × 1 convolutions rather than two of 3 × 3.
  first_stage_strides: whether the first stage also halves the resolution.
  stride_first: whether a bottleneck that halves the resolution does so in its first convolution
    rather than its second.
  image_size: pixels per side of the images that it was trained on; other sizes are accepted.
  channels: C.
  norm_eps: added to the variance in BatchNorm; files have no field for it.
  activation: after the first convolution and after each sum, a name in
    `convolutions.ACTIVATIONS`; within a layer it is ReLU, as in transformers.
  classes: the names of the head's outputs; () for a model without a head.
  scan_layers: False, as the layers differ.
  remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  stem_width: int = 64
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  depths: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
  first_stage_strides: bool = False
  stride_first: bool = False
  image_size: int = 224
  channels: int = 3
  norm_eps: float = 1e-5
  activation: str = "relu"
  classes: tuple[str, ...] = ()
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "resnet"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("ResNetConfig", field.name, field.type, getattr(self, field.name))
    convolutions.check(self)
    if not 1 <= len(self.widths) == len(self.depths) <= _MOST_STAGES:
      raise ValueError(
        f"ResNetConfig: {len(self.widths)} widths and {len(self.depths)} depths; each stage has "
        f"one of each, and there are at most {_MOST_STAGES} stages"
      )
    for width, depth in zip(self.widths, self.depths, strict=True):
      limits.check("ResNetConfig", "width", int, width)
      limits.check("ResNetConfig", "num_layers", int, depth)
    limits.check("ResNetConfig", "num_layers", int, self.num_layers)

  @property
  def num_layers(self) -> int:
    """The number of layers in all stages."""
    return sum(self.depths)


class Layer(nn.Module):
  """Two or three convolutions, added to the input or to a 1 × 1 convolution of it."""

  config: ResNetConfig
  features: int
  stride: int

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    if c.bottleneck:
      inner = self.features // _REDUCTION
      first, second = (self.stride, 1) if c.stride_first else (1, self.stride)
      windows = [(inner, 1, first), (inner, 3, second), (self.features, 1, 1)]
    else:
      windows = [(self.features, 3, self.stride), (self.features, 3, 1)]
    y_BHWD = x_BHWC
    for n, (width, window, stride) in enumerate(windows):
      y_BHWD = ConvNorm(
        c,
        width,
        window,
        stride=stride,
        padding=window // 2,
        name=f"conv_{n}",
        activation="relu" if n + 1 < len(windows) else None,
      )(y_BHWD)
    if x_BHWC.shape[-1] != self.features or self.stride != 1:
      x_BHWC = ConvNorm(c, self.features, 1, stride=self.stride, name="shortcut")(x_BHWC)
    y_BHWD = convolutions.ACTIVATIONS[c.activation](x_BHWC + y_BHWD)
    return c.constrain(y_BHWD) if c.constrain else y_BHWD


class ResNet(convolutions.Classifier):
  """A ResNet with the interface of `convolutions.Classifier`."""

  config: ResNetConfig

  def setup(self):
    c = self.config
    self.stem = ConvNorm(c, c.stem_width, 7, stride=2, padding=3, activation=c.activation)
    layer = rematerialized(Layer, c)
    strides = [2 if n or c.first_stage_strides else 1 for n in range(len(c.widths))]
    for n, (width, depth, stride) in enumerate(zip(c.widths, c.depths, strides, strict=True)):
      layers = [layer(c, width, stride if m == 0 else 1) for m in range(depth)]
      setattr(self, f"stage{n}", layers)  # their names are stage0_0, stage0_1, ...
    self.head = self.make_head()

  def features(self, images_BHWC):
    """[B, H / 32, W / 32, D] with four stages."""
    x_BHWD = self.stem(images_BHWC)
    padding: Any = ((1, 1), (1, 1))  # Flax declares no type, and its default is a str
    x_BHWD = nn.max_pool(x_BHWD, (3, 3), strides=(2, 2), padding=padding)
    for n in range(len(self.config.widths)):
      for layer in getattr(self, f"stage{n}"):
        x_BHWD = layer(x_BHWD)
    return x_BHWD
