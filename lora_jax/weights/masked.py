"""Masked: a low-rank sum whose scale and rank are numbers in an array, and not in its structure.

    LowRank(w, a, b, scale=2.0) of rank 2     scale and rank are static: one program for each
    Masked(w, a, b, gate=[2, 2, 0, 0])        the same function; a and b filled up to rank 4

Adapters of different ranks and scales are then one structure, that `vmap` can train at once. Where
the gate is zero nothing is added, and the gradient of a and b is exactly zero.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax.weights.gated import Gated
from lora_jax.weights.low_rank import LowRank
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class Masked(Gated):
  """`w + a @ diag(gate) @ b`, applied as the LowRank whose b holds the gate.

  A `Gated` keeps factors that rows share apart from gates that differ. Here the factors differ
  too, and the product of `LowRank`, made for a fast backward pass, is the better one.
  """

  def applied(self) -> LowRank:
    return self._through_b()

  @classmethod
  def of(cls, adapter: LowRank, rank: int) -> "Masked":
    """The same adapter, filled up with zeros to a rank that is no smaller."""
    stack = adapter.a.shape[: adapter.a.ndim - 1 - adapter.roles.count("i")]
    missing = rank - adapter.rank
    return cls(
      adapter.w,
      _filled(adapter.a, -1, missing),
      _filled(adapter.b, len(stack), missing),
      dropout=adapter.dropout,
      gate=_filled(jnp.full((*stack, adapter.rank), adapter.scale, adapter.b.dtype), -1, missing),
      roles=adapter.roles,
      frozen=adapter.frozen,
      path=adapter.path,
    )


def _filled(x: jax.Array, axis: int, count: int) -> jax.Array:
  """The array with zeros appended along an axis."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, count)
  return jnp.pad(x, widths)
