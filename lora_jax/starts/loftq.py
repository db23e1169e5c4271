"""LoftQ: a quantized base, and LoRA factors that start from the quantization error.

    specs = lora_jax.match(params, [("all-linear", lora_jax.LoftQ(rank=8, alpha=16.0))], axes)
    formats = dict.fromkeys(specs, compress.NF4)
    base, adapters = loftq.start(params, specs, formats)     # instead of lora_jax.init
    weights = lora_jax.attach(base, adapters)

Two steps alternate: quantize the base, and fit the factors to the remaining error,

    Q = quantize(W - scale * A B),      scale * A B = the first `rank` singular triplets of W - Q,

so that Q + scale * A B is nearer to W than Q alone. Source: Li et al. 2023, LoftQ, arXiv
2310.08659, section 3 and algorithm 1. The factors are divided by the spec's scale, so the adapted
model starts where the algorithm ends, for any alpha. PEFT does not divide, so its model starts
there only for alpha = rank.

Defined for every kernel with any axes. Formats quantize in blocks along a kernel's inputs; a
function of one's own quantizes the leaf in its own layout.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, decompositions, tree
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import LoRA, check_leaves_start, check_rank_fits
from lora_jax.axes import Axes, roles_of
from lora_jax.compress.quantization import check_finite, columns_of
from lora_jax.targets import axes_of
from lora_jax.weights import LowRank, Quantized, Weight, is_weight, materialize
from lora_jax.weights.quantized import Format, quantized

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ(LoRA):
  """LoRA that starts from the quantization error; `start` makes the base and the adapters."""

  STARTED_BY = "lora_jax.loftq.start"


def start(
  params: PyTree,
  specs: Mapping[str, LoRA],
  quantize: Mapping[str, Format] | Callable[[jax.Array], jax.Array | Weight],
  *,
  iterations: int = 5,
  axes: Mapping[str, Axes] | None = None,
) -> tuple[PyTree, dict[str, LowRank]]:
  """Returns the tree with quantized kernels, and their adapters, `{path: adapter}`.

  Args:
    params: the base, of arrays.
    specs: the result of `match`, LoftQ or LoRA only; the kernels at these paths are quantized.
    quantize: `{path: Format}`, for the same paths. Or a function that maps a float32 array to a
      Weight that represents the quantized one, or to the array rounded to values that the
      quantized one can hold, which is then stored in the leaf's dtype.
    iterations: how often a kernel is quantized; 1 is quantization and one SVD of its error.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `specs`.

  Raises:
    ValueError: if a spec is no LoRA, has its own initializer or a scale that is not above zero, if
      a rank exceeds its kernel's, if `quantize` changes the shape or has other paths, as
      `compress.quantize` does for a format that does not fit, or if `iterations` is below 1.
  """
  if checks.whole("LoftQ: iterations", iterations) < 1:
    raise ValueError(f"LoftQ: iterations {iterations} is below 1; nothing would be quantized")
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(specs, Method, "spec", leaves)
  axes = axes_of(specs, axes, leaves)
  roles = {path: _checked_roles(path, spec, leaves, axes) for path, spec in specs.items()}
  quantizers = _quantizers(quantize, specs, leaves, axes)
  base, adapters = {}, {}
  for path, spec in specs.items():
    base[path], adapters[path] = _alternate(
      path, leaves[path], spec, roles[path], quantizers[path], iterations
    )
  return tree.map_with_path(
    lambda path, leaf: base.get(path, leaf), params, is_leaf=is_weight
  ), adapters


def _quantizers(quantize, specs, leaves, axes) -> dict[str, Callable]:
  """`{path: function}` that quantizes the leaf."""
  if not isinstance(quantize, Mapping):
    function: Callable = checks.function("LoftQ: quantize", quantize)
    return dict.fromkeys(specs, function)
  checks.by_path(quantize, Format, "format", leaves)
  if set(specs) != set(quantize):
    one_sided = ", ".join(sorted(set(specs) ^ set(quantize)))
    raise ValueError(f"LoftQ adapts exactly the leaves that it quantizes; not so {one_sided}")
  for path in specs:
    check_finite(path, leaves[path])
  return {
    path: functools.partial(
      _quantized,
      format=format,
      columns=columns_of(path, leaves[path], axes),
      dtype=leaves[path].dtype,
    )
    for path, format in quantize.items()
  }


@functools.partial(jax.jit, static_argnames=("format", "columns", "dtype"))
def _quantized(w, format: Format, columns: tuple[int, ...], dtype) -> Quantized:
  return quantized(w, format, columns).astype(dtype)


def _checked_roles(path: str, spec: LoRA, leaves, axes) -> str:
  check_leaves_start(path, spec, "LoftQ")
  if spec.scale <= 0:
    raise ValueError(f"{path}: LoftQ divides by the root of the scale, which is {spec.scale}")
  roles = roles_of(path, leaves, axes)
  _, inputs, outputs = sizes(leaves[path].shape, roles)
  check_rank_fits(path, spec.rank, inputs, outputs)
  return roles


def _alternate(path: str, leaf, spec: LoRA, roles: str, quantize: Callable, iterations: int):
  """The quantized kernel and the adapter of its quantization error."""

  def principal(matrix):
    u, s, vt = decompositions.svd(matrix, spec.rank)
    return decompositions.balanced(decompositions.Svd(u, s / spec.scale, vt))

  w = materialize(leaf).astype(jnp.float32)
  left = w
  for _ in range(iterations):
    base = quantize(left)
    if tuple(base.shape) != tuple(w.shape):
      raise ValueError(f"{path}: quantize returned {tuple(base.shape)} for {tuple(w.shape)}")
    if not is_weight(base):
      base = base.astype(leaf.dtype)
    lost = w - materialize(base).astype(jnp.float32)
    adapter = spec.starting_at(*decompositions.factorized(lost, roles, principal), roles)
    left = w - adapter.attach(w, path).delta()
  return base, adapter.seal()
