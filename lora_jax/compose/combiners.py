"""Ways to combine several LoRA adapters into one, for `lora_jax.combine`.

    combine([x, y], [0.7, 0.3], combiners.cat)
    combine([x, y], [0.7, 0.3], combiners.svd(rank=8))
    combine([x, y], [0.7, 0.3], combiners.on_factors(combiners.ties(density=0.2)))
    combine([x, y], [0.7, 0.3], combiners.on_delta(combiners.ties(density=0.2), rank=8))

`cat` is the weighted sum of the changes D = scale * A B, exactly; `svd` is its best approximation
of a given rank. Every other method mixes arrays elementwise. The arrays are either the factors, A
with A and B with B, or the changes themselves, which an SVD then factors again:

    mix                          on the factors       on the changes
    linear                       linear               svd
    magnitude_prune(density)     magnitude_prune      magnitude_prune_svd
    ties(density)                ties                 ties_svd
    dare_linear(density)         dare_linear          dare_linear_svd
    dare_ties(density)           dare_ties            dare_ties_svd

The names on the right are those of PEFT's `add_weighted_adapter`; the results are the same.

A combiner is `(key, adapters, weights) -> adapter` for one matrix: LowRanks without a base, with a
[d, r] and b [r, k]. A mix is `(key, arrays [n, ...], weights [n]) -> array [...]`. Any function of
that signature can be used.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lora_jax import decompositions
from lora_jax.weights import LowRank

Combiner = Callable[[jax.Array | None, Sequence[LowRank], jax.Array], LowRank]
Mix = Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array]
Elect = Callable[[jax.Array], jax.Array]


# ---- combiners


def cat(key: jax.Array | None, adapters: Sequence[LowRank], weights: jax.Array) -> LowRank:
  """The weighted sum of the changes, exactly: A = [w1 s1 A1, w2 s2 A2, ...], B = [B1; B2; ...].

  The rank is the sum of the ranks.
  """
  del key
  a = [x.a * (weight * x.scale) for x, weight in zip(adapters, weights, strict=True)]
  return _adapter(jnp.concatenate(a, axis=1), jnp.concatenate([x.b for x in adapters], axis=0))


def svd(rank: int | None = None) -> Combiner:
  """Returns the combiner for the best approximation of the weighted sum, from the factors alone.

  Args:
    rank: the rank of the approximation; None for the largest of the adapters' ranks.
  """
  _check_rank(rank)

  def combiner(key, adapters, weights):
    whole = cat(key, adapters, weights)
    triplets = decompositions.product_svd(whole.a, whole.b, rank or _largest_rank(adapters))
    return _adapter(*decompositions.balanced(triplets))

  return combiner


def on_factors(mix: Mix) -> Combiner:
  """Returns the combiner that mixes the factors, each with the root of its weight.

      A = mix(A1, A2, ...; sign(v) sqrt|v|)   B = mix(B1, B2, ...; sqrt|v|)   v = weight * scale

  It is cheap and keeps the rank, but it is not the sum of the changes, not even with `linear`: the
  product of two sums also has the terms sqrt(v1 v2) A1 B2 and sqrt(v1 v2) A2 B1. It is close to the
  sum for adapters with a common origin; for others use `cat`, `svd` or `on_delta`.

  Raises, when used:
    ValueError: if the ranks differ.
  """

  def combiner(key, adapters, weights):
    ranks = [x.rank for x in adapters]
    if len(set(ranks)) > 1:
      raise ValueError(
        f"factors of the ranks {', '.join(map(str, ranks))} cannot be mixed elementwise; "
        "use cat, svd or on_delta"
      )
    values = weights * jnp.asarray([x.scale for x in adapters], weights.dtype)
    root = jnp.sqrt(jnp.abs(values))
    key_a, key_b = (None, None) if key is None else jax.random.split(key)
    a = mix(key_a, jnp.stack([x.a for x in adapters]), jnp.sign(values) * root)
    b = mix(key_b, jnp.stack([x.b for x in adapters]), root)
    return _adapter(a, b)

  return combiner


def on_delta(mix: Mix, rank: int | None = None) -> Combiner:
  """Mixes the changes and truncates to a rank; materializes one d×k array per adapter.

  Args:
    mix: the function that mixes arrays.
    rank: the rank of the result; None for the largest of the adapters' ranks.
  """
  _check_rank(rank)

  def combiner(key, adapters, weights):
    deltas = [x.scale * jnp.matmul(x.a, x.b, precision="highest") for x in adapters]
    mixed = mix(key, jnp.stack(deltas), weights)
    triplets = decompositions.svd(mixed, rank or _largest_rank(adapters))
    return _adapter(*decompositions.balanced(triplets))

  return combiner


# ---- mixes


def linear(key: jax.Array | None, arrays: jax.Array, weights: jax.Array) -> jax.Array:
  """The weighted sum."""
  del key
  return jnp.tensordot(weights.astype(arrays.dtype), arrays, axes=1, precision="highest")


def magnitude_prune(density: float) -> Mix:
  """The weighted sum of the arrays, with the smallest values of each set to zero.

  Args:
    density: the fraction of each array's values that is kept, in (0, 1].
  """
  _check_density(density)
  return lambda key, arrays, weights: linear(key, _largest(arrays, density), weights)


def by_total(arrays: jax.Array) -> jax.Array:
  """Elects the sign of the arrays' sum, as the paper does."""
  return jnp.sum(arrays, axis=0)


def by_frequency(arrays: jax.Array) -> jax.Array:
  """Elects the sign of the majority of the arrays."""
  return jnp.sum(jnp.sign(arrays), axis=0)


def ties(density: float, elect: Elect = by_total) -> Mix:
  """Trims, elects a sign for every element, and averages the values that agree with it.

  The smallest values are set to zero. Then the mean of the weighted arrays is taken, elementwise,
  over the arrays whose sign is the elected one. Source: Yadav et al. 2023, TIES-Merging, arXiv
  2306.01708, section 3; the weights within the mean are PEFT's.

  Args:
    density: the fraction of each array's values that is kept, in (0, 1]; the paper keeps 0.2.
    elect: `(arrays [n, ...]) -> [...]` whose sign is the elected one; the paper's is `by_total`.
  """
  _check_density(density)
  return lambda key, arrays, weights: _agreeing(_largest(arrays, density), weights, elect)


def dare_linear(density: float) -> Mix:
  """The weighted sum of the arrays after random dropout, with kept values scaled up.

  Source: Yu et al. 2023, DARE, arXiv 2311.03099, section 3.2. It needs a key.

  Args:
    density: the probability of a value to be kept, in (0, 1]; kept values are divided by it.
  """
  _check_density(density)
  return lambda key, arrays, weights: linear(None, _thinned(key, arrays, density), weights)


def dare_ties(density: float, elect: Elect = by_total) -> Mix:
  """`ties` with DARE's random dropout instead of trimming. It needs a key.

  Args:
    density: as in `dare_linear`.
    elect: as in `ties`.
  """
  _check_density(density)
  return lambda key, arrays, weights: _agreeing(_thinned(key, arrays, density), weights, elect)


def _largest(arrays: jax.Array, density: float) -> jax.Array:
  """Keeps the fraction `density` of the largest values of each array; the others become zero."""
  flat = arrays.reshape(len(arrays), -1)
  _, places = jax.lax.top_k(jnp.abs(flat), int(density * flat.shape[1]))
  kept = jnp.zeros(flat.shape, bool).at[jnp.arange(len(flat))[:, None], places].set(True)
  return jnp.where(kept, flat, 0).reshape(arrays.shape)


def _thinned(key: jax.Array | None, arrays: jax.Array, density: float) -> jax.Array:
  """Keeps a random fraction `density` of the values, divided by `density`."""
  if key is None:
    raise ValueError("values are dropped at random; give combine a key=jax.random.key(...)")
  kept = jax.random.bernoulli(key, density, arrays.shape)
  return jnp.where(kept, arrays / density, 0)


def _agreeing(arrays: jax.Array, weights: jax.Array, elect: Elect) -> jax.Array:
  """The elementwise mean of the weighted arrays that have the elected sign."""
  elected = jnp.where(elect(arrays) >= 0, 1, -1)
  agrees = jnp.sign(arrays) == elected
  total = linear(None, jnp.where(agrees, arrays, 0), weights)
  return total / jnp.maximum(jnp.sum(agrees, axis=0), 1)


def _check_density(density: float) -> None:
  if not 0 < density <= 1:
    raise ValueError(f"density {density} is not in (0, 1]; it is the fraction of values to keep")


def _check_rank(rank: int | None) -> None:
  if rank is not None and rank < 1:
    raise ValueError(f"rank {rank} is below 1; use a positive whole number")


def _largest_rank(adapters: Sequence[LowRank]) -> int:
  return max(x.rank for x in adapters)


def _adapter(a: jax.Array, b: jax.Array) -> LowRank:
  return LowRank(w=None, a=a, b=b)
