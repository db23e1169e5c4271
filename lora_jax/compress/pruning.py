"""Pruning: sets values of kernels to zero permanently, by their size or by their effect.

    paths  = factorization.select(params, ["all-linear"], axes)
    params = pruning.prune(params, paths, pruning.wanda(moments), pruning.share(0.5), axes=axes)

A score rates the importance of each value of a kernel: `magnitude`, or `wanda`, which includes the
size of its inputs. A pattern selects the values to prune: `share` prunes a fraction of each
output's values, `n_of_m` makes patterns such as 2:4. The result holds `Pruned` Weights, whose zeros
survive an adapter and its merge.

Pruning of whole channels and heads, to a smaller dense model: `compress.structured`.

Sources: Sun et al. 2023, Wanda, arXiv 2306.11695, section 3; Mishra et al. 2021, arXiv 2104.08378,
for 2:4.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.axes import Axes, roles_of
from lora_jax.compress.factorization import select, sizes
from lora_jax.targets import axes_of
from lora_jax.weights import Pruned, is_weight
from lora_jax.weights.probe import Moments

PyTree = Any
Score = Callable[[str, jax.Array], jax.Array]  # (path, [stack, d, k]) -> [stack, d, k]
Pattern = Callable[[str, jax.Array], jax.Array]  # (path, scores [stack, d, k]) -> bool


# ---- scores


def magnitude(path: str, matrices: jax.Array) -> jax.Array:
  """`|W|`."""
  del path
  return jnp.abs(matrices)


def wanda(moments: Mapping[str, Moments]) -> Score:
  """`|W_ij| ‖x_i‖`: the size of a value times the norm of its input.

  Args:
    moments: `{path: Moments}` of the kernels' inputs, whole matrices or diagonals.
  """

  def score(path, matrices):
    if path not in moments:
      raise ValueError(f"{path}: has no moments of its inputs; add it to second_moments' paths")
    stack, d, _ = matrices.shape
    mean = moments[path].mean
    if mean.size == stack * d * d and d > 1:
      mean = jnp.diagonal(mean.reshape(stack, d, d), axis1=-2, axis2=-1)
    if mean.size != stack * d:
      raise ValueError(f"{path}: its moments are {mean.shape}, and it has {stack} × {d} inputs")
    if not bool(jnp.isfinite(mean).all()):
      raise ValueError(f"{path}: its moments are not finite; an activation overflowed")
    return jnp.abs(matrices) * jnp.sqrt(mean.reshape(stack, d, 1))

  return score


# ---- patterns


def share(pruned: float) -> Pattern:
  """Prunes this fraction of each output's values, those with the lowest scores; keeps at least one.

  Raises:
    ValueError: if it is not above 0 and below 1.
  """
  if not 0 < pruned < 1:
    raise ValueError(f"the fraction {pruned} to prune must be above 0 and below 1")

  def pattern(path, scores):
    del path
    inputs = scores.shape[1]
    return _ranks(scores, axis=1) >= min(round(pruned * inputs), inputs - 1)

  return pattern


def n_of_m(n: int, m: int) -> Pattern:
  """Keeps, for every output, the n highest scores of each m consecutive inputs, e.g. 2 of 4.

  Raises:
    ValueError: if n is not below m; for a kernel, if its inputs are not a multiple of m.
  """
  if not 0 < n < m:
    raise ValueError(f"{n} of {m} is no pattern: the first must be above 0 and below the second")

  def pattern(path, scores):
    stack, d, k = scores.shape
    if d % m:
      raise ValueError(f"{path}: has {d} inputs, which are no multiple of {m}; leave it out")
    kept = _ranks(scores.reshape(stack, d // m, m, k), axis=2) >= m - n
    return kept.reshape(stack, d, k)

  return pattern


def _ranks(scores: jax.Array, axis: int) -> jax.Array:
  """The rank of each score along an axis, 0 for the lowest; ties are broken by position."""
  return jnp.argsort(jnp.argsort(scores, axis=axis, stable=True), axis=axis, stable=True)


# ---- the transform


def prune(
  params: PyTree,
  paths: Sequence[str],
  score: Score,
  pattern: Pattern,
  *,
  axes: Mapping[str, Axes] | None = None,
) -> PyTree:
  """Returns the tree with `Pruned` Weights at these paths.

  Args:
    params: a pytree of arrays; other leaves, including Weights, are kept.
    paths: the kernels, the result of `factorization.select`.
    score: `magnitude`, `wanda(moments)`, or your own function.
    pattern: `share(0.5)`, `n_of_m(2, 4)`, or your own function.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `paths`.

  Raises:
    ValueError: if `select` would refuse a path, or as the score and the pattern do.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  axes = axes_of(paths, axes, leaves)
  select(params, [re.escape(path) for path in paths], axes)
  found = {}
  for path in paths:
    leaf, roles = leaves[path], roles_of(path, leaves, axes)
    order = [n for role in "sio" for n, each in enumerate(roles) if each == role]
    stack, d, k = sizes(leaf, roles)
    moved = jnp.transpose(leaf, order)
    scores = score(path, moved.reshape(stack, d, k).astype(jnp.float32))
    mask = pattern(path, scores).reshape(moved.shape)
    found[path] = Pruned.of(leaf, jnp.transpose(mask, np.argsort(order).tolist()), path)
  return tree.map_with_path(lambda path, leaf: found.get(path, leaf), params, is_leaf=is_weight)


def sparsity(params: PyTree) -> float:
  """The fraction of the pruned leaves' values that stays zero; 0 if no leaf is pruned."""
  masks = [x.mask for x in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(x, Pruned)]
  total = sum(math.prod(mask.shape) for mask in masks)
  kept = sum(int(mask.sum()) for mask in masks)
  return 1 - kept / total if total else 0.0
