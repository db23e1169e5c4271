"""Coded: an array that is stored quantized and dequantized where it is used.

Some axes of the array are its columns. They are flattened into one axis, cut into blocks and
quantized. All other axes are rows, and every stored array keeps them:

    array (d, k)            columns (-2,)      stored as [k, d values]      a kernel, by inputs
    array (L, d, k)         columns (-2,)      stored as [L, k, d values]   layers of a scan
    array (V, d)            columns (-1,)      stored as [V, d values]      an embedding, by tokens
    array (heads, dim, k)   columns (-3, -2)   stored as [k, heads * dim values]

Slices, transposes and look-ups along the rows act on the quantized values. A product dequantizes
the array temporarily, as `weights.formed` explains.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import explicit
from lora_jax.weights.base import NotFactored
from lora_jax.weights.formed import Formed


@dataclasses.dataclass(frozen=True)
class Coded(Formed):
  """A quantized array. A kind stores the quantized values and defines `decode`.

  Attributes:
    columns: the axes that are quantized together, counted from the array's end, ascending.
    sizes: the sizes of these axes.
    to: the dtype of the array.
    path: the leaf's path, for messages.
  """

  columns: tuple[int, ...] = dataclasses.field(kw_only=True, metadata={"static": True})
  sizes: tuple[int, ...] = dataclasses.field(kw_only=True, metadata={"static": True})
  to: str = dataclasses.field(default="float32", kw_only=True, metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  def decode(self) -> jax.Array:
    """The dequantized values [*rows, columns], possibly padded at the end to whole blocks."""
    raise NotImplementedError

  def materialize(self):
    return explicit.laid_out(lambda self: self.arranged(self.decode()), self.explicit_sharding)(
      self
    )

  def arranged(self, numbers: jax.Array) -> jax.Array:
    """The array made of the values [*rows, columns], in its own dtype."""
    numbers = numbers.astype(self.to)[..., : math.prod(self.sizes)]
    rows = numbers.shape[:-1]
    last = range(len(rows), self.ndim)
    return jnp.moveaxis(numbers.reshape(*rows, *self.sizes), last, self.columns)

  @property
  def shape(self):
    sizes = dict(zip(self._column_axes, self.sizes, strict=True))
    rows = iter(jax.tree.leaves(self)[0].shape)
    return tuple(sizes[n] if n in sizes else next(rows) for n in range(self.ndim))

  @property
  def ndim(self):
    return jax.tree.leaves(self)[0].ndim - 1 + len(self.sizes)

  @property
  def dtype(self):
    return jnp.dtype(self.to)

  @property
  def explicit_sharding(self):
    """Rows are sharded as in the stored arrays, the first column axis like the stored columns."""
    codes = jax.tree.leaves(self)[0]
    sharding = explicit.sharding_of(codes)
    if sharding is None:
      return None
    axes: list[Any] = [None] * self.ndim
    first = self._column_axes[0]
    for n, name in zip(
      (*self._row_axes, first), explicit.mesh_axes(sharding, codes.ndim), strict=True
    ):
      axes[n] = name
    fitted = explicit.with_axes(sharding, axes)
    try:
      fitted.shard_shape(self.shape)
    except ValueError:  # the stored columns divide over the mesh, the axis itself does not
      axes[first] = None
      fitted = explicit.with_axes(sharding, axes)
    return fitted

  @property
  def is_stacked(self):
    return 0 not in self._column_axes

  @property
  def nbytes(self) -> int:
    """The bytes that it takes in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

  def partition_specs(self, spec):
    """Rows are sharded like the array's rows, stored columns like the first column axis."""
    names = (*spec, *[None] * (self.ndim - len(spec)))
    cut = jax.P(*(names[n] for n in self._row_axes), names[self._column_axes[0]])
    return jax.tree.map(lambda _: cut, self)

  def local_specs(self, spec):
    names = (*spec, *[None] * (self.ndim - len(spec)))
    if any(names[n] is not None for n in self._column_axes):
      raise NotFactored("its quantized blocks may be cut where the array is sharded")
    return self.partition_specs(spec)

  # ---- look-ups

  def gather(self, indices, *, dimension_numbers, slice_sizes, mode, fill_value=None, **params):
    """Looks up whole rows along one axis, as for an embedding; dequantizes only these rows."""
    d = dimension_numbers
    axis = d.collapsed_slice_dims[0] if len(d.collapsed_slice_dims) == 1 else None
    full = [n == axis or size == self.shape[n] for n, size in enumerate(slice_sizes)]
    if axis is None or d.start_index_map != (axis,) or d.operand_batching_dims or not all(full):
      raise NotFactored("only whole rows along one axis are looked up while quantized")
    row, size = self._row(axis), self.shape[axis]
    columns = self._columns_after([n for n in range(self.ndim) if n != axis])

    def rows_at(self, indices):
      ids = indices[..., 0].astype(jnp.int32)
      found = (ids >= 0) & (ids < size)
      ids = ids.clip(0, size - 1)

      def looked_up(codes):
        codes = jnp.take(codes, ids, axis=row)
        return jnp.moveaxis(codes, range(row, row + ids.ndim), range(ids.ndim))

      rows = self._with_rows(looked_up, columns).materialize()
      if lax.GatherScatterMode.from_any(mode) == lax.GatherScatterMode.FILL_OR_DROP:
        fill = jnp.nan if fill_value is None else jnp.asarray(fill_value, rows.dtype)
        rows = jnp.where(jnp.expand_dims(found, range(ids.ndim, rows.ndim)), rows, fill)
        rows = rows.astype(self.to)
      return jnp.moveaxis(rows, range(ids.ndim, rows.ndim), d.offset_dims)

    def use(w):
      return lax.gather(
        w,
        indices,
        dimension_numbers=d,
        slice_sizes=slice_sizes,
        mode=mode,
        fill_value=fill_value,
        **params,
      )

    return explicit.laid_out(rows_at, explicit.of_result(use, self, indices))(self, indices)

  # ---- operations that stay quantized

  def astype(self, dtype):
    """A wider dtype keeps the dequantized values, which a narrower one would have rounded."""
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise NotFactored(f"a cast to {dtype} rounds the values after they are dequantized")
    return dataclasses.replace(self, to=jnp.dtype(dtype).name)

  def transpose(self, permutation):
    order = [self._row(n) for n in permutation if n not in self._column_axes]
    columns = self._columns_after(permutation)
    if order == sorted(order):
      return dataclasses.replace(self, columns=columns)
    return self._with_rows(lambda codes: lax.transpose(codes, (*order, codes.ndim - 1)), columns)

  def squeeze(self, dimensions):
    rows = [self._row(n) for n in dimensions]
    columns = self._columns_after([n for n in range(self.ndim) if n not in dimensions])
    return self._with_rows(lambda codes: lax.squeeze(codes, rows), columns)

  def slice(self, start_indices, limit_indices, strides):
    bounds = list(zip(start_indices, limit_indices, strides or (1,) * self.ndim, strict=True))
    if any(bounds[n] != (0, self.shape[n], 1) for n in self._column_axes):
      raise NotFactored("a slice of its columns may cut its quantized blocks")

    def sliced(codes):
      each = [*(bounds[n] for n in self._row_axes), (0, codes.shape[-1], 1)]
      return lax.slice(codes, *zip(*each, strict=True))

    return self._with_rows(sliced, self.columns)

  def dynamic_slice(self, start_indices, slice_sizes):
    if any(slice_sizes[n] != self.shape[n] for n in self._column_axes):
      raise NotFactored("a slice of its columns may cut its quantized blocks")
    zero = jnp.zeros_like(jnp.asarray(start_indices[0]))

    def sliced(codes):
      starts = [*(start_indices[n] for n in self._row_axes), zero]
      sizes = [*(slice_sizes[n] for n in self._row_axes), codes.shape[-1]]
      return lax.dynamic_slice(codes, starts, sizes)

    return self._with_rows(sliced, self.columns)

  def scaled(self, c):
    raise NotFactored("a multiple of it has other quantized values")

  # ---- rows and columns

  @property
  def _column_axes(self) -> list[int]:
    return [self.ndim + n for n in self.columns]

  @property
  def _row_axes(self) -> list[int]:
    return [n for n in range(self.ndim) if n not in self._column_axes]

  def _row(self, axis: int) -> int:
    """The index of an axis among the rows."""
    if axis in self._column_axes:
      raise NotFactored("its columns are quantized together")
    return self._row_axes.index(axis)

  def _columns_after(self, order: Sequence[int]) -> tuple[int, ...]:
    """The columns after the axes of the array are put in this order."""
    columns = [n for n, axis in enumerate(order) if axis in self._column_axes]
    if [order[n] for n in columns] != self._column_axes:
      raise NotFactored("its columns are quantized together, in their order")
    return tuple(n - len(order) for n in columns)

  def _with_rows(self, change: Callable[[Any], Any], columns: tuple[int, ...]) -> Self:
    """Applies `change` to the rows of every stored array; `columns` is where the columns end up."""
    return dataclasses.replace(jax.tree.map(change, self), columns=columns)


def rows_of(w: jax.Array, columns: Sequence[int]) -> jax.Array:
  """The values [*rows, columns] of an array with these axes as columns, counted from its end."""
  last = range(w.ndim - len(columns), w.ndim)
  moved = jnp.moveaxis(w, columns, last)
  rows, sizes = moved.shape[: w.ndim - len(columns)], moved.shape[w.ndim - len(columns) :]
  return moved.reshape(*rows, math.prod(sizes))
