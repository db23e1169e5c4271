"""Look-ups of rows, in every form that JAX traces them to, reduced to the one that Weights accept.

`w[ids]`, `jnp.take` and `jax.vmap(lambda i: w[i])(ids)` trace to different gathers: the last keeps
an axis of size one and starts every other axis at zero. Weights see a gather of whole rows along
one axis, with that axis collapsed.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.weights import base
from lora_jax.weights.base import NotFactored


def looked_up(
  operand: Any,
  indices: jax.Array,
  *,
  dimension_numbers: lax.GatherDimensionNumbers,
  slice_sizes: Sequence[int],
  mode: lax.GatherScatterMode,
  **params: Any,
) -> Any:
  """`lax.gather` of a Weight.

  Raises:
    NotFactored: if it takes anything but whole rows along one axis.
  """
  d, shape = dimension_numbers, operand.shape
  if d.operand_batching_dims:
    raise NotFactored("rows of each layer of a stack are gathered")
  partial = [
    n for n, size in enumerate(slice_sizes) if size != shape[n] or n in d.collapsed_slice_dims
  ]
  if len(partial) != 1 or slice_sizes[partial[0]] != 1 or partial[0] not in d.start_index_map:
    raise NotFactored("only whole rows along one axis are gathered in factored form")
  (axis,) = partial
  clamped = lax.GatherScatterMode.from_any(mode) != lax.GatherScatterMode.FILL_OR_DROP
  if d.start_index_map != (axis,):
    # All other axes are taken whole, so a clamped start is zero.
    if not clamped:
      raise NotFactored("whole rows along one axis are gathered from starts that may be outside")
    indices = indices[..., d.start_index_map.index(axis)][..., None]
  params = params | {"mode": mode, "slice_sizes": tuple(slice_sizes)}
  if axis in d.collapsed_slice_dims:
    numbers = lax.GatherDimensionNumbers(
      offset_dims=d.offset_dims, collapsed_slice_dims=(axis,), start_index_map=(axis,)
    )
    return base.call("gather", operand, indices, dimension_numbers=numbers, **params)
  # The axis of size one is collapsed, and restored afterwards.
  place = d.offset_dims[axis]
  offsets = tuple(n - (n > place) for n in d.offset_dims if n != place)
  numbers = lax.GatherDimensionNumbers(
    offset_dims=offsets, collapsed_slice_dims=(axis,), start_index_map=(axis,)
  )
  rows = base.call("gather", operand, indices, dimension_numbers=numbers, **params)
  sizes = (*rows.shape[:place], 1, *rows.shape[place:])
  kept = tuple(n for n in range(len(sizes)) if n != place)
  return base.call("broadcast_in_dim", rows, sizes, kept)
