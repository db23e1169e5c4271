"""Ways to make one LoRA adapter of several, for `lora_jax.combine`.

    combine([x, y], [0.7, 0.3], combiners.cat)
    combine([x, y], [0.7, 0.3], combiners.svd(rank=8))
    combine([x, y], [0.7, 0.3], combiners.on_factors(combiners.ties(density=0.2)))
    combine([x, y], [0.7, 0.3], combiners.on_delta(combiners.ties(density=0.2), rank=8))

`cat` is the weighted sum of the changes D = scale * A B, exactly; `svd` is the nearest one to it of
a given rank. Every other method is a way to mix arrays, number by number, and is given either the
factors, A with A and B with B, or the changes themselves, of which an SVD then makes factors again:

    mix                          on the factors       on the changes
    linear                       linear               svd
    magnitude_prune(density)     magnitude_prune      magnitude_prune_svd
    ties(density)                ties                 ties_svd
    dare_linear(density)         dare_linear          dare_linear_svd
    dare_ties(density)           dare_ties            dare_ties_svd

The names on the right are those of `add_weighted_adapter` in PEFT, whose results these are.

A combiner is `(key, adapters, weights) -> adapter`, of one matrix: LowRanks without a base, with a
[d, r] and b [r, k]. A mix is `(key, arrays [n, ...], weights [n]) -> array [...]`. Yours may be any
function of that form.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lora_jax import factorization
from lora_jax.weights import LowRank

Combiner = Callable[[jax.Array | None, Sequence[LowRank], jax.Array], LowRank]
Mix = Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array]
Elect = Callable[[jax.Array], jax.Array]


# ---- what is combined


def cat(key: jax.Array | None, adapters: Sequence[LowRank], weights: jax.Array) -> LowRank:
  """The weighted sum of the changes, exactly: A = [w1 s1 A1, w2 s2 A2, ...], B = [B1; B2; ...].

  The rank is the sum of the ranks.
  """
  del key
  a = [x.a * (weight * x.scale) for x, weight in zip(adapters, weights, strict=True)]
  return _adapter(jnp.concatenate(a, axis=1), jnp.concatenate([x.b for x in adapters], axis=0))


def svd(rank: int | None = None) -> Combiner:
  """The matrix of this rank that is nearest to the weighted sum, computed from the factors alone.

  Args:
    rank: None for the largest of the adapters'.
  """
  _check_rank(rank)

  def combiner(key, adapters, weights):
    whole = cat(key, adapters, weights)
    triplets = factorization.product_svd(whole.a, whole.b, rank or _largest_rank(adapters))
    return _adapter(*factorization.balanced(triplets))

  return combiner


def on_factors(mix: Mix) -> Combiner:
  """Mixes the factors, with the root of a weight on each of them.

      A = mix(A1, A2, ...; sign(v) sqrt|v|)   B = mix(B1, B2, ...; sqrt|v|)   v = weight * scale

  It costs nothing, keeps the rank, and is no sum of changes, not even with `linear`: the product
  of two sums has the terms sqrt(v1 v2) A1 B2 and sqrt(v1 v2) A2 B1 too. It is close to the sum for
  adapters that grew out of one; for others use `cat`, `svd` or `on_delta`.

  Raises, when used:
    ValueError: when the ranks differ.
  """

  def combiner(key, adapters, weights):
    ranks = [x.rank for x in adapters]
    if len(set(ranks)) > 1:
      raise ValueError(
        f"factors of the ranks {', '.join(map(str, ranks))} are not mixed number by number; "
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
  """Mixes the changes, and takes the nearest matrix of this rank; forms one d×k array an adapter.

  Args:
    mix: how.
    rank: None for the largest of the adapters'.
  """
  _check_rank(rank)

  def combiner(key, adapters, weights):
    deltas = [x.scale * jnp.matmul(x.a, x.b, precision="highest") for x in adapters]
    mixed = mix(key, jnp.stack(deltas), weights)
    triplets = factorization.svd(mixed, rank or _largest_rank(adapters))
    return _adapter(*factorization.balanced(triplets))

  return combiner


# ---- how arrays are mixed


def linear(key: jax.Array | None, arrays: jax.Array, weights: jax.Array) -> jax.Array:
  """The weighted sum."""
  del key
  return jnp.tensordot(weights.astype(arrays.dtype), arrays, axes=1, precision="highest")


def magnitude_prune(density: float) -> Mix:
  """The weighted sum of the arrays with their smallest numbers set to zero.

  Args:
    density: the share of each array's numbers that stays, in (0, 1].
  """
  _check_density(density)
  return lambda key, arrays, weights: linear(key, _largest(arrays, density), weights)


def by_total(arrays: jax.Array) -> jax.Array:
  """Elects the sign of the arrays' sum: that of the larger movement."""
  return jnp.sum(arrays, axis=0)


def by_frequency(arrays: jax.Array) -> jax.Array:
  """Elects the sign that more of the arrays have."""
  return jnp.sum(jnp.sign(arrays), axis=0)


def ties(density: float, elect: Elect = by_total) -> Mix:
  """Trims, elects a sign for every number, and averages what agrees with it.

  The smallest numbers are set to zero. Then, for every number, the mean of the weighted arrays is
  taken over those whose sign is the elected one. Yadav et al. 2023, TIES-Merging, arXiv 2306.01708,
  section 3; the weights within the mean are PEFT's.

  Args:
    density: the share of each array's numbers that stays, in (0, 1]; the paper keeps 0.2.
    elect: `(arrays [n, ...]) -> [...]` whose sign is the elected one; the paper's is `by_total`.
  """
  _check_density(density)
  return lambda key, arrays, weights: _agreeing(_largest(arrays, density), weights, elect)


def dare_linear(density: float) -> Mix:
  """The weighted sum of the arrays with numbers dropped at random, the rest made larger for it.

  Yu et al. 2023, DARE, arXiv 2311.03099, section 3.2. It needs a key.

  Args:
    density: the probability of a number to stay, in (0, 1]; what stays is divided by it.
  """
  _check_density(density)
  return lambda key, arrays, weights: linear(None, _thinned(key, arrays, density), weights)


def dare_ties(density: float, elect: Elect = by_total) -> Mix:
  """`ties` with DARE's random dropping instead of its trimming. It needs a key.

  Args:
    density, elect: as in `dare_linear` and `ties`.
  """
  _check_density(density)
  return lambda key, arrays, weights: _agreeing(_thinned(key, arrays, density), weights, elect)


def _largest(arrays: jax.Array, density: float) -> jax.Array:
  """The arrays with all but the share `density` of the largest numbers of each set to zero."""
  flat = arrays.reshape(len(arrays), -1)
  _, places = jax.lax.top_k(jnp.abs(flat), int(density * flat.shape[1]))
  kept = jnp.zeros(flat.shape, bool).at[jnp.arange(len(flat))[:, None], places].set(True)
  return jnp.where(kept, flat, 0).reshape(arrays.shape)


def _thinned(key: jax.Array | None, arrays: jax.Array, density: float) -> jax.Array:
  """The arrays with a share of `density` left at random, divided by it."""
  if key is None:
    raise ValueError("numbers are dropped at random; give combine a key=jax.random.key(...)")
  kept = jax.random.bernoulli(key, density, arrays.shape)
  return jnp.where(kept, arrays / density, 0)


def _agreeing(arrays: jax.Array, weights: jax.Array, elect: Elect) -> jax.Array:
  """The mean, number by number, of the weighted arrays that have the elected sign."""
  elected = jnp.where(elect(arrays) >= 0, 1, -1)
  agrees = jnp.sign(arrays) == elected
  total = linear(None, jnp.where(agrees, arrays, 0), weights)
  return total / jnp.maximum(jnp.sum(agrees, axis=0), 1)


def _check_density(density: float) -> None:
  if not 0 < density <= 1:
    raise ValueError(f"density {density} is not in (0, 1]; it is the share of numbers that stay")


def _check_rank(rank: int | None) -> None:
  if rank is not None and rank < 1:
    raise ValueError(f"rank {rank} is below 1; use a positive whole number")


def _largest_rank(adapters: Sequence[LowRank]) -> int:
  return max(x.rank for x in adapters)


def _adapter(a: jax.Array, b: jax.Array) -> LowRank:
  return LowRank(w=None, a=a, b=b)
