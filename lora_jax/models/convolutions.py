"""Shared parts of convolutional networks: a convolution with its normalization, and the head.

BatchNorm always uses the statistics from training: `norm/mean` and `norm/var` are leaves alongside
`norm/scale` and `norm/bias`, and batch statistics are not used (Ioffe and Szegedy 2015, section
3.1, inference).

Shapes: B images; H, W pixels; C channels in; D channels out; K classes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models import depthwise, limits

STATISTICS = r"(.*/)?norm/(mean|var)"
"""The leaves that are measured and not learned."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "relu": nn.relu,
  "relu6": nn.relu6,
  "silu": nn.silu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
}


class FrozenBatchNorm(nn.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias, of each channel.

  config: of the model, for its `norm_eps`, `dtype` and `param_dtype`.
  """

  config: Any

  @nn.compact
  def __call__(self, x_BHWD):
    c, shape = self.config, x_BHWD.shape[-1:]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale_D = self.param("scale", ones, shape, c.param_dtype)
    bias_D = self.param("bias", zeros, shape, c.param_dtype)
    mean_D = self.param("mean", zeros, shape, c.param_dtype)
    var_D = self.param("var", ones, shape, c.param_dtype)
    # The scale and shift of each channel are combined first, since pixels are many.
    factor_D = scale_D * jax.lax.rsqrt(var_D.astype(jnp.float32) + c.norm_eps)
    return x_BHWD * factor_D.astype(c.dtype) + (bias_D - mean_D * factor_D).astype(c.dtype)


class ConvNorm(nn.Module):
  """A convolution without a bias, BatchNorm, and an activation.

  config: of the model.
  features: D.
  window: pixels per side.
  stride, dilation: of the convolution.
  depthwise: whether each channel is convolved separately, so that D = C.
  padding: pixels on each side, or "SAME", TensorFlow's rule: the output has ceil(H / stride) rows,
    and an odd row of padding is added below and to the right.
  activation: a name in `ACTIVATIONS`, or None.
  """

  config: Any
  features: int
  window: int
  stride: int = 1
  dilation: int = 1
  depthwise: bool = False
  padding: int | str = 0
  activation: str | None = None

  @nn.compact
  def __call__(self, x_BHWC):
    c = self.config
    padding = self.padding
    x_BHWD = nn.Conv(
      self.features,
      (self.window, self.window),
      strides=self.stride,
      kernel_dilation=self.dilation,
      padding=padding if isinstance(padding, str) else [(padding, padding)] * 2,
      feature_group_count=self.features if self.depthwise else 1,
      conv_general_dilated=depthwise.WAYS[c.depthwise] if self.depthwise else None,
      use_bias=False,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      name="conv",
    )(x_BHWC)
    x_BHWD = FrozenBatchNorm(c, name="norm")(x_BHWD)
    return ACTIVATIONS[self.activation](x_BHWD) if self.activation else x_BHWD


def check(config: Any) -> None:
  """Checks the fields that the configs of convolutional networks share.

  Raises ValueError for an unknown activation, and for stacked layers.
  """
  where = type(config).__name__
  limits.check_choice(where, "activation", config.activation, tuple(ACTIVATIONS))
  if config.scan_layers:
    raise ValueError(
      f"{where}: scan_layers=True: its layers differ in shape and cannot be stacked; use "
      "scan_layers=False (model.scan_layers in a config)"
    )


class Classifier(nn.Module):
  """A convolutional network: images to logits, or to pooled features without a head.

  A subclass defines `features`, from images to [B, H, W, D].
  """

  config: Any

  def __call__(self, images_BHWC):
    pooled_BD = self.hidden(images_BHWC)
    return self.logits(pooled_BD) if self.config.classes else pooled_BD

  def hidden(self, images_BHWC):
    """The mean of the features over all positions, [B, D].

    Raises ValueError for images with another number of channels.
    """
    c = self.config
    if images_BHWC.shape[-1] != c.channels:
      raise ValueError(
        f"images_BHWC: shape {images_BHWC.shape}, and the model takes {c.channels} channels"
      )
    return self.features(images_BHWC.astype(c.dtype)).mean(axis=(1, 2))

  def logits(self, pooled_BD):
    """The head, [B, K]."""
    return self.head(pooled_BD)

  def make_head(self) -> nn.Dense | None:
    """The head that `setup` keeps as `head`."""
    c = self.config
    if not c.classes:
      return None
    return nn.Dense(len(c.classes), dtype=c.dtype, param_dtype=c.param_dtype)
