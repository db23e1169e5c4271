"""LoftQ with formats: a quantized base, and adapters that compensate for the quantization error.

    base, adapters = loftq.start(params, specs, formats, axes)     # instead of lora_jax.init
    weights = lora_jax.attach(base, adapters)

The algorithm and its source are in `lora_jax.adapters.loftq`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax import checks, tree
from lora_jax.adapters import LoRA, Method, loftq
from lora_jax.axes import Axes
from lora_jax.compress.quantize import check_finite, columns_of
from lora_jax.targets import axes_of
from lora_jax.weights import LowRank, Quantized, is_weight
from lora_jax.weights.quantized import Format, quantized

PyTree = Any


def start(
  params: PyTree,
  specs: Mapping[str, LoRA],
  formats: Mapping[str, Format],
  axes: Mapping[str, Axes] | None = None,
  *,
  iterations: int = 5,
) -> tuple[PyTree, dict[str, LowRank]]:
  """Returns the tree with quantized kernels, and their adapters, `{path: adapter}`.

  Args:
    params: a pytree of arrays.
    specs: `{path: LoRA}`, the result of `lora_jax.match`.
    formats: `{path: Format}`, for the same paths.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `specs`.
    iterations: how often a kernel is quantized.

  Raises:
    ValueError: as `adapters.loftq.start` and `compress.quantize` do; and if the paths differ.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(specs, Method, "spec", leaves)
  checks.by_path(formats, Format, "format", leaves)
  if set(specs) != set(formats):
    one_sided = ", ".join(sorted(set(specs) ^ set(formats)))
    raise ValueError(f"LoftQ adapts exactly the leaves that it quantizes; not so {one_sided}")
  axes = axes_of(specs, axes, leaves)
  columns = {path: columns_of(path, leaves[path], axes) for path in formats}
  for path in formats:
    check_finite(path, leaves[path])
  adapters = {}
  for path, spec in specs.items():
    quantize = functools.partial(
      _quantized, format=formats[path], columns=columns[path], dtype=leaves[path].dtype
    )
    params, own = loftq.start(params, {path: spec}, quantize, iterations=iterations, axes=axes)
    adapters |= own
  return params, adapters


@functools.partial(jax.jit, static_argnames=("format", "columns", "dtype"))
def _quantized(w, format: Format, columns: tuple[int, ...], dtype) -> Quantized:
  return quantized(w, format, columns).astype(dtype)
