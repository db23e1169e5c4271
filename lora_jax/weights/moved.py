"""Weights whose parts all have the array's axes, so that every operation moves all parts alike."""

import dataclasses
from typing import Any, Self

from lora_jax.weights.base import Weight


@dataclasses.dataclass(frozen=True)
class Moved(Weight):
  """A weight that defines once, in `_moved`, how operations on its axes act on its parts."""

  def _moved(self, op: str, *args: Any, **placed: Any) -> Self:
    """Returns this weight after `lax.<op>(array, *args, **placed)`."""
    raise NotImplementedError

  def transpose(self, permutation):
    return self._moved("transpose", permutation)

  def reshape(self, new_sizes, **placed):
    return self._moved("reshape", new_sizes, **placed)

  def squeeze(self, dimensions):
    return self._moved("squeeze", dimensions)

  def broadcast_in_dim(self, shape, broadcast_dimensions, **placed):
    return self._moved("broadcast_in_dim", shape, broadcast_dimensions, **placed)

  def slice(self, start_indices, limit_indices, strides):
    return self._moved("slice", start_indices, limit_indices, strides)

  def dynamic_slice(self, start_indices, slice_sizes):
    return self._moved("dynamic_slice", start_indices, slice_sizes)

  def rev(self, dimensions):
    return self._moved("rev", dimensions)
