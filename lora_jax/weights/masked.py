"""Masked: a low-rank sum whose scale and rank are array values instead of static fields.

    LowRank(w, a, b, scale=2.0) of rank 2     scale and rank are static: one program for each
    Masked(w, a, b, gate=[2, 2, 0, 0])        the same function; a and b padded to rank 4

Adapters of different ranks and scales then have one structure, so `vmap` can train them at once.
Where the gate is zero nothing is added, and the gradients of a and b are exactly zero.
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
  """`w + a @ diag(gate) @ b`, applied as a LowRank with the gate multiplied into b.

  `Gated` serves rows that share their factors and differ in their gates. Here the factors differ
  too, and the product of `LowRank`, which has a fast backward pass, is faster.
  """

  def applied(self) -> LowRank:
    return self._through_b()

  @classmethod
  def of(cls, adapter: LowRank, rank: int) -> "Masked":
    """Returns the same adapter, padded with zeros to a rank that is at least its own."""
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
  """Appends zeros to an array along an axis."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, count)
  return jnp.pad(x, widths)
