"""EVA: LoRA that starts in the directions of the largest variance of its inputs.

    specs    = lora_jax.match(params, [("all-linear", lora_jax.EVA(rank=8, alpha=16.0))], axes)
    moments  = lora_jax.second_moments(f, params, specs, batches, axes=axes)
    adapters = eva.start(params, specs, moments, axes=axes)      # instead of lora_jax.init

The columns of A are the first right singular vectors of a kernel's inputs X, [rows, inputs]. These
are the first eigenvectors of Xᵀ X. B is zero, so a fresh adapter is the identity. The ranks of all
kernels are one budget. A singular value σ_j of a kernel explains σ_j² / Σ σ² of the variance of its
inputs. The budget goes to the singular values of any kernel that explain the most, but no kernel
gets more than rho times the rank of its spec. With rho = 1 every kernel keeps its rank.

Source: Paischer et al. 2024, EVA, arXiv 2410.07170, section 3. Details that the paper leaves open,
or that differ from PEFT:

- The inputs are not centered, as in the paper; PEFT's incremental PCA subtracts their mean.
- The eigenvectors are computed from all batches at once, so there is no convergence to wait for.
- The scale is that of the spec for any resulting rank. PEFT has the same scale, since it adjusts
  alpha (`adjust_scaling_factors`). PEFT's `whiten`, off by default, is not supported.
- A stack of layers is one array with the largest rank among its layers. In a layer of smaller rank
  the last columns of A are zero. They stay zero: B is zero too, so no gradient reaches them.
  Stacked layers therefore learn the same as unstacked ones.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks, decompositions, tree
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import LoRA, check_leaves_start, check_rank_fits
from lora_jax.axes import Axes, roles_of
from lora_jax.targets import axes_of
from lora_jax.weights import LowRank, is_weight
from lora_jax.weights.probe import Moments

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
  """LoRA that starts in the directions of its inputs; `start` makes its adapters."""

  STARTED_BY = "lora_jax.eva.start"


def start(
  params: PyTree,
  specs: Mapping[str, LoRA],
  moments: Mapping[str, Moments],
  *,
  rho: float = 2.0,
  iterations: int | None = None,
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, LowRank]:
  """Returns EVA's fresh adapters, `{path: adapter}`, without those that get rank zero.

  Args:
    params: the base, of which only shapes are read.
    specs: the result of `match`, EVA or LoRA only. The sum of their ranks over all kernels,
      counting each layer of a stack, is the budget.
    moments: the second moments of the kernels' inputs, as `calibration.second_moments` returns.
    rho: the largest rank of a kernel, in multiples of its spec's rank; at least 1.
    iterations: subspace iterations of a randomized decomposition, e.g. 8, for kernels with
      thousands of inputs: an exact one takes d³ operations, each iteration rank * d². None is
      exact.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `specs`.

  Raises:
    ValueError: if a spec is no LoRA or has its own initializer, if a kernel's moments are missing,
      diagonal, not finite or of other inputs, if a rank exceeds its kernel's, or if rho is below 1.
  """
  if checks.finite("EVA: rho", rho) < 1:
    raise ValueError(f"EVA: rho {rho} is below 1, which would leave a part of the ranks unused")
  if iterations is not None:
    checks.whole("EVA: iterations", iterations, least=0)
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(specs, Method, "spec", leaves)
  axes = axes_of(specs, axes, leaves)
  kernels = {path: _kernel(path, spec, leaves, axes) for path, spec in specs.items()}
  spectra = {
    path: _spectrum(path, kernel, moments, round(specs[path].rank * rho), iterations)
    for path, kernel in kernels.items()
  }
  budget = sum(specs[path].rank * math.prod(kernel.stack) for path, kernel in kernels.items())
  ranks = _shared_ranks({path: spectrum.share for path, spectrum in spectra.items()}, budget)
  return {
    path: specs[path]
    .starting_at(*_factors(kernels[path], spectra[path], ranks[path]), kernel.roles)
    .seal()
    for path, kernel in kernels.items()
    if ranks[path].any()
  }


class _Kernel(NamedTuple):
  """The roles of a kernel's axes, and the sizes of the axes of each role."""

  roles: str
  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


class _Spectrum(NamedTuple):
  """The first n components of a kernel's inputs.

  share: the fraction of the variance that each explains, descending, [*stack, n].
  vectors: [*stack, d, n].
  """

  share: np.ndarray
  vectors: jax.Array


def _kernel(path: str, spec: LoRA, leaves, axes) -> _Kernel:
  check_leaves_start(path, spec, "EVA")
  roles = roles_of(path, leaves, axes)
  kernel = _Kernel(roles, *sizes(leaves[path].shape, roles))
  check_rank_fits(path, spec.rank, kernel.inputs, kernel.outputs)
  return kernel


def _spectrum(path: str, kernel: _Kernel, moments, most: int, iterations) -> _Spectrum:
  if path not in moments:
    raise ValueError(f"{path}: has no moments; request this path from second_moments as well")
  mean = moments[path].mean
  d = math.prod(kernel.inputs)
  if mean.shape != (*kernel.stack, d, d):
    raise ValueError(
      f"{path}: the moments are {mean.shape}, and EVA needs {(*kernel.stack, d, d)}, the whole "
      "matrix of each kernel (diagonal=False)"
    )
  if not jnp.isfinite(mean).all():
    raise ValueError(f"{path}: the moments are not finite; an activation overflowed")
  most = min(most, d, math.prod(kernel.outputs))
  if iterations is None:
    values, vectors = jnp.linalg.eigh(mean)
    values, vectors = values[..., : -most - 1 : -1], vectors[..., : -most - 1 : -1]
  else:
    # The user has no reason to choose the initial random vectors, so they need no key.
    vectors, values, _ = decompositions.randomized_svd(jax.random.key(0), mean, most, iterations)
  total = np.trace(mean, axis1=-2, axis2=-1)[..., None]
  # An expert without rows explains nothing, and gets a rank last.
  share = np.maximum(values, 0) / np.where(total > 0, total, 1)
  # The sign of an eigenvector is arbitrary; a fixed sign gives the same start on every machine.
  largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), axis=-2)
  return _Spectrum(share, vectors * jnp.sign(largest))


def _shared_ranks(shares: Mapping[str, np.ndarray], budget: int) -> dict[str, np.ndarray]:
  """The number of components that each kernel gets, [*stack], by path."""
  every = np.concatenate([share.ravel() for share in shares.values()])
  chosen = np.zeros(every.shape, bool)
  chosen[np.argsort(-every, kind="stable")[:budget]] = True
  ends = np.cumsum([share.size for share in shares.values()])[:-1]
  return {
    path: each.reshape(share.shape).sum(-1)
    for (path, share), each in zip(shares.items(), np.split(chosen, ends), strict=True)
  }


def _factors(kernel: _Kernel, spectrum: _Spectrum, ranks: np.ndarray):
  rank = int(ranks.max())
  kept = np.arange(rank) < ranks[..., None, None]
  a = jnp.where(kept, spectrum.vectors[..., :rank], 0).reshape(*kernel.stack, *kernel.inputs, rank)
  return a, jnp.zeros((*kernel.stack, rank, *kernel.outputs))
