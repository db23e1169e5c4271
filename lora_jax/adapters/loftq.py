"""LoftQ: a quantized base and LoRA factors that start from what quantization lost.

    base, adapters = loftq.start(params, specs, quantize)     # instead of lora_jax.init
    weights = lora_jax.attach(base, adapters)

By turns the base is quantized and the factors are the nearest ones to what is left,

    Q = quantize(W - scale * A B),      scale * A B = the first `rank` singular triplets of W - Q,

so that Q + scale * A B is nearer to W than Q alone. Li et al. 2023, LoftQ, arXiv 2310.08659,
section 3 and algorithm 1. The scale of the spec is divided out of the factors, so that the adapted
model starts where the algorithm ends whatever alpha is; PEFT leaves it in, and starts there for
alpha = rank alone.

Defined for every kernel, whatever its axes are; what is quantized is the leaf as it stands.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, factorization, tree
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import LoRA, check_leaves_start, check_rank_fits
from lora_jax.axes import Axes
from lora_jax.targets import axes_of
from lora_jax.transform import roles_of
from lora_jax.weights import LowRank, Weight, is_weight, materialize

PyTree = Any


def start(
  params: PyTree,
  specs: Mapping[str, LoRA],
  quantize: Callable[[jax.Array], jax.Array | Weight],
  *,
  iterations: int = 5,
  axes: Mapping[str, Axes] | None = None,
) -> tuple[PyTree, dict[str, LowRank]]:
  """Returns the tree with quantized kernels, and their adapters, `{path: adapter}`.

  Args:
    params: the base, of arrays.
    specs: what `match` returned, of LoRA alone; the kernels at these paths are quantized.
    quantize: gives, of a float32 array, a Weight that stands for the quantized one, or the array
      itself rounded to what the quantized one can hold; it is then stored in the leaf's dtype.
    iterations: how often a kernel is quantized; 1 is quantization and one SVD of what it lost.
    axes: what `trace_axes` found; by default what `match` was given for `specs`.

  Raises:
    ValueError: when a spec is no LoRA, has an initializer of its own or a scale that is not above
      zero, when a rank exceeds its kernel's, when `quantize` changes the shape, and when
      `iterations` is below 1.
  """
  if checks.whole("LoftQ: iterations", iterations) < 1:
    raise ValueError(f"LoftQ: iterations {iterations} is below 1; nothing would be quantized")
  checks.function("LoftQ: quantize", quantize)
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(specs, Method, "spec", leaves)
  axes = axes_of(specs, axes, leaves)
  roles = {path: _checked_roles(path, spec, leaves, axes) for path, spec in specs.items()}
  base, adapters = {}, {}
  for path, spec in specs.items():
    base[path], adapters[path] = _alternate(
      path, leaves[path], spec, roles[path], quantize, iterations
    )
  quantized = tree.map_with_path(lambda path, leaf: base.get(path, leaf), params, is_leaf=is_weight)
  return quantized, adapters


def _checked_roles(path: str, spec: LoRA, leaves, axes) -> str:
  check_leaves_start(path, spec, "LoftQ")
  if spec.scale <= 0:
    raise ValueError(f"{path}: LoftQ divides by the root of the scale, which is {spec.scale}")
  roles = roles_of(spec, path, leaves, axes)
  _, inputs, outputs = sizes(leaves[path].shape, roles)
  check_rank_fits(path, spec.rank, inputs, outputs)
  return roles


def _alternate(path: str, leaf, spec: LoRA, roles: str, quantize: Callable, iterations: int):
  """The quantized kernel and the adapter of what it lost."""

  def principal(matrix):
    u, s, vt = factorization.svd(matrix, spec.rank)
    return factorization.balanced(factorization.Svd(u, s / spec.scale, vt))

  w = materialize(leaf).astype(jnp.float32)
  left = w
  for _ in range(iterations):
    base = quantize(left)
    if tuple(base.shape) != tuple(w.shape):
      raise ValueError(f"{path}: quantize made {tuple(base.shape)} of {tuple(w.shape)}")
    if not is_weight(base):
      base = base.astype(leaf.dtype)
    lost = w - materialize(base).astype(jnp.float32)
    adapter = spec.starting_at(*factorization.factorized(lost, roles, principal), roles)
    left = w - adapter.attach(w, path).delta()
  return base, adapter.seal()
