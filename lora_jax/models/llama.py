"""The Llama family of decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    config = llama.LlamaConfig(vocab_size=256, width=64, mlp_width=192, num_layers=2, num_heads=4,
                               num_kv_heads=2, head_dim=16, max_length=128)
    model = llama.Llama(config)
    params = model.init(jax.random.key(0), tokens_BT)["params"]
    logits_BTV = model.apply({"params": params}, tokens_BT)

    cache = llama.init_cache(config, batch_size, max_length, jnp.float32)
    logits_BTV, cache = model.apply({"params": params}, tokens_BT, cache=cache)

    hidden_BTD = model.apply({"params": params}, tokens_BT, method="hidden")
    logits_BTV = model.apply({"params": params}, hidden_BTD, method="logits")

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (section 2.2), and its
grouped-query successors. Shapes are written as suffixes:

    B batch        T tokens of a call    S slots of the cache    C chosen positions
    D width        E width of the MLP    V vocabulary            H features of a head
    N query heads  K key/value heads     R rotations, H / 2      L layers
    G features of a head's values, H unless the model was compressed
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax.models.rope import LinearRope, Llama3Rope, rotary_frequencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """The shape of a Llama and how it is computed.

  vocab_size, width, mlp_width, num_layers: V, D, E and L.
  num_heads, num_kv_heads, head_dim: N, K and H; each key/value head serves N / K query heads.
  value_dim: features of a head's values, G, where they are fewer than H; None: as many.
  max_length: the longest context that the model was trained for, in tokens; not enforced.
  rope_theta: the base of the rotary frequencies, theta ** (-2 r / H).
  rope_scaling: how they are stretched for longer contexts, or None.
  norm_eps: added to the mean square in RMSNorm.
  tie_embeddings: the head is the transposed embedding and has no parameters.
  scan_layers: one `blocks` under nn.scan, its leaves stacked to (L, ...), and not L named blocks.
  remat_policy: None keeps every activation for the backward pass; a function from
    jax.checkpoint_policies says which to keep, the others are computed again.
  constrain: what the residual stream x_BTD passes through before, between and after the blocks:
    a sharding constraint, without which the compiler may split D over the devices that hold
    different rows of B. None: nothing.
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
  value_dim: int | None = None
  rope_theta: float = 10000.0
  rope_scaling: LinearRope | Llama3Rope | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
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
    if self.value_dim is not None and not 0 < self.value_dim <= self.head_dim:
      raise ValueError(
        f"LlamaConfig: value_dim {self.value_dim} must be from 1 to head_dim {self.head_dim}"
      )
    if self.head_dim % 2:
      raise ValueError(f"LlamaConfig: head_dim {self.head_dim} is odd; rotary positions turn pairs")


def value_features(config: LlamaConfig) -> int:
  """G, the features of a head's values."""
  return config.head_dim if config.value_dim is None else config.value_dim


class KVCache(NamedTuple):
  """One layer's keys and values; slot j holds the token at position j."""

  key_BSKH: jax.Array
  value_BSKG: jax.Array


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
  shape = (batch_size, max_length, config.num_kv_heads)

  def empty(*leading: int) -> KVCache:
    key_shape, value_shape = (
      (*leading, *shape, config.head_dim),
      (*leading, *shape, value_features(config)),
    )
    return KVCache(jnp.zeros(key_shape, dtype), jnp.zeros(value_shape, dtype))

  if config.scan_layers:
    return {"blocks": empty(config.num_layers)}
  return {f"block_{i}": empty() for i in range(config.num_layers)}


class Rotation(NamedTuple):
  """The rotary angles of each position, computed once a call for all layers."""

  cos_BTR: jax.Array
  sin_BTR: jax.Array


def rotation(config: LlamaConfig, positions_BT: jax.Array) -> Rotation:
  """Returns cos and sin of `position * frequency` in float32 (Su et al. 2021, section 3.2.2)."""
  frequencies_R = rotary_frequencies(config.rope_theta, config.head_dim)
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


def _dense(config: LlamaConfig, features: int, name: str | None) -> nn.Dense:
  return nn.Dense(
    features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _norm(config: LlamaConfig, name: str | None) -> nn.RMSNorm:
  return nn.RMSNorm(
    epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions.

  same_B1TT: whether a token may see another, if that is before it; None: every one.
  """

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, turn: Rotation, same_B1TT, cache: KVCache | None):
    c = self.config

    def heads(name: str, number: int, features: int) -> jax.Array:
      projected = _dense(c, number * features, name)(x_BTD)
      return projected.reshape(*x_BTD.shape[:2], number, features)

    query_BTNH = rotate(heads("query", c.num_heads, c.head_dim), turn)
    key_BTKH = rotate(heads("key", c.num_kv_heads, c.head_dim), turn)
    value_BTKG = heads("value", c.num_kv_heads, value_features(c))

    if cache is None:
      out_BTNG = _attend(query_BTNH, key_BTKH, value_BTKG, mask=same_B1TT, is_causal=True)
    else:
      cache = _write(cache, positions_BT, key_BTKH, value_BTKG)
      slots_S = jnp.arange(cache.key_BSKH.shape[1])
      visible_B1TS = (slots_S <= positions_BT[..., None])[:, None]
      out_BTNG = _attend(
        query_BTNH,
        cache.key_BSKH.astype(c.dtype),
        cache.value_BSKG.astype(c.dtype),
        mask=visible_B1TS,
      )
    out_BTD = _dense(c, c.width, "out")(out_BTNG.reshape(*x_BTD.shape[:2], -1))
    return out_BTD, cache


def _attend(query_BTNH, key_BSKH, value_BSKG, **options) -> jax.Array:
  """Attention with values of their own size, which JAX's takes filled up with zeros."""
  features, missing = value_BSKG.shape[-1], key_BSKH.shape[-1] - value_BSKG.shape[-1]
  if missing:
    value_BSKG = jnp.pad(value_BSKG, ((0, 0), (0, 0), (0, 0), (0, missing)))
  out_BTNH = jax.nn.dot_product_attention(query_BTNH, key_BSKH, value_BSKG, **options)
  return out_BTNH[..., :features] if missing else out_BTNH


def _write(cache: KVCache, positions_BT, key_BTKH, value_BTKG) -> KVCache:
  rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
  return KVCache(
    cache.key_BSKH.at[rows_B1, positions_BT].set(key_BTKH.astype(cache.key_BSKH.dtype)),
    cache.value_BSKG.at[rows_B1, positions_BT].set(value_BTKG.astype(cache.value_BSKG.dtype)),
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
  def __call__(self, x_BTD, positions_BT, turn: Rotation, same_B1TT, cache: KVCache | None):
    c = self.config
    attended_BTD, cache = Attention(c, name="attn")(
      _norm(c, "attn_norm")(x_BTD), positions_BT, turn, same_B1TT, cache
    )
    x_BTD = x_BTD + attended_BTD
    x_BTD = x_BTD + Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x_BTD))
    return c.constrain(x_BTD) if c.constrain else x_BTD, cache


class Llama(nn.Module):
  """A decoder: tokens in, next-token logits out; `logits(hidden(tokens))`, two methods.

  tokens_BT: token ids; right padding needs no mask, for no token looks to its right.
  positions_BT: position of each token, by default 0 ... T-1, or from 0 in each segment. With a
    cache they are also the slots where keys and values are written, and a token at position p sees
    the slots 0 ... p: rows of different length decode together, each at its own position.
  segments_BT: the number of the text that a token belongs to, where a row holds several, one after
    another; no token sees another text's. None: one text a row. Not with a cache.
  at_BC: indices into T; the head is computed at these tokens only. None: at all.
  cache: from `init_cache` or from the call before.

  Returns logits_BTV (logits_BCV with `at_BC`); with a cache, the pair (logits, new cache).
  """

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.param_dtype)
    block = Block
    if c.remat_policy is not None:
      # A scan keeps the recomputation apart from the first computation by itself.
      block = nn.remat(Block, policy=c.remat_policy, prevent_cse=not c.scan_layers)
    if c.scan_layers:
      self.blocks = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
        length=c.num_layers,
      )(c)
    else:
      self.block = [block(c) for _ in range(c.num_layers)]  # their names are block_0, block_1, ...
    self.norm = _norm(c, None)
    if not c.tie_embeddings:
      self.head = _dense(c, c.vocab_size, None)

  def __call__(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, at_BC=None, cache: Cache | None = None
  ):
    out = self.hidden(
      tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, at_BC=at_BC, cache=cache
    )
    if cache is None:
      return self.logits(out)
    hidden_BTD, cache = out
    return self.logits(hidden_BTD), cache

  def hidden(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, at_BC=None, cache: Cache | None = None
  ):
    """What the head is applied to, normalised: the same as the model itself, less the logits."""
    if segments_BT is not None and cache is not None:
      raise ValueError("segments_BT: a cache holds one text a row; decode without segments")
    if positions_BT is None:
      positions_BT = _positions(tokens_BT, segments_BT)
    same_B1TT = None
    if segments_BT is not None:
      same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    turn = rotation(self.config, positions_BT)
    x_BTD = self.embed(tokens_BT)
    x_BTD = self.config.constrain(x_BTD) if self.config.constrain else x_BTD

    if self.config.scan_layers:
      x_BTD, layers = self.blocks(
        x_BTD, positions_BT, turn, same_B1TT, None if cache is None else cache["blocks"]
      )
      new_cache = {"blocks": layers}
    else:
      new_cache = {}
      for block in self.block:
        x_BTD, new_cache[block.name] = block(
          x_BTD, positions_BT, turn, same_B1TT, None if cache is None else cache[block.name]
        )

    if at_BC is not None:
      x_BTD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1)
    x_BTD = self.norm(x_BTD)
    return x_BTD if cache is None else (x_BTD, new_cache)

  def logits(self, hidden_BTD):
    """The head."""
    return self.embed.attend(hidden_BTD) if self.config.tie_embeddings else self.head(hidden_BTD)


def _positions(tokens_BT, segments_BT) -> jax.Array:
  """Positions that start from 0 in each row, or in each segment."""
  places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  if segments_BT is None:
    return places_BT
  starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
  return places_BT - jax.lax.cummax(jnp.where(starts_BT, places_BT, 0), axis=1)


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


def layer_paths(path: str, num_layers: int) -> list[str]:
  """Returns the paths in the unstacked tree of which a leaf is made: L for one that is stacked."""
  if not path.startswith("blocks/"):
    return [path]
  return [path.replace("blocks", f"block_{i}", 1) for i in range(num_layers)]


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters for `scan_layers=False`: the inverse of `stack_layers`."""
  rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
  num_layers = len(jax.tree.leaves(params["blocks"])[0])
  layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(num_layers)]
  return rest | {f"block_{i}": layer for i, layer in enumerate(layers)}
