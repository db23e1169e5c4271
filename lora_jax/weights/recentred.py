"""Recentred: a low-rank product that starts from a part of the base and replaces that part.

    W + scale * (a @ b - a0 @ b0)

a and b start from a0 and b0. A fresh adapter is thus the identity up to rounding, although neither
factor is zero. PiSSA and OLoRA have this form and differ in their start.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax.weights import promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.base import is_weight
from lora_jax.weights.low_rank import LowRank
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class Recentred(Adapted):
  """`w + scale * a @ b` on the residual `w = W - scale * a0 @ b0` of the base W.

  `attach` takes W and keeps the residual, so a step costs as much as LoRA's. The residual is
  computed in float32 and rounded to W's dtype. If the base is a Weight, so is the residual: it
  keeps the base unchanged and subtracts the product at each use.

  Attributes:
    w: the residual, an array or a Weight, of shape [*stack, ...]; None in an adapter.
    a: [*stack, *inputs, rank].
    b: [*stack, rank, *outputs].
    a0, b0: the starts of a and b; they do not train.
    scale: the factor of both products.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"a": "sir", "b": "sro", "a0": "sir", "b0": "sro"}
  TRAINED: ClassVar = ("a", "b")

  a: jax.Array
  b: jax.Array
  a0: jax.Array
  b0: jax.Array
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})

  @classmethod
  def start(cls, a: jax.Array, b: jax.Array, scale: float, roles: str) -> Self:
    """Returns the adapter at its start, given float32 factors of a part of the base."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Copies, since a step that donates its adapters must not donate the start too.
    return cls(
      w=None, a=a, b=b, a0=jnp.copy(a), b0=jnp.copy(b), scale=scale, roles=roles.lstrip("s")
    )

  def applied(self) -> LowRank:
    return self._low_rank(self.w, self.a, self.b)

  def attach(self, w: Any, path: str) -> Self:
    """Returns this adapter on the residual of a base; raises as in `Adapted`."""
    weight = super().attach(w, path)
    residual = weight._low_rank(w, weight.a0, -weight.b0)
    return dataclasses.replace(weight, w=residual if is_weight(w) else residual.materialize())

  def unmerge(self, merged, path):
    return self.as_low_rank().unmerge(merged, path)

  def as_low_rank(self) -> LowRank:
    """Returns the plain LoRA adapter, of twice the rank, that makes the same change of the base W.

    `[a, a0] @ [b, -b0] = a @ b - a0 @ b0`
    """
    return self._joined(None, self.b, -self.b0)

  def rescaled(self, c: jax.Array | float) -> LowRank:
    """The change of W times c: a low-rank weight of twice the rank."""
    b, b0 = (
      promotion.multiplied(self.b, c),
      promotion.multiplied(self.b0, -c if self.w is None else 1 - c),
    )
    return self._joined(self.w, b, b0)

  def _joined(self, w, b, b0) -> LowRank:
    a = jnp.concatenate([self.a, self.a0], axis=-1)
    rank_axis = self.a.ndim - 1 - self.roles.count("i")
    return self._low_rank(w, a, jnp.concatenate([b, b0], axis=rank_axis))

  def _low_rank(self, w, a, b) -> LowRank:
    return LowRank(w, a, b, self.scale, roles=self.roles, path="" if w is None else self.path)
