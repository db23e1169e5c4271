"""Quantization of chosen leaves, round to nearest: params to params with `Quantized` Weights.

    formats = lora_jax.match(params, [("all-linear", compress.NF4)], axes)      # {path: Format}
    smaller = compress.quantize(params, formats, axes)
    logits  = lora_jax.adapt(model.apply)({"params": smaller}, tokens)

Blocks run along the inputs of a kernel, and along a token's row in an embedding. Adapting the
result is QLoRA. To minimize the error of outputs instead of values, see `compress.gptq`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, tree
from lora_jax.axes import Axes
from lora_jax.targets import axes_of
from lora_jax.weights import is_weight
from lora_jax.weights.quantized import FP8, INT4, INT8, NF4, Format, Quantized, quantized

PyTree = Any

FORMATS = {"nf4": NF4, "int4": INT4, "int8": INT8, "fp8": FP8}
"""The formats by their names in configs."""


def quantize(
  params: PyTree, formats: Mapping[str, Format], axes: Mapping[str, Axes] | None = None
) -> PyTree:
  """Returns the tree with `Quantized` Weights at these paths, computed one by one.

  Args:
    params: a pytree of arrays. It stays in memory alongside the result. To free each array before
      the next is quantized, call `quantize_leaf` in a loop. For `jax.ShapeDtypeStruct`s the result
      holds shapes too, and nothing is computed.
    formats: `{path: Format}`, the result of `lora_jax.match`.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `formats`.
      Kernels of two axes (in, out) do not need it; an embedding does.

  Raises:
    TypeError: if a format is not a Format (its name, for example).
    ValueError: if a leaf is not an array of floats, has values that are not finite, or its axes are
      not known. Nothing is quantized then.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(formats, Format, "format", leaves)
  axes = axes_of(formats, axes, leaves)
  columns = {path: columns_of(path, leaves[path], axes) for path in formats}
  for path in formats:
    check_finite(path, leaves[path])

  def leaf_of(path, leaf):
    if path not in formats:
      return leaf
    return _rounded(leaf, formats[path], columns[path]).with_path(path)

  return tree.map_with_path(leaf_of, params, is_leaf=is_weight)


def quantize_leaf(
  path: str, leaf: jax.Array, format: Format, axes: Mapping[str, Axes] | None = None
) -> Quantized:
  """Quantizes one leaf as `quantize` does, for a loop that frees each array before the next."""
  columns = columns_of(path, leaf, axes_of((path,), axes, {path: leaf}))
  check_finite(path, leaf)
  return _rounded(leaf, format, columns).with_path(path)


def columns_of(path: str, leaf: Any, axes: Mapping[str, Axes] | None) -> tuple[int, ...]:
  """The axes that blocks are cut from, counted from the end: the inputs, or a token's row.

  Raises:
    ValueError: if it is not known which axes these are.
  """
  roles, rows_looked_up = "io", False
  if axes is not None and axes[path].roles:
    roles, rows_looked_up = axes[path].roles, axes[path].uses[0] == "gather"
  elif len(leaf.shape) != 2:
    raise ValueError(
      f"{path}: which of the axes of {tuple(leaf.shape)} are inputs? "
      "pass axes=lora_jax.trace_axes(f, params, *example)"
    )
  wanted = "o" if rows_looked_up else "i"
  return tuple(n - len(roles) for n, role in enumerate(roles) if role == wanted)


def check_finite(path: str, leaf: Any) -> None:
  """Raises ValueError for a Weight, and for a leaf with NaN or infinity, which has no scale."""
  if is_weight(leaf):
    raise ValueError(
      f"{path}: is a {type(leaf).__name__} and not an array; quantize before it is compressed or "
      "adapted, or merge first"
    )
  if not isinstance(leaf, jax.ShapeDtypeStruct) and not bool(_finite(leaf)):
    raise ValueError(f"{path}: has values that are not finite, and cannot be quantized")


@jax.jit
def _finite(x):
  return jnp.isfinite(x).all()


def _rounded(leaf: Any, format: Format, columns: tuple[int, ...]) -> Quantized:
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.eval_shape(lambda x: quantized(x, format, columns), leaf)
  return _quantized(leaf, format, columns)


_quantized = jax.jit(quantized, static_argnames=("format", "columns"))
