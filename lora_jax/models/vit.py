"""Vision transformers: ViT, DeiT with its distillation token, and DINOv2 with layer scale.

    config = vit.ViTConfig(width=384, mlp_width=1536, num_layers=12, num_heads=6, head_dim=64,
                           image_size=224, patch_size=14, layer_scale=True, pooling="token+mean",
                           classes=("cat", "dog"))
    model = vit.ViT(config)
    params = model.init(jax.random.key(0), images_BHWC)["params"]
    logits_BK = model.apply({"params": params}, images_BHWC)
    tokens_BTD = model.apply({"params": params}, images_BHWC, method="hidden")

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words" (section 3.1); Touvron et al. 2020,
"Training data-efficient image transformers" (section 4); Oquab et al. 2023, "DINOv2".

Shapes: B images; H, W their pixels and C channels; T tokens, the special ones first; D width;
N heads of F features; E width of the MLP; K classes; P side of the square of learned positions.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.models import encoder_attention, limits
from lora_jax.models.attention_kernels import BY_DEVICE
from lora_jax.models.decoder import rematerialized

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
POOLINGS = ("token", "token+mean", "two heads")
_CUBIC = -0.75  # the coefficient of bicubic interpolation in PyTorch, which checkpoints expect


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """The shape of a vision transformer and how it is computed.

  width, mlp_width, num_layers, num_heads, head_dim: D, E, the number of layers, N and F. In files
    N F = D.
  image_size: pixels per side of the images that the positions were learned for. For images of other
    sizes the positions are interpolated.
  patch_size: pixels per side of a patch; it divides `image_size`.
  channels: C.
  norm_eps: added to the variance in LayerNorm.
  activation: of the MLP, one of `ACTIVATIONS`.
  qkv_bias: whether query, key and value have biases.
  distillation: whether a second special token follows the first (DeiT).
  layer_scale: whether the outputs of attention and MLP are multiplied by learned scales (DINOv2).
  pooling: the input of the head. "token": the first special token. "token+mean": that token
    concatenated with the mean of the patches. "two heads": a head on the first token and one on the
    distillation token, whose logits are averaged.
  classes: the names of the head's outputs; () for a model without a head.
  attention: how it is computed; see `lora_jax.models.encoder_attention`.
  scan_layers, remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  head_dim: int
  image_size: int = 224
  patch_size: int = 16
  channels: int = 3
  norm_eps: float = 1e-6
  activation: str = "gelu"
  qkv_bias: bool = True
  distillation: bool = False
  layer_scale: bool = False
  pooling: str = "token"
  classes: tuple[str, ...] = ()
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "vit"
  attention: encoder_attention.How = BY_DEVICE

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("ViTConfig", field.name, field.type, getattr(self, field.name))
    encoder_attention.check("ViTConfig", self.attention)
    if self.image_size % self.patch_size:
      raise ValueError(
        f"ViTConfig: image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
      )
    limits.check_choice("ViTConfig", "activation", self.activation, ACTIVATIONS)
    limits.check_choice("ViTConfig", "pooling", self.pooling, POOLINGS)
    if self.pooling == "two heads" and not self.distillation:
      raise ValueError("ViTConfig: pooling 'two heads' needs distillation, the second one's token")


def bicubic(before: int, after: int) -> np.ndarray:
  """Returns the matrix [after, before] that interpolates a row of values, in float32.

  Keys 1981, with the coefficient -0.75, repeated edges and no antialiasing, like PyTorch's
  `interpolate(mode="bicubic")`.
  """
  at = (np.arange(after) + 0.5) * before / after - 0.5
  first = np.floor(at).astype(int)
  matrix = np.zeros((after, before))
  for offset in (-1, 0, 1, 2):
    x = np.abs(at - (first + offset))
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    places = np.clip(first + offset, 0, before - 1)
    np.add.at(matrix, (np.arange(after), places), np.where(x <= 1, near, far))
  return matrix.astype(np.float32)


def _dense(config: ViTConfig, features: int, name: str | None, use_bias: bool = True) -> nn.Dense:
  return nn.Dense(
    features, use_bias=use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _norm(config: ViTConfig, name: str | None) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,  # some features of DINOv2 are much larger than others
    name=name,
  )


class Attention(nn.Module):
  """Bidirectional attention."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    query_BTNF, key_BTNF, value_BTNF = (
      _dense(c, c.num_heads * c.head_dim, name, c.qkv_bias)(x_BTD).reshape(
        *x_BTD.shape[:2], c.num_heads, c.head_dim
      )
      for name in ("query", "key", "value")
    )
    rows = 1 + c.distillation + (c.image_size // c.patch_size) ** 2
    out_BTNF = encoder_attention.self_attention(
      self,
      c.attention,
      query_BTNF,
      key_BTNF,
      value_BTNF,
      seen_BT=None,
      rows=rows,
      param_dtype=c.param_dtype,
    )
    return _dense(c, c.width, "out")(out_BTNF.reshape(*x_BTD.shape[:2], -1))


class Mlp(nn.Module):
  """down(activation(up(x)))."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    up_BTE = _dense(c, c.mlp_width, "up")(x_BTD)
    if c.activation == "relu":
      return _dense(c, c.width, "down")(nn.relu(up_BTE))
    return _dense(c, c.width, "down")(nn.gelu(up_BTE, approximate=c.activation == "gelu_tanh"))


class Scale(nn.Module):
  """x times a learned factor for each feature (Touvron et al. 2021, "Going deeper", section 3)."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    gamma_D = self.param("gamma", nn.initializers.ones, (c.width,), c.param_dtype)
    return x_BTD * gamma_D.astype(c.dtype)


class Block(nn.Module):
  """One layer: attention, then the MLP, each after a norm and added to the residual stream."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x_BTD, _):
    c = self.config
    for name, part in {"attn": Attention, "mlp": Mlp}.items():
      added_BTD = part(c, name=name)(_norm(c, f"{name}_norm")(x_BTD))
      if c.layer_scale:
        added_BTD = Scale(c, name=f"{name}_scale")(added_BTD)
      x_BTD = x_BTD + added_BTD
    return c.constrain(x_BTD) if c.constrain else x_BTD, None


class Positions(nn.Module):
  """Learned positions of the special tokens and of a square of patches."""

  config: ViTConfig

  @nn.compact
  def __call__(self, rows: int, columns: int):
    c = self.config
    special, side = 1 + c.distillation, c.image_size // c.patch_size
    shape = (1, special + side * side, c.width)
    embedding_1TD = self.param("embedding", nn.initializers.normal(0.02), shape, c.param_dtype)
    if (rows, columns) == (side, side):
      return embedding_1TD.astype(c.dtype)
    # In float32, since bicubic weights in a narrow dtype shift every patch.
    square_PPD = embedding_1TD[0, special:].reshape(side, side, c.width).astype(jnp.float32)
    down, across = bicubic(side, rows), bicubic(side, columns)
    patches_HWD = jnp.einsum("hp,wq,pqd->hwd", down, across, square_PPD)
    patches_1TD = patches_HWD.reshape(1, rows * columns, c.width).astype(c.dtype)
    return jnp.concatenate([embedding_1TD[:, :special].astype(c.dtype), patches_1TD], axis=1)


class ViT(nn.Module):
  """A vision transformer: images to logits, or to its last hidden states without a head.

  images_BHWC: float, normalized as for the checkpoint; H and W are multiples of `patch_size`.
  """

  config: ViTConfig

  def setup(self):
    c = self.config
    self.patches = nn.Conv(
      c.width,
      (c.patch_size,) * 2,
      strides=c.patch_size,
      padding="VALID",
      dtype=c.dtype,
      param_dtype=c.param_dtype,
    )
    tokens = ("class_token", "distillation_token")[: 1 + c.distillation]
    init = nn.initializers.normal(0.02), (1, 1, c.width), c.param_dtype
    self.tokens = [self.param(name, *init) for name in tokens]
    self.positions = Positions(c)
    block = rematerialized(Block, c)
    if c.scan_layers:
      self.blocks = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers
      )(c)
    else:  # their names are block_0, block_1, ...
      self.block = [block(c) for _ in range(c.num_layers)]
    self.norm = _norm(c, None)
    if c.classes and c.pooling == "two heads":
      self.token_head = _dense(c, len(c.classes), None)
      self.distillation_head = _dense(c, len(c.classes), None)
    elif c.classes:
      self.head = _dense(c, len(c.classes), None)

  def __call__(self, images_BHWC):
    tokens_BTD = self.hidden(images_BHWC)
    return self.logits(tokens_BTD) if self.config.classes else tokens_BTD

  def hidden(self, images_BHWC):
    """The tokens after the last norm, [B, T, D], the special ones first.

    Raises ValueError for images whose sides are not multiples of the patch size, and for another
    number of channels.
    """
    c = self.config
    batch, *sides, channels = images_BHWC.shape
    if channels != c.channels or any(side % c.patch_size or not side for side in sides):
      raise ValueError(
        f"images_BHWC: shape {images_BHWC.shape}, and the model takes {c.channels} channels and "
        f"sides that are multiples of {c.patch_size} pixels"
      )
    patches_BTD = self.patches(images_BHWC.astype(c.dtype)).reshape(batch, -1, c.width)
    special = [jnp.broadcast_to(x, (batch, 1, c.width)).astype(c.dtype) for x in self.tokens]
    x_BTD = jnp.concatenate([*special, patches_BTD], axis=1)
    x_BTD += self.positions(*(side // c.patch_size for side in sides))
    x_BTD = c.constrain(x_BTD) if c.constrain else x_BTD
    if c.scan_layers:
      x_BTD, _ = self.blocks(x_BTD, None)
    else:
      for block in self.block:
        x_BTD, _ = block(x_BTD, None)
    return self.norm(x_BTD)

  def logits(self, tokens_BTD):
    """The head, [B, K]."""
    c = self.config
    first_BD = tokens_BTD[:, 0]
    if c.pooling == "two heads":
      return (self.token_head(first_BD) + self.distillation_head(tokens_BTD[:, 1])) / 2
    if c.pooling == "token":
      return self.head(first_BD)
    mean_BD = tokens_BTD[:, 1 + c.distillation :].mean(axis=1)
    return self.head(jnp.concatenate([first_BD, mean_BD], axis=-1))
