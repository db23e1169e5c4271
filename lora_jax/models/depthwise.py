"""Depthwise convolutions: by `lax.conv_general_dilated`, or by shifts of the input.

    nn.Conv(C, (3, 3), feature_group_count=C, conv_general_dilated=depthwise.WAYS["shifts"])

XLA's CPU compiler has no good code for a convolution in groups. By shifts it is a sum over the
window of the shifted input times a value for each channel:

    y[b, h, w, c] = Σ_ij  x[b, s h + d i, w s + d j, c] k[i, j, c],      stride s, dilation d

The gradients are sums of the same form. `python -m benchmarks.depthwise` measures both.

Shapes: B images; H, W pixels of the padded input; C channels; N values of the window.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class _Window(NamedTuple):
  """The static properties of a convolution, all for (rows, columns)."""

  sizes: tuple[int, ...]
  strides: tuple[int, ...]
  dilations: tuple[int, ...]
  outputs: tuple[int, ...]

  def starts(self) -> Iterator[tuple[int, ...]]:
    """The first pixel that each value of the window meets."""
    for at in itertools.product(*map(range, self.sizes)):
      yield tuple(n * step for n, step in zip(at, self.dilations, strict=True))

  @property
  def spans(self) -> tuple[int, ...]:
    """The pixels from the first to the last that a value of the window meets."""
    return tuple((n - 1) * step + 1 for n, step in zip(self.outputs, self.strides, strict=True))


def _by_shifts(
  x_BHWC: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  rhs_dilation: Sequence[int],
  **_: Any,
) -> jax.Array:
  """A convolution by the arguments that `flax.linen.Conv` passes; kernel [rows, columns, 1, C]."""
  sizes, channels = kernel.shape[:-2], kernel.shape[-1]
  reach = [(size - 1) * step for size, step in zip(sizes, rhs_dilation, strict=True)]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x_BHWC.shape[1:3], [n + 1 for n in reach], strides, padding)
  x_BHWC = jnp.pad(x_BHWC, ((0, 0), *padding, (0, 0)))
  outputs = [
    (size - far - 1) // step + 1
    for size, far, step in zip(x_BHWC.shape[1:3], reach, strides, strict=True)
  ]
  # By a product, so that thin factors of a kernel stay factors and its axes keep their roles.
  taps_NC = jnp.dot(
    jnp.eye(math.prod(sizes), dtype=kernel.dtype),
    kernel.reshape(-1, channels),
    precision=lax.Precision.HIGHEST,
  )
  window = _Window(*map(tuple, (sizes, strides, rhs_dilation, outputs)))
  return _convolved(x_BHWC, taps_NC, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(x_BHWC, taps_NC, window: _Window):
  return _sum(x_BHWC, taps_NC, window)


def _forward(x_BHWC, taps_NC, window: _Window):
  # The barrier keeps the compiler from computing the input again for each value of the window.
  x_BHWC = lax.optimization_barrier(x_BHWC)
  return _sum(x_BHWC, taps_NC, window), (x_BHWC, taps_NC)


def _backward(window: _Window, kept, dy_BHWC):
  x_BHWC, taps_NC = kept
  dy_BHWC = lax.optimization_barrier(dy_BHWC)
  strides = (1, *window.strides, 1)

  def of_tap(start):
    size = (len(x_BHWC), *window.spans, x_BHWC.shape[-1])
    met_BHWC = lax.dynamic_slice(x_BHWC, (0, start[0], start[1], 0), size)
    product_BHWC = lax.slice(met_BHWC, (0, 0, 0, 0), size, strides) * dy_BHWC
    return jnp.sum(product_BHWC, (0, 1, 2), dtype=jnp.promote_types(dy_BHWC.dtype, jnp.float32))

  # One at a time: the compiler would make one slow loop of all.
  dtaps_NC = lax.map(of_tap, jnp.asarray(list(window.starts())))

  # The transposed convolution: outputs a stride apart, met by the window in reverse.
  sizes = x_BHWC.shape[1:3]
  pads = [
    ((size - 1) * dilation, of_x - span, stride - 1)
    for size, dilation, of_x, span, stride in zip(
      window.sizes, window.dilations, sizes, window.spans, window.strides, strict=True
    )
  ]
  spread_BHWC = lax.pad(dy_BHWC, jnp.zeros((), dy_BHWC.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
  reverse = window._replace(strides=(1, 1), outputs=sizes)
  dx_BHWC = _sum(lax.optimization_barrier(spread_BHWC), taps_NC[::-1], reverse)
  return dx_BHWC.astype(x_BHWC.dtype), dtaps_NC.astype(taps_NC.dtype)


_convolved.defvjp(_forward, _backward)


def _sum(x_BHWC, taps_NC, window: _Window):
  """The sum over the window, in float32 or wider."""
  dtype = jnp.promote_types(x_BHWC.dtype, jnp.float32)
  y_BHWC = jnp.zeros((), dtype)
  for start, tap_C in zip(window.starts(), taps_NC, strict=True):
    end = [first + span for first, span in zip(start, window.spans, strict=True)]
    met_BHWC = lax.slice(
      x_BHWC, (0, *start, 0), (len(x_BHWC), *end, x_BHWC.shape[-1]), (1, *window.strides, 1)
    )
    y_BHWC += met_BHWC.astype(dtype) * tap_C.astype(dtype)
  return y_BHWC.astype(x_BHWC.dtype)


WAYS: dict[str, Callable] = {"convolution": lax.conv_general_dilated, "shifts": _by_shifts}
"""Functions for the argument `conv_general_dilated` of `flax.linen.Conv`, by name."""
