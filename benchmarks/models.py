"""The models to measure: a module, its parameters, a batch and a loss.

small     6 encoder blocks of width 512 with biases: no embedding, no head, linear layers only
smollm2   SmolLM2-135M with its real weights
llama1b   the shape of Llama 3.2 1B, random weights made on the device
tiny      a Llama of two layers, to check in a minute that everything runs
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

import lora_jax
from lora_jax import families
from lora_jax.io import pretrained
from lora_jax.models import llama

PyTree = Any

EDITORIALS = (
  "pypi://vaderSentiment==3.3.2/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/"
  "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
)
"""Running text to measure on: snippets of editorials, with the columns id, rating and text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One model on one batch.

  module: the model; `module.config` has the fields `dtype` and `remat_policy`.
  params: the base, without an outer {"params": ...}.
  inputs, targets: the batch, the same one at each step.
  loss: `(outputs, targets) -> scalar`.
  floor: a pattern for the leaves that train in the floor's row: the cheapest ones that need a
    backward pass through the whole model.
  """

  module: nn.Module
  params: PyTree
  inputs: jax.Array
  targets: jax.Array
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  floor: str

  @property
  def is_language_model(self) -> bool:
    """True if `transformers` supports the model."""
    return hasattr(self.module.config, "vocab_size")

  def keeping_products(self) -> nn.Module:
    """The module with blocks that save only their matrix products and recompute the rest.

    On CPU this saves memory only with scanned layers: in unrolled layers XLA merges the
    recomputation with the first computation.
    """
    config = dataclasses.replace(self.module.config, remat_policy=lora_jax.products_saveable)
    return self.module.clone(config=config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """The shape of the small encoder."""

  width: int = 512
  mlp_width: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  scan_layers: bool = False
  dtype: DTypeLike = jnp.float32
  remat_policy: Callable[..., bool] | None = None


class EncoderBlock(nn.Module):
  """A pre-norm block: attention to all positions, then an MLP, every layer with a bias."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x_BTD, _):
    c = self.config

    def dense(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, dtype=c.dtype, param_dtype=c.dtype, name=name)

    def norm(name: str) -> nn.LayerNorm:
      return nn.LayerNorm(dtype=c.dtype, param_dtype=c.dtype, name=name)

    y_BTD = norm("attn_norm")(x_BTD)
    query_BTNH, key_BTNH, value_BTNH = (
      dense(c.width, name)(y_BTD).reshape(*y_BTD.shape[:2], c.num_heads, -1)
      for name in ("query", "key", "value")
    )
    y_BTNH = jax.nn.dot_product_attention(query_BTNH, key_BTNH, value_BTNH)
    x_BTD = x_BTD + dense(c.width, "out")(y_BTNH.reshape(x_BTD.shape))
    y_BTE = nn.gelu(dense(c.mlp_width, "up")(norm("mlp_norm")(x_BTD)))
    return x_BTD + dense(c.width, "down")(y_BTE), None


class Encoder(nn.Module):
  """A stack of blocks from activations to activations."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    block = EncoderBlock
    if c.remat_policy is not None:
      block = nn.remat(EncoderBlock, policy=c.remat_policy, prevent_cse=not c.scan_layers)
    if c.scan_layers:
      block = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers
      )
      return block(c, name="blocks")(x_BTD, None)[0]
    for i in range(c.num_layers):
      x_BTD, _ = block(c, name=f"block_{i}")(x_BTD, None)
    return x_BTD


def small(dtype: DTypeLike, batch: int, length: int, scan_layers: bool) -> Case:
  """The encoder of the first measurements."""
  config = EncoderConfig(dtype=dtype, scan_layers=scan_layers)
  shape = (batch, length, config.width)
  keys = jax.random.split(jax.random.key(0), 3)
  inputs, targets = (jax.random.normal(key, shape, dtype) for key in keys[:2])
  module = Encoder(config)
  return Case(
    module=module,
    params=jax.jit(module.init)(keys[2], inputs)["params"],
    inputs=inputs,
    targets=targets,
    loss=lambda outputs, targets: jnp.mean(jnp.square((outputs - targets).astype(jnp.float32))),
    floor=r".*/bias",
  )


def smollm2(dtype: DTypeLike, batch: int, length: int, scan_layers: bool) -> Case:
  """SmolLM2-135M-Instruct."""
  model = pretrained.load(pretrained.DEFAULT, dtype=dtype, scan_layers=scan_layers)
  return language_model(model.config, model.params, batch, length)


def llama1b(dtype: DTypeLike, batch: int, length: int, scan_layers: bool) -> Case:
  """1.2 billion parameters: 16 layers, 8 of 32 heads for keys and values, tied head."""
  config = llama.LlamaConfig(
    vocab_size=128256,
    width=2048,
    mlp_width=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_length=8192,
    rope_theta=500000.0,
    tie_embeddings=True,
    scan_layers=scan_layers,
    dtype=dtype,
    param_dtype=dtype,
  )
  return language_model(config, None, batch, length)


def tiny(dtype: DTypeLike, batch: int, length: int, scan_layers: bool) -> Case:
  """Two layers of width 64."""
  config = llama.LlamaConfig(
    vocab_size=256,
    width=64,
    mlp_width=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=128,
    tie_embeddings=True,
    scan_layers=scan_layers,
    dtype=dtype,
    param_dtype=dtype,
  )
  return language_model(config, None, batch, length)


def language_model(config: families.Config, params: PyTree | None, batch: int, length: int) -> Case:
  """A decoder with the loss of the next token at every position; random if params is None."""
  keys = jax.random.split(jax.random.key(0), 2)
  tokens = jax.random.randint(keys[0], (batch, length + 1), 0, config.vocab_size)
  module = families.family_of(config).make_model(config)
  if params is None:
    params = jax.jit(module.init)(keys[1], tokens[:, :-1])["params"]
  return Case(
    module=module,
    params=params,
    inputs=tokens[:, :-1],
    targets=tokens[:, 1:],
    loss=lambda logits, targets: jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    ),
    floor=r".*norm/scale",
  )


@dataclasses.dataclass(frozen=True)
class Model:
  """A model by name: its constructor, and the default batch."""

  make: Callable[[DTypeLike, int, int, bool], Case]
  batch: int
  length: int


MODELS = {
  "small": Model(small, batch=4, length=128),
  "smollm2": Model(smollm2, batch=8, length=64),
  "llama1b": Model(llama1b, batch=8, length=512),
  "tiny": Model(tiny, batch=2, length=16),
}
