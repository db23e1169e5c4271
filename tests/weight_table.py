"""The table of weights: each row makes, from a leaf and its roles, a Weight that stands for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LowRank, tree
from lora_jax.weights import DoRA, Factored, Gated, LoKr, input_norms

RANK = 2


class Kind(NamedTuple):
  """One kind of weight.

  make: (w, roles) -> Weight.
  dtype: the coarsest dtype of the arithmetic, for the tolerance.
  model_dtype: of the inputs and of the leaves that are no Weights.
  """

  make: Callable[[jax.Array, str], Any]
  dtype: str = "float32"
  model_dtype: str = "float32"


def factors(shape, roles: str, seed: int = 0, rank: int = RANK) -> tuple[jax.Array, jax.Array]:
  """Random float32 factors for a leaf; the product is about as large as the leaf."""
  stack, inputs, outputs = (
    tuple(n for n, x in zip(shape, roles, strict=True) if x == role) for role in "sio"
  )
  rng = np.random.default_rng([seed, *shape])
  a = rng.standard_normal((*stack, *inputs, rank)) * 0.3
  b = rng.standard_normal((*stack, rank, *outputs))
  return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def low_rank(w, roles: str, seed: int = 0) -> LowRank:
  a, b = factors(w.shape, roles, seed)
  return LowRank(w, a, b, scale=0.5, roles=roles.lstrip("s"))


def gated(w, roles: str) -> Gated:
  """Twice the rank, the first half of it open and the rest shut."""
  a, b = factors(w.shape, roles, rank=2 * RANK)
  gate = jnp.broadcast_to(
    jnp.repeat(jnp.array([0.5, 0.0]), RANK), (*a.shape[: roles.count("s")], 2 * RANK)
  )
  return Gated(w, a, b, scale=0.5, gate=gate, roles=roles.lstrip("s"))


def dora(w, roles: str) -> DoRA:
  """With lengths that are not those of the base."""
  a, b = factors(w.shape, roles)
  norm = input_norms(w, roles)
  magnitude = norm * jnp.linspace(0.5, 2.0, norm.size).reshape(norm.shape)
  return DoRA(w, a, b, magnitude, norm, scale=0.5, roles=roles.lstrip("s"))


def lokr(w, roles: str) -> LoKr:
  """With factors of rank one, so that its low-rank form has a small rank too."""
  adapter = lora_jax.LoKr(rank=1, alpha=0.5).init(jax.random.key(0), "", w, roles)
  trained = jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapter)
  return trained.attach(w, "")


def factored(w, roles: str) -> Factored:
  a, b = factors(w.shape, roles)
  return Factored(a.astype(w.dtype), b.astype(w.dtype), roles=roles.lstrip("s"))


WEIGHTS = {
  "float32": Kind(low_rank),
  "nested": Kind(lambda w, roles: low_rank(low_rank(w, roles, seed=1), roles)),
  "bfloat16-base": Kind(lambda w, roles: low_rank(w.astype(jnp.bfloat16), roles), "bfloat16"),
  "bfloat16-model": Kind(
    lambda w, roles: low_rank(w.astype(jnp.bfloat16), roles), "bfloat16", "bfloat16"
  ),
  "gated": Kind(gated),
  "dora": Kind(dora),
  "lokr": Kind(lokr),
  "factored": Kind(factored),
  "adapted-factored": Kind(lambda w, roles: low_rank(factored(w, roles), roles, seed=1)),
}


def with_weights(params, roles: dict[str, str], kind: Kind):
  """The params with Weights at the paths of `roles`."""

  def leaf(path, x):
    if path in roles:
      return kind.make(x, roles[path])
    return x.astype(kind.model_dtype) if x.dtype == jnp.float32 else x

  return tree.map_with_path(leaf, params)
