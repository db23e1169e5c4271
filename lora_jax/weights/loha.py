"""LoHa: the elementwise product of two low-rank products, a change of rank up to r².

    w + scale * (a1 @ b1) * (a2 @ b2)

An elementwise product of low-rank products is itself a low-rank product. Its factors hold, for each
row and column, every product of an entry of the first with an entry of the second:

    (a1 b1) * (a2 b2) = A B,   A[d, (p, q)] = a1[d, p] a2[d, q],   B[(p, q), k] = b1[p, k] b2[q, k]

It is applied in this form, at the cost of a LoRA of rank r².

Source: Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098, section 2.2.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.weights import promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.low_rank import LowRank
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class LoHa(Adapted):
  """`w + scale * (a1 @ b1) * (a2 @ b2)`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    a1, a2: [*stack, *inputs, rank].
    b1, b2: [*stack, rank, *outputs].
    scale: the factor of the product.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"a1": "sir", "b1": "sro", "a2": "sir", "b2": "sro"}
  TRAINED: ClassVar = ("a1", "b1", "a2", "b2")
  LINEAR: ClassVar = "b2"

  a1: jax.Array
  b1: jax.Array
  a2: jax.Array
  b2: jax.Array
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})

  def applied(self) -> LowRank:
    return dataclasses.replace(self.as_low_rank(), w=self.w, path=self.path)

  def as_low_rank(self) -> LowRank:
    """The LowRank of rank r² that makes the same change."""
    p = self.b1.ndim - 1 - self.roles.count("o")  # the rank axis of b1
    a = promotion.multiplied(self.a1[..., :, None], self.a2[..., None, :])
    b = promotion.multiplied(jnp.expand_dims(self.b1, p + 1), jnp.expand_dims(self.b2, p))
    a = a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])
    b = b.reshape(*b.shape[:p], b.shape[p] * b.shape[p + 1], *b.shape[p + 2 :])
    return LowRank(None, a, b, self.scale, roles=self.roles)
