"""The Llama family of decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    config = llama.LlamaConfig(vocab_size=256, width=64, mlp_width=192, num_layers=2, num_heads=4,
                               num_kv_heads=2, head_dim=16, max_length=128)
    model = llama.Llama(config)
    params = model.init(jax.random.key(0), tokens_BT)["params"]
    logits_BTV = model.apply({"params": params}, tokens_BT)

    cache = llama.init_cache(config, batch_size, max_length, jnp.float32)
    logits_BTV, cache = model.apply({"params": params}, tokens_BT, cache=cache)

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (section 2.2), and its
grouped-query successors. Shapes are written as suffixes:

    B batch        T tokens of a call    S slots of the cache    C chosen positions
    D width        E width of the MLP    V vocabulary            H features of a head
    N query heads  K key/value heads     R rotations, H / 2      L layers
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
  """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, section 3)."""

  factor: float

  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    return frequencies_R / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
  """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, a ramp in between.

  factor: by how much the context was lengthened.
  low_freq_factor: a wavelength over `original_length / low_freq_factor` tokens is scaled in full.
  high_freq_factor: a wavelength under `original_length / high_freq_factor` tokens is kept.
  original_length: the context length before, in tokens.
  """

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192

  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    turns_R = self.original_length * frequencies_R / (2 * np.pi)
    ramp = (turns_R - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept_R = np.clip(ramp, 0, 1)
    return kept_R * frequencies_R + (1 - kept_R) * frequencies_R / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """The shape of a Llama and how it is computed.

  vocab_size, width, mlp_width, num_layers: V, D, E and L.
  num_heads, num_kv_heads, head_dim: N, K and H; each key/value head serves N / K query heads.
  max_length: the longest context that the model was trained for, in tokens; not enforced.
  rope_theta: the base of the rotary frequencies, theta ** (-2 r / H).
  rope_scaling: how they are stretched for longer contexts, or None.
  norm_eps: added to the mean square in RMSNorm.
  tie_embeddings: the head is the transposed embedding and has no parameters.
  scan_layers: one `blocks` under nn.scan, its leaves stacked to (L, ...), and not L named blocks.
  remat_policy: None keeps every activation for the backward pass; a function from
    jax.checkpoint_policies says which to keep, the others are computed again.
  dtype: of the arithmetic and of the logits (norms, rotations and softmax are float32 inside).
  param_dtype: of the parameters that `init` makes.

  Raises ValueError where the numbers do not fit each other.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_length: int
  rope_theta: float = 10000.0
  rope_scaling: LinearRope | Llama3Rope | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and not (isinstance(value, int) and value > 0):
        raise ValueError(f"LlamaConfig: {field.name} must be a positive integer, not {value!r}")
      if field.type is float and not (isinstance(value, int | float) and value > 0):
        raise ValueError(f"LlamaConfig: {field.name} must be a positive number, not {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"LlamaConfig: num_heads {self.num_heads} is not a multiple of "
        f"num_kv_heads {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"LlamaConfig: head_dim {self.head_dim} is odd; rotary positions turn pairs")


class KVCache(NamedTuple):
  """One layer's keys and values; slot j holds the token at position j."""

  key_BSKH: jax.Array
  value_BSKH: jax.Array


Cache = dict[str, KVCache]
"""The caches of all layers, named as the blocks are: `block_{i}`, or `blocks` with a leading L."""


def init_cache(
  config: LlamaConfig, batch_size: int, max_length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
  """Returns an empty cache.

  config: of the model that will fill it.
  batch_size: B.
  max_length: S, the largest position that will be used, plus one. A key past it is dropped.
  dtype: of keys and values; the model's `config.dtype` loses nothing.
  """
  shape = (batch_size, max_length, config.num_kv_heads, config.head_dim)

  def empty(*leading: int) -> KVCache:
    return KVCache(jnp.zeros(leading + shape, dtype), jnp.zeros(leading + shape, dtype))

  if config.scan_layers:
    return {"blocks": empty(config.num_layers)}
  return {f"block_{i}": empty() for i in range(config.num_layers)}


class Rotation(NamedTuple):
  """The rotary angles of each position, computed once a call for all layers."""

  cos_BTR: jax.Array
  sin_BTR: jax.Array


def rotation(config: LlamaConfig, positions_BT: jax.Array) -> Rotation:
  """Returns cos and sin of `position * frequency` in float32 (Su et al. 2021, section 3.2.2)."""
  frequencies_R = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
  if config.rope_scaling is not None:
    frequencies_R = config.rope_scaling.scale(frequencies_R)
  angles_BTR = positions_BT[..., None] * jnp.asarray(frequencies_R, jnp.float32)
  return Rotation(jnp.cos(angles_BTR), jnp.sin(angles_BTR))


def rotate(x_BTNH: jax.Array, turn: Rotation) -> jax.Array:
  """Turns the pairs (x[r], x[r + H / 2]) by the angles of their positions."""
  cos_BT1R, sin_BT1R = turn.cos_BTR[:, :, None], turn.sin_BTR[:, :, None]
  x_BTNR, y_BTNR = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = (x_BTNR * cos_BT1R - y_BTNR * sin_BT1R, y_BTNR * cos_BT1R + x_BTNR * sin_BT1R)
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def _dense(config: LlamaConfig, features: int, name: str) -> nn.Dense:
  return nn.Dense(
    features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
  return nn.RMSNorm(
    epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, turn: Rotation, cache: KVCache | None):
    c = self.config

    def heads(name: str, number: int) -> jax.Array:
      projected = _dense(c, number * c.head_dim, name)(x_BTD)
      return projected.reshape(*x_BTD.shape[:2], number, c.head_dim)

    query_BTNH = rotate(heads("query", c.num_heads), turn)
    key_BTKH = rotate(heads("key", c.num_kv_heads), turn)
    value_BTKH = heads("value", c.num_kv_heads)

    if cache is None:
      out_BTNH = jax.nn.dot_product_attention(query_BTNH, key_BTKH, value_BTKH, is_causal=True)
    else:
      cache = _write(cache, positions_BT, key_BTKH, value_BTKH)
      slots_S = jnp.arange(cache.key_BSKH.shape[1])
      visible_B1TS = (slots_S <= positions_BT[..., None])[:, None]
      out_BTNH = jax.nn.dot_product_attention(
        query_BTNH,
        cache.key_BSKH.astype(c.dtype),
        cache.value_BSKH.astype(c.dtype),
        mask=visible_B1TS,
      )
    out_BTD = _dense(c, c.width, "out")(out_BTNH.reshape(*x_BTD.shape[:2], -1))
    return out_BTD, cache


def _write(cache: KVCache, positions_BT, key_BTKH, value_BTKH) -> KVCache:
  rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
  return KVCache(
    cache.key_BSKH.at[rows_B1, positions_BT].set(key_BTKH.astype(cache.key_BSKH.dtype)),
    cache.value_BSKH.at[rows_B1, positions_BT].set(value_BTKH.astype(cache.value_BSKH.dtype)),
  )


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, section 2)."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    gate_BTE = _dense(c, c.mlp_width, "gate")(x_BTD)
    up_BTE = _dense(c, c.mlp_width, "up")(x_BTD)
    return _dense(c, c.width, "down")(nn.silu(gate_BTE) * up_BTE)


class Block(nn.Module):
  """One pre-norm layer: attention, then the MLP, each added to the residual stream."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, turn: Rotation, cache: KVCache | None):
    c = self.config
    attended_BTD, cache = Attention(c, name="attn")(
      _norm(c, "attn_norm")(x_BTD), positions_BT, turn, cache
    )
    x_BTD = x_BTD + attended_BTD
    x_BTD = x_BTD + Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x_BTD))
    return x_BTD, cache


class Llama(nn.Module):
  """A decoder: tokens in, next-token logits out.

  tokens_BT: token ids; right padding needs no mask, for no token looks to its right.
  positions_BT: position of each token, 0 ... T-1 by default. With a cache they are also the slots
    where keys and values are written, and a token at position p sees the slots 0 ... p: rows of
    different length decode together, each at its own position.
  at_BC: indices into T; the head is computed at these tokens only. None: at all.
  cache: from `init_cache` or from the call before.

  Returns logits_BTV (logits_BCV with `at_BC`); with a cache, the pair (logits, new cache).
  """

  config: LlamaConfig

  @nn.compact
  def __call__(self, tokens_BT, *, positions_BT=None, at_BC=None, cache: Cache | None = None):
    c = self.config
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    turn = rotation(c, positions_BT)
    embed = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.param_dtype, name="embed")
    x_BTD = embed(tokens_BT)

    block = Block
    if c.remat_policy is not None:
      # A scan keeps the recomputation apart from the first computation by itself.
      block = nn.remat(Block, policy=c.remat_policy, prevent_cse=not c.scan_layers)
    if c.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        length=c.num_layers,
      )
      x_BTD, layers = scanned(c, name="blocks")(
        x_BTD, positions_BT, turn, None if cache is None else cache["blocks"]
      )
      new_cache = {"blocks": layers}
    else:
      new_cache = {}
      for name in (f"block_{i}" for i in range(c.num_layers)):
        x_BTD, new_cache[name] = block(c, name=name)(
          x_BTD, positions_BT, turn, None if cache is None else cache[name]
        )

    if at_BC is not None:
      x_BTD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1)
    x_BTD = _norm(c, "norm")(x_BTD)
    logits_BTV = embed.attend(x_BTD) if c.tie_embeddings else _dense(c, c.vocab_size, "head")(x_BTD)
    return logits_BTV if cache is None else (logits_BTV, new_cache)


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
  """Returns {slash path: shape} of the model's parameters, without making any."""
  tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens_BT)
  leaves = traverse_util.flatten_dict(variables["params"], sep="/")
  return {path: leaf.shape for path, leaf in leaves.items()}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters for `scan_layers=True`: `block_0`, `block_1`, ... become `blocks`."""
  rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
  blocks = [params[f"block_{i}"] for i in range(len(params) - len(rest))]
  return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters for `scan_layers=False`: the inverse of `stack_layers`."""
  rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
  num_layers = len(jax.tree.leaves(params["blocks"])[0])
  layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(num_layers)]
  return rest | {f"block_{i}": layer for i, layer in enumerate(layers)}
