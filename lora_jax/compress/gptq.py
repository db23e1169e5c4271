"""Calibrated quantization: quantized values that minimize the output error, not the weight error.

    moments = lora_jax.second_moments(f, params, formats, batches, axes=axes)
    smaller = gptq.quantize(params, formats, moments, axes)

The columns of a kernel are rounded one by one. The columns that are not yet rounded compensate for
the error in the outputs, according to H = mean x xᵀ of the layer's inputs. Columns with the largest
inputs come first. The scales are chosen beforehand, so that they can be quantized too: among some
multiples of a block's maximum, the one with the least error weighted by the diagonal of H.

Source: Frantar et al. 2022, GPTQ, arXiv 2210.17323, section 3 and algorithm 1.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import checks, tree
from lora_jax.axes import Axes
from lora_jax.compress.quantization import check_finite, columns_of
from lora_jax.targets import axes_of
from lora_jax.weights import is_weight
from lora_jax.weights.coded import rows_of
from lora_jax.weights.probe import Moments
from lora_jax.weights.quantized import (
  Format,
  Quantized,
  as_array,
  coded,
  level,
  nearest,
  quantized_scales,
  scales,
)

PyTree = Any

_BATCH = 64
"""The number of columns whose corrections to all later columns are applied at once."""

_SHRINKS = tuple(np.linspace(0.7, 1, 13))
"""The multiples of a block's maximum that are tried as its scale."""


def quantize(
  params: PyTree,
  formats: Mapping[str, Format],
  moments: Mapping[str, Moments],
  axes: Mapping[str, Axes] | None = None,
  *,
  damping: float = 0.01,
) -> PyTree:
  """Returns the tree with `Quantized` Weights at these paths, calibrated one by one.

  Args:
    params: a pytree of arrays.
    formats: `{path: Format}`, the result of `lora_jax.match`.
    moments: `{path: Moments}` of the inputs of these kernels, the result of `second_moments`. They
      need at least as many rows as a kernel has inputs.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `formats`.
    damping: added to the diagonal of H, as a fraction of its mean.

  Raises:
    ValueError: as `compress.quantize` does; if a path has no moments, only their diagonal, moments
      that are not finite, or fewer rows than inputs; if an axis of outputs comes before one of
      stacks; or if damping is not above zero. Nothing is quantized then.
  """
  if checks.finite("GPTQ: damping", damping) <= 0:
    raise ValueError(f"GPTQ: damping {damping} is not above 0, so H may have no inverse")
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(formats, Format, "format", leaves)
  axes = axes_of(formats, axes, leaves)
  columns = {path: columns_of(path, leaves[path], axes) for path in formats}
  for path in formats:
    check_finite(path, leaves[path])
    if axes is not None and "s" in axes[path].roles.replace("i", "").lstrip("s"):
      raise ValueError(f"{path}: its axes are {axes[path].roles}; put stacks before outputs")
    _check_moments(path, leaves[path], columns[path], moments)

  def leaf_of(path, leaf):
    if path not in formats:
      return leaf
    return _calibrated(leaf, formats[path], columns[path], moments[path].mean, damping).with_path(
      path
    )

  return tree.map_with_path(leaf_of, params, is_leaf=is_weight)


def _check_moments(path, leaf, columns, moments):
  if path not in moments:
    raise ValueError(f"{path}: has no moments of its inputs; add it to second_moments' paths")
  inputs = math.prod(leaf.shape[n] for n in columns)
  total, rows = moments[path]
  if total.shape[-2:] != (inputs, inputs) or total.ndim != rows.ndim + 2:
    raise ValueError(
      f"{path}: moments of shape {tuple(total.shape)}, and it has {inputs} inputs; GPTQ needs "
      "second_moments(..., diagonal=False)"
    )
  if int(rows.min()) < inputs:
    raise ValueError(
      f"{path}: {int(rows.min())} rows of calibration data for {inputs} inputs; give more text"
    )
  if not bool(jnp.isfinite(total).all()):
    raise ValueError(f"{path}: the moments of its inputs are not finite; an activation overflowed")


def _calibrated(w, format: Format, columns, moments: jax.Array, damping: float) -> Quantized:
  """The quantized kernel; each matrix of a stack uses its own moments."""
  numbers = rows_of(w, columns).astype(jnp.float32)
  stack = moments.shape[:-2]
  matrices = numbers.reshape(math.prod(stack), -1, numbers.shape[-1])
  found = []
  for matrix, h in zip(matrices, moments.reshape(-1, *moments.shape[-2:]), strict=True):
    order, factor = _order_and_factor(np.asarray(h, np.float64), damping)
    scale = _scales(matrix, jnp.diagonal(h), format)
    found.append((_rounded(matrix, scale, order, factor, format), scale))
  rounded, scale = jax.tree.map(lambda *x: jnp.stack(x), *found)
  rows = numbers.shape[:-1]
  scale = jax.tree.map(lambda x: x.reshape(*rows, x.shape[-1]), scale)
  return coded(rounded.reshape(numbers.shape), scale, format, like=w, columns=columns)


def _order_and_factor(h: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
  """The order of the columns, and the upper Cholesky factor of the inverse of H in that order."""
  diagonal = np.diagonal(h)
  order = np.argsort(-diagonal, kind="stable")
  # An input that is always zero may have any value; the damping makes H invertible.
  h = h[np.ix_(order, order)] + damping * (diagonal.mean() or 1) * np.eye(len(h))
  factor = np.linalg.cholesky(np.linalg.inv(h)).T
  return order.astype(np.int32), factor.astype(np.float32)


@functools.partial(jax.jit, static_argnames="format")
def _scales(matrix: jax.Array, importance: jax.Array, format: Format) -> Any:
  """The scales [rows, blocks] of [rows, columns] with the least weighted error."""
  plain = Format(levels=format.levels, block=format.block)
  largest = scales(matrix, plain)
  count = largest.shape[-1]

  def error(shrink):
    # The padding of the last block has values and importance zero.
    off = _blocks(matrix, count, format) - _level(matrix, largest * shrink, format)
    return jnp.sum(off**2 * _blocks(importance, count, format), axis=-1)

  errors = lax.map(error, jnp.asarray(_SHRINKS))
  best = jnp.asarray(_SHRINKS)[jnp.argmin(errors, axis=0)]
  return quantized_scales(largest * best, format)


def _level(matrix, scale, format: Format) -> jax.Array:
  """Rounds the values, [rows, blocks, values of a block]."""
  x = _blocks(matrix, scale.shape[-1], format)
  return level(nearest(x / scale[..., None], format.levels), format.levels) * scale[..., None]


def _blocks(x, count: int, format: Format) -> jax.Array:
  size = format.block or x.shape[-1]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * size - x.shape[-1])])
  return x.reshape(*x.shape[:-1], count, size)


@functools.partial(jax.jit, static_argnames="format")
def _rounded(matrix, scale, order, factor, format: Format) -> jax.Array:
  """Rounds the matrix [rows, columns] to the levels of its blocks, compensating for the errors."""
  inputs = matrix.shape[-1]
  scale = as_array(scale)
  block = jnp.arange(inputs) // (format.block or inputs)
  scale = scale[:, block[order]]
  w, batches = matrix[:, order], -(-inputs // _BATCH)
  extra = batches * _BATCH - inputs
  w, scale = (jnp.pad(x, ((0, 0), (0, extra)), constant_values=1) for x in (w, scale))
  factor = jnp.pad(factor, ((0, extra), (0, extra)))
  factor = factor.at[jnp.arange(inputs, inputs + extra), jnp.arange(inputs, inputs + extra)].set(1)

  def column(n, state):
    part, rounded, errors, s, u = state
    x = part[:, n]
    q = level(nearest(x / s[:, n], format.levels), format.levels) * s[:, n]
    error = (x - q) / u[n, n]
    # u is upper triangular, so columns before n do not change.
    return part - error[:, None] * u[n], rounded.at[:, n].set(q), errors.at[:, n].set(error), s, u

  def batch(w, start):
    u = lax.dynamic_slice(factor, (start, 0), (_BATCH, factor.shape[1]))
    part, s = (lax.dynamic_slice(x, (0, start), (len(x), _BATCH)) for x in (w, scale))
    corner = lax.dynamic_slice(u, (0, start), (_BATCH, _BATCH))
    empty = jnp.zeros_like(part)
    _, q, errors, _, _ = lax.fori_loop(0, _BATCH, column, (part, empty, empty, s, corner))
    return w - jnp.matmul(errors, u, precision="highest"), q

  _, found = lax.scan(batch, w, jnp.arange(batches) * _BATCH)
  found = jnp.moveaxis(found, 0, 1).reshape(len(w), -1)[:, :inputs]
  return jnp.zeros_like(matrix).at[:, order].set(found)
