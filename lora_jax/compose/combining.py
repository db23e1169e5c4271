"""Adapters made from adapters: combined with weights, scaled, and converted to plain LoRA.

both           = combine([x, y], [0.7, 0.3], combiners.cat)
half           = rescale(x, 0.5)
loras, errors  = to_lora(x, params, rank=16)     # for adapters x of any kind
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import decompositions, tree
from lora_jax.attachment import key_of
from lora_jax.compose.batching import Adapters, check_same_leaf, low_rank
from lora_jax.compose.combiners import Combiner
from lora_jax.weights import Adapted, LowRank, NotFactored, is_weight, materialize, promotion

PyTree = Any


def combine(
  adapters: Sequence[Adapters],
  weights: Sequence[float] | jax.Array,
  method: Combiner,
  *,
  key: jax.Array | None = None,
) -> dict[str, LowRank]:
  """Combines several adapters into one LoRA adapter, computed in at least float32.

  A leaf that only some of them adapt is combined from those. A stack of matrices, such as layers,
  is combined matrix by matrix.

  Args:
    adapters: at least one `{path: adapter}`, of kinds with an exact low-rank form.
    weights: one weight per adapter, of either sign; may be traced.
    method: one of `lora_jax.combiners`, or a function of your own with the same signature.
    key: for methods that drop values at random; each leaf and layer derives its own key from it.

  Raises:
    ValueError: if there is not one weight per adapter, if adapters are for different bases, if a
      kind has no exact low-rank form, or if the method cannot combine them.
  """
  weights = jnp.asarray(weights, jnp.float32)
  if not adapters or weights.shape != (len(adapters),):
    raise ValueError(
      f"{len(adapters)} adapters and weights of shape {weights.shape}; give one adapter or more, "
      "and one weight for each"
    )
  leaves = {}
  for path in dict.fromkeys(path for each in adapters for path in each):
    having = [n for n, each in enumerate(adapters) if path in each]
    at_path = [low_rank(path, adapters[n][path]) for n in having]
    check_same_leaf(path, at_path)
    leaves[path] = (None if key is None else key_of(key, path), at_path, weights[jnp.array(having)])
  for path, leaf in leaves.items():
    try:
      jax.eval_shape(functools.partial(_combined, method), *leaf)
    except ValueError as reason:
      raise ValueError(f"{path}: {reason}") from None
  return {path: _combined(method, *leaf) for path, leaf in leaves.items()}


def rescale(adapters: Adapters, c: float | jax.Array) -> dict[str, Adapted]:
  """Returns the adapters with their changes of the base multiplied by c, which may be traced.

  Raises:
    ValueError: if a kind is not a base plus a change (DoRA).
  """
  return {path: adapter.rescaled(c) for path, adapter in adapters.items()}


def to_lora(
  adapters: Adapters, params: PyTree | None = None, *, rank: int
) -> tuple[dict[str, LowRank], dict[str, jax.Array]]:
  """Converts adapters of any kinds to plain LoRA of at most a given rank.

  An exact low-rank form is truncated from its factors alone, or kept if its rank is small enough.
  For any other kind the change, the merged leaf minus the base in float32, is materialized and
  decomposed, one leaf at a time.

  Args:
    adapters: `{path: adapter}` of any kinds.
    params: the base, for kinds without a low-rank form of their own (DoRA).
    rank: the largest rank of the result.

  Returns:
    The adapters, and for each leaf the Frobenius norm of the error relative to that of the change.

  Raises:
    ValueError: if a kind needs params and there are none, or if a leaf is not a matrix.
  """
  if rank < 1:
    raise ValueError(f"rank {rank} is below 1; use a positive whole number")
  leaves = {} if params is None else tree.flatten(params, is_leaf=is_weight)
  exact = {}
  for path, adapter in adapters.items():
    try:
      exact[path] = adapter.as_low_rank()
    except NotFactored as reason:
      if path not in leaves:
        raise ValueError(
          f"{path}: {reason}; pass the params that it adapts, so that its change can be decomposed"
        ) from None
      _roles(path, adapter, leaves[path])

  def cut(path: str, adapter: Adapted) -> tuple[LowRank, jax.Array]:
    if path in exact:
      return _cut(exact[path], rank)
    leaf = leaves[path]
    return _nearest(_change(path, adapter, leaf), _roles(path, adapter, leaf), rank)

  pairs = {path: cut(path, adapter) for path, adapter in adapters.items()}
  return {path: x for path, (x, _) in pairs.items()}, {path: e for path, (_, e) in pairs.items()}


# ---- one leaf at a time, jitted, so that leaves of one shape are compiled once


@functools.partial(jax.jit, static_argnums=0)
def _combined(
  method: Combiner, key: jax.Array | None, adapters: list[LowRank], weights: jax.Array
) -> LowRank:
  """Combines several adapters of one leaf, matrix by matrix."""
  like = adapters[0]
  matrices = [_as_matrices(adapter) for adapter in adapters]
  keys = None if key is None else jax.random.split(key, len(matrices[0].a))
  made = jax.lax.map(lambda each: method(each[0], each[1], weights), (keys, matrices))
  return _as_leaf(made.a, made.b * made.scale, like)


@functools.partial(jax.jit, static_argnums=1)
def _cut(adapter: LowRank, rank: int) -> tuple[LowRank, jax.Array]:
  """An adapter truncated to a rank, and the relative norm of the error."""
  if adapter.rank <= rank:
    return adapter, jnp.zeros(())
  matrices = _as_matrices(adapter)
  u, s, vt = decompositions.product_svd(matrices.a, matrices.b * adapter.scale, adapter.rank)
  a, b = decompositions.balanced(
    decompositions.Svd(u[..., :rank], s[..., :rank], vt[..., :rank, :])
  )
  return _as_leaf(a, b, adapter), _ratio(s[..., rank:], s)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nearest(delta: jax.Array, roles: str, rank: int) -> tuple[LowRank, jax.Array]:
  """The adapter of a given rank that is nearest to a change, and the relative norm of the error."""
  a, b = decompositions.factorized(
    delta, roles, lambda matrix: decompositions.balanced(decompositions.svd(matrix, rank))
  )
  adapter = LowRank(None, a, b, roles=roles.lstrip("s"))
  found = adapter.attach(jnp.zeros_like(delta), "").delta()
  return adapter, _ratio(delta - found, delta)


def _change(path: str, adapter: Adapted, leaf: Any) -> jax.Array:
  """The change that an adapter makes to a leaf, in at least float32."""
  w = materialize(leaf)
  w = w.astype(promotion.at_least_float32(w.dtype))
  return adapter.attach(w, path).materialize() - w


def _roles(path: str, adapter: Adapted, leaf: Any) -> str:
  """The roles of all axes of a leaf."""
  roles = adapter.roles.rjust(len(leaf.shape), "s")
  if {"i", "o"} <= set(roles):
    return roles
  if len(leaf.shape) == 2:
    return "io"
  raise ValueError(
    f"{path}: {type(adapter).__name__} marks no axis of {tuple(leaf.shape)} as an input or output, "
    "so its change is not a matrix; leave this path out, and keep it unchanged"
  )


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
  size = jnp.linalg.norm(whole.ravel())
  return jnp.linalg.norm(part.ravel()) / jnp.where(size > 0, size, 1)


def _as_matrices(adapter: LowRank) -> LowRank:
  """The same adapter with a [stack, d, rank] and b [stack, rank, k]; one matrix is a stack of 1."""
  stack, inputs, outputs = _sizes(adapter)
  a = adapter.a.reshape(math.prod(stack), math.prod(inputs), adapter.rank)
  b = adapter.b.reshape(math.prod(stack), adapter.rank, math.prod(outputs))
  dtype = promotion.joint(a.dtype, b.dtype, jnp.float32)
  return LowRank(None, a.astype(dtype), b.astype(dtype), adapter.scale)


def _as_leaf(a: jax.Array, b: jax.Array, like: LowRank) -> LowRank:
  """The adapter of a leaf, of any rank, from the factors of its matrices."""
  stack, inputs, outputs = _sizes(like)
  rank = a.shape[-1]
  return LowRank(
    None, a.reshape(*stack, *inputs, rank), b.reshape(*stack, rank, *outputs), roles=like.roles
  )


def _sizes(adapter: LowRank) -> tuple[tuple[int, ...], ...]:
  """The sizes of the stack, input and output axes."""
  stacks = adapter.a.ndim - 1 - adapter.roles.count("i")
  return adapter.a.shape[:stacks], adapter.a.shape[stacks:-1], adapter.b.shape[stacks + 1 :]
