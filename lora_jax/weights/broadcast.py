"""Broadcast: an array repeated along new axes, as in `w * vector`.

A jaxpr has no product of a matrix and a row: it first broadcasts the row to the matrix's shape. The
interpreter keeps such an operand as a Broadcast, so that the rules for products see the row.
"""

import dataclasses

import jax
from jax import lax

from lora_jax.weights.base import Weight
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class Broadcast(Weight):
  """`lax.broadcast_in_dim(x, sizes, axes)`.

  Attributes:
    x: an array whose axes are `axes` of the result.
    axes: ascending axes of the result.
    sizes: the result's shape.
  """

  x: jax.Array
  axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  @classmethod
  def of(cls, x: jax.Array, sizes: tuple[int, ...], axes: tuple[int, ...]) -> "Broadcast":
    """The broadcast of x without its repeated axes of size one."""
    kept = [n for n, axis in enumerate(axes) if x.shape[n] == sizes[axis]]
    x = lax.squeeze(x, [n for n in range(x.ndim) if n not in kept])
    return cls(x, tuple(axes[n] for n in kept), tuple(sizes))

  @property
  def shape(self):
    return self.sizes

  def materialize(self):
    return lax.broadcast_in_dim(self.x, self.sizes, self.axes)
