"""Weight-normed kernels in files: a direction and a length, joined to one tensor and split again.

    kernel = length * direction / |direction|

Salimans and Kingma 2016, "Weight Normalization". The norm is over all axes but the last, as in the
positional convolution of wav2vec2. PyTorch has had two pairs of names for the parts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.io import names

_PARTS = (
  (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
  (".weight_g", ".weight_v"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Joined:
  """A joined tensor, with the attributes of a `StoredTensor`."""

  name: str
  length: Any
  direction: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.direction.shape

  @property
  def dtype(self) -> str:
    return self.direction.dtype

  def load(self) -> np.ndarray:
    stored = self.direction.load()
    direction = stored.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # the reader refuses what is not finite
      kernel = self.length.load().astype(np.float32) * direction / _norm(direction)
    return kernel.astype(stored.dtype)


def joined(tensors: Mapping[str, Any], table: names.Table) -> dict[str, Any]:
  """Returns the tensors with the parts of weight-normed kernels joined.

  Raises ValueError for a part without the other, and for parts whose shapes do not fit.
  """
  found = dict(tensors)
  for name, path in table.items():
    if not isinstance(path, names.WeightNormed) or name in tensors:
      continue
    for parts in _PARTS:
      length, direction = (found.pop(name.removesuffix(".weight") + part, None) for part in parts)
      if (length is None) != (direction is None):
        raise ValueError(f"{name}: is weight-normed, and one of its parts {parts} is missing")
      if length is None:
        continue
      shape = (1,) * (len(direction.shape) - 1) + direction.shape[-1:]
      if length.shape != shape:
        raise ValueError(f"{length.name}: shape {length.shape}, and its direction asks for {shape}")
      found[name] = _Joined(name=name, length=length, direction=direction)
  return found


def apart(tensors: Mapping[str, np.ndarray], table: names.Table) -> dict[str, np.ndarray]:
  """Returns the tensors of a file with weight-normed kernels as two parts each."""
  found = {}
  for name, array in tensors.items():
    if not isinstance(table.get(name), names.WeightNormed):
      found[name] = array
      continue
    parts = [name.removesuffix(".weight") + part for part in _PARTS[0]]
    length = _norm(array.astype(np.float32)).astype(array.dtype)
    found |= dict(zip(parts, (length, array), strict=True))
  return found


def _norm(array: np.ndarray) -> np.ndarray:
  return np.sqrt(np.sum(array**2, axis=tuple(range(array.ndim - 1)), keepdims=True))
