"""EVA: LoRA that starts in the directions in which its inputs vary most.

    moments  = second_moments(f, params, specs, batches, axes=axes)     # lora_jax.calibration
    adapters = eva.start(params, specs, moments, axes=axes)             # instead of lora_jax.init

The columns of A are the first right singular vectors of the inputs X of a kernel, [rows, inputs],
which are the first eigenvectors of Xᵀ X; B is zero, so a fresh adapter is the identity. The ranks
of all kernels are one budget. Each singular value σ_j of each kernel explains σ_j² / Σ σ² of the
variance of its inputs, and those that explain the most get a column, wherever they are, but no
kernel gets more than rho times the rank of its spec. With rho = 1 every kernel keeps its rank.

Paischer et al. 2024, EVA, arXiv 2410.07170, section 3. What the paper leaves open, or PEFT does in
its own way:

- The inputs are not centred, as in the paper; PEFT's incremental PCA subtracts their mean.
- The eigenvectors are those of all batches at once, so there is no convergence to wait for.
- The scale is that of the spec whatever the rank turns out to be, as in PEFT, which adjusts alpha
  for it (`adjust_scaling_factors`). PEFT's `whiten` is off by default, and not here.
- A stack of layers is one array, of the largest rank among them. Where a layer's own rank is
  smaller, the last columns of its A are zero, and stay so: with B zero too, no gradient reaches
  them. So stacked layers learn what they would unstacked.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks, factorization, tree
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import LoRA, check_leaves_start, check_rank_fits
from lora_jax.axes import Axes
from lora_jax.targets import axes_of
from lora_jax.transform import roles_of
from lora_jax.weights import LowRank, is_weight
from lora_jax.weights.probe import Moments

PyTree = Any


def start(
  params: PyTree,
  specs: Mapping[str, LoRA],
  moments: Mapping[str, Moments],
  *,
  rho: float = 2.0,
  iterations: int | None = None,
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, LowRank]:
  """Returns adapters at EVA's start, `{path: adapter}`, without those whose rank came out as zero.

  Args:
    params: the base, of which only shapes are read.
    specs: what `match` returned, of LoRA alone. The sum of their ranks over all kernels, each layer
      of a stack counted, is the budget.
    moments: the second moments of the kernels' inputs, as `calibration.second_moments` returns.
    rho: how many times its spec's rank a kernel may get; at least 1.
    iterations: subspace iterations of a randomized decomposition, 8 say, for kernels of thousands
      of inputs: what needs d³ operations exactly needs rank * d² for each. None is exact.
    axes: what `trace_axes` found; by default what `match` was given for `specs`.

  Raises:
    ValueError: when a spec is no LoRA or has an initializer of its own, when a kernel's moments are
      missing, diagonal, not finite or of other inputs, when a rank exceeds its kernel's, and when
      rho is below 1.
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
  """The roles of a kernel's axes, and the sizes of those of each role."""

  roles: str
  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


class _Spectrum(NamedTuple):
  """What a kernel may get, the first n components of its inputs.

  share: of the variance that each explains, falling, [*stack, n].
  vectors: [*stack, d, n].
  """

  share: np.ndarray
  vectors: jax.Array


def _kernel(path: str, spec: LoRA, leaves, axes) -> _Kernel:
  check_leaves_start(path, spec, "EVA")
  roles = roles_of(spec, path, leaves, axes)
  kernel = _Kernel(roles, *sizes(leaves[path].shape, roles))
  check_rank_fits(path, spec.rank, kernel.inputs, kernel.outputs)
  return kernel


def _spectrum(path: str, kernel: _Kernel, moments, most: int, iterations) -> _Spectrum:
  if path not in moments:
    raise ValueError(f"{path}: has no moments; ask second_moments for this path as well")
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
    # Which random vectors it starts from is no choice of the user's, so they need no key.
    vectors, values, _ = factorization.randomized_svd(jax.random.key(0), mean, most, iterations)
  total = np.trace(mean, axis1=-2, axis2=-1)[..., None]
  # An expert that saw no row explains nothing, and gets a rank last.
  share = np.maximum(values, 0) / np.where(total > 0, total, 1)
  # The sign of an eigenvector is free; fixed, a start is the same on every machine.
  largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), axis=-2)
  return _Spectrum(share, vectors * jnp.sign(largest))


def _shared_ranks(shares: Mapping[str, np.ndarray], budget: int) -> dict[str, np.ndarray]:
  """How many of its components each kernel gets, [*stack], by path."""
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
