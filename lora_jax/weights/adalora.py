"""AdaLoRA: `w + scale * a diag(e) b`. Zeros in e switch off single ranks."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.weights import promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.low_rank import LowRank
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class AdaLoRA(Adapted):
  """`w + scale * a diag(e) b`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    a: [*stack, *inputs, rank], the left singular vectors.
    e: [*stack, rank], the singular values. Each zero lowers the rank of the change by one.
    b: [*stack, rank, *outputs], the right singular vectors.
    scale: the factor of the product.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"a": "sir", "e": "sr", "b": "sro"}
  TRAINED: ClassVar = ("a", "e", "b")
  LINEAR: ClassVar = "e"

  a: jax.Array
  e: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})

  @property
  def rank(self) -> int:
    return self.e.shape[-1]

  def applied(self) -> LowRank:
    return LowRank(
      self.w,
      promotion.multiplied(self.a, self._beside(self.e)),
      self.b,
      self.scale,
      roles=self.roles,
      path=self.path,
    )

  def as_low_rank(self) -> LowRank:
    """The same change as a plain LoRA that holds only the remaining ranks.

    All layers of a stack get one rank, that of the layer with the most ranks remaining. The rank
    depends on values, so this does not work inside `jit`.
    """
    left = np.asarray(self.e) != 0
    rank = max(1, int(left.sum(axis=-1).max()))
    first = np.argsort(~left, axis=-1, kind="stable")[..., :rank]
    stacks = self.e.ndim - 1
    a = jnp.take_along_axis(
      promotion.multiplied(self.a, self._beside(self.e)), self._beside(first), axis=-1
    )
    of_b = first.reshape(*first.shape, *[1] * (self.b.ndim - first.ndim))
    b = jnp.take_along_axis(self.b, of_b, axis=stacks)
    return LowRank(None, a, b, self.scale, roles=self.roles)

  def _a_scaled(self) -> jax.Array:
    """`a diag(e)`."""
    return promotion.multiplied(self.a, self._beside(self.e))

  def _beside(self, e):
    """An array [*stack, rank] with axes of size one for the inputs of a."""
    return e.reshape(*e.shape[:-1], *[1] * (self.a.ndim - e.ndim), e.shape[-1])
