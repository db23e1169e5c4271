"""SSDLite on MobileNetV2: a detector that predicts a class and a box for each of many anchors.

    config = ssdlite.SSDLiteConfig(
      classes=("cat", "dog"), scales=((0.1, 0.2), (0.4, 0.6), (0.8,)), ratios=(1.0, 2.0, 0.5)
    )
    model = ssdlite.SSDLite(config)
    params = model.init(jax.random.key(0), images_BHWC)["params"]
    logits_BNK, boxes_BN4 = model.apply({"params": params}, images_BHWC)

The first feature map is the expansion of the bottleneck with index 13, of stride 16, the second
one the backbone's output, of stride 32. Each further one halves the map before it by a separable
convolution. Class 0 is background; class k of the config is output k + 1.

The head has no BatchNorm, unlike the published one: batches here have few images, and statistics of
training would have to be measured for it.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector"; Sandler et al. 2018, "MobileNetV2", section
6.2. Shapes: B images; H, W pixels; C channels; N anchors; K classes and background; boxes as in
`lora_jax.models.boxes`.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models import boxes, depthwise, limits, mobilenet
from lora_jax.models.mobilenet import MobileNetV2Config

FAMILY = "ssdlite_mobilenet_v2"
_EXTRA = (512, 256, 256, 128)  # channels of the third feature map and of those after it
_MOST_SHAPES = 64  # anchors at a position
_RATIOS = (1 / 64, 64.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSDLiteConfig(MobileNetV2Config):
  """The shape of an SSDLite and how it is computed.

  scales: for each feature map, the square roots of the areas of its anchors, as fractions of the
    image's; two to six maps.
  ratios: the widths of anchors over their heights, in an image that was resized to a square.
  classes: the names of the classes, without background; () for the backbone alone.
  Others: as in `mobilenet.MobileNetV2Config`; `image_size` is that of example inputs.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  scales: tuple[tuple[float, ...], ...] = ()
  ratios: tuple[float, ...] = ()
  family: str = FAMILY

  def __post_init__(self):
    super().__post_init__()
    check_anchors("SSDLiteConfig: ", self.scales, self.ratios)


def check_anchors(where: str, scales: Any, ratios: Any) -> None:
  """Checks the fields of `SSDLiteConfig` that describe anchors; raises ValueError.

  where: the start of the message.
  """
  most = 2 + len(_EXTRA)
  is_list = isinstance(scales, tuple | list) and all(isinstance(x, tuple | list) for x in scales)
  if not is_list or not 2 <= len(scales) <= most or not all(scales):
    raise ValueError(
      f"{where}scales {str(scales)[:80]} must hold scales for each of 2 to {most} feature maps, "
      "as ((0.1, 0.2), (0.4,))"
    )
  for name, each, (low, high) in [
    *(("scales", x, (1e-3, 2.0)) for own in scales for x in own),
    *(("ratios", x, _RATIOS) for x in (ratios if isinstance(ratios, tuple | list) else [ratios])),
  ]:
    if not (limits.is_number(each) and low <= each <= high):
      raise ValueError(f"{where}{name} must be numbers from {low:g} to {high:g}, not {each!r:.40}")
  if not ratios:
    raise ValueError(f"{where}ratios are missing; give the widths of anchors over their heights")
  if max(map(len, scales)) * len(ratios) > _MOST_SHAPES:
    raise ValueError(
      f"{where}scales and ratios make more than {_MOST_SHAPES} anchors at a position; "
      "leave some out"
    )


class Separable(nn.Module):
  """A depthwise 3 × 3 convolution, ReLU6, and a 1 × 1 convolution with a bias.

  config: of the model.
  features: channels of the output.
  stride: of the depthwise convolution.
  """

  config: Any
  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x_BHWC):
    c, channels = self.config, x_BHWC.shape[-1]
    how = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    y_BHWC = nn.Conv(
      channels,
      (3, 3),
      strides=self.stride,
      padding=1,
      feature_group_count=channels,
      conv_general_dilated=depthwise.WAYS[c.depthwise],
      name="depthwise",
      **how,
    )(x_BHWC)
    return nn.Conv(self.features, (1, 1), name="pointwise", **how)(nn.relu6(y_BHWC))


class DetectionHead(nn.Module):
  """The further feature maps, and the predictions on each map."""

  config: SSDLiteConfig

  def setup(self):
    c = self.config
    counts = [len(own) * len(c.ratios) for own in c.scales]
    self.extra = [Separable(c, width, stride=2) for width in _EXTRA[: len(counts) - 2]]
    self.logits = [Separable(c, count * (len(c.classes) + 1)) for count in counts]
    self.offsets = [Separable(c, count * 4) for count in counts]

  def __call__(self, maps):
    """The logits [B, N, K] and offsets [B, N, 4], and the rows and columns of the maps."""
    for extra in self.extra:
      maps = [*maps, nn.relu6(extra(maps[-1]))]
    sizes = [x_BHWC.shape[1:3] for x_BHWC in maps]
    return self._all(self.logits, maps, -1), self._all(self.offsets, maps, 4), sizes

  def _all(self, predictors, maps, width: int):
    width = len(self.config.classes) + 1 if width < 0 else width
    each = [predict(x_BHWC) for predict, x_BHWC in zip(predictors, maps, strict=True)]
    return jnp.concatenate([x.reshape(x.shape[0], -1, width) for x in each], axis=1)


class SSDLite(mobilenet.MobileNetV2):
  """An SSDLite; `offsets` is for its training."""

  config: SSDLiteConfig

  tapped: ClassVar[int | None] = 13

  def __call__(self, images_BHWC):
    """The logits [B, N, K] in float32, and the boxes [B, N, 4]; without classes, the last map.

    Raises ValueError for images with another number of channels.
    """
    if not self.config.classes:
      return self._maps(images_BHWC)[-1]
    logits_BNK, offsets_BN4, anchors_N4 = self.offsets(images_BHWC)
    return logits_BNK, boxes.decode(offsets_BN4, anchors_N4)

  def offsets(self, images_BHWC):
    """The logits [B, N, K], the offsets [B, N, 4] as `boxes.encode` has them, both in float32, and
    the anchors [N, 4]."""
    c = self.config
    assert self.head is not None  # a detector has classes
    logits_BNK, offsets_BN4, sizes = self.head(self._maps(images_BHWC))
    anchors_N4 = jnp.asarray(boxes.anchors(sizes, c.scales, c.ratios))
    return logits_BNK.astype(jnp.float32), offsets_BN4.astype(jnp.float32), anchors_N4

  def _maps(self, images_BHWC) -> list[jax.Array]:
    """The backbone's two feature maps."""
    c = self.config
    if images_BHWC.shape[-1] != c.channels:
      raise ValueError(
        f"images_BHWC: shape {images_BHWC.shape}, and the model takes {c.channels} channels"
      )
    x_BHWD = self.stem(images_BHWC.astype(c.dtype))
    for n, block in enumerate(self.block):
      if n == self.tapped:
        x_BHWD, expanded_BHWE = block(x_BHWD)
      else:
        x_BHWD = block(x_BHWD)
    return [expanded_BHWE, self.last(x_BHWD)]

  def make_head(self) -> DetectionHead | None:
    c = self.config
    return DetectionHead(c) if c.classes else None
