"""Casts arrays to another dtype, with an error if values would overflow.

    smaller = cast({"head/kernel": array}, jnp.float16)
    check_finite({"head/kernel": array})

The largest float16 is 65,504, and the largest float8 (e4m3) is 448. Larger values become infinite
or NaN, and one of them makes a model useless. bfloat16 has the range of float32.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array | np.ndarray

_LISTED = 8


def cast(arrays: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
  """Returns the arrays in another dtype.

  arrays: `{name: array}`, of floats.
  dtype: a float dtype.

  Raises ValueError with the names, for values that are not finite or overflow the dtype.
  """
  check_finite(arrays)
  beyond, found = {}, {}
  for name, array in arrays.items():
    with np.errstate(over="ignore"):  # checked below
      found[name] = array.astype(dtype)
    if not _is_finite(found[name]):
      beyond[name] = f"{name} ({_largest(array):.3g})"
  if beyond:
    raise ValueError(
      f"{jnp.dtype(dtype).name} ends at {float(ml_dtypes.finfo(dtype).max):g}, and values of "
      f"{len(beyond)} tensors are beyond: {_listed(list(beyond.values()))}; use "
      f"{'float32' if jnp.dtype(dtype) == jnp.bfloat16 else 'bfloat16 or float32'}"
    )
  return found


def has_range_of(dtype: DTypeLike, other: DTypeLike) -> bool:
  """Whether the range of a float dtype includes that of another."""
  return bool(ml_dtypes.finfo(dtype).max >= ml_dtypes.finfo(other).max)


def check_finite(arrays: Mapping[str, Array]) -> None:
  """Raises ValueError for arrays with values that are not finite, with their names."""
  broken = [name for name, array in arrays.items() if not _is_finite(array)]
  if broken:
    raise ValueError(
      f"{len(broken)} tensors hold values that are not finite: {_listed(broken)}; what computed "
      "them has overflowed or diverged: use bfloat16 or float32, or an earlier checkpoint"
    )


def _is_finite(array: Array) -> bool:
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return True
  return bool((np if isinstance(array, np.ndarray) else jnp).isfinite(array).all())


def _largest(array: Array) -> float:
  return float(abs(array).max())


def _listed(items: list[str]) -> str:
  shown = ", ".join(items[:_LISTED])
  return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
