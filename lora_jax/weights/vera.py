"""VeRA: two vectors that scale random matrices, the same ones in every layer.

    w + a @ diag(lambda_d) @ b @ diag(lambda_b)

The vectors alone train. It is applied as a low-rank sum whose factors hold them.

Source: Kopiczko et al. 2023, VeRA, arXiv 2310.11454, section 3.1. (Its A and B stand the other way
round, for weights that are multiplied from the left.)
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
class VeRA(Adapted):
  """`w + a @ diag(lambda_d) @ b @ diag(lambda_b)`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    a: [*stack, *inputs, rank], which does not train.
    b: [*stack, rank, *outputs], which does not train.
    lambda_d: [*stack, rank].
    lambda_b: [*stack, *outputs].
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"a": "sir", "b": "sro", "lambda_d": "sr", "lambda_b": "so"}
  TRAINED: ClassVar = ("lambda_d", "lambda_b")
  LINEAR: ClassVar = "lambda_b"

  a: jax.Array
  b: jax.Array
  lambda_d: jax.Array
  lambda_b: jax.Array

  def applied(self) -> LowRank:
    return dataclasses.replace(self.as_low_rank(), w=self.w, path=self.path)

  def as_low_rank(self) -> LowRank:
    # Both vectors go to b, which leaves a as it is: no gradient of its size is formed.
    stacks = self.lambda_d.ndim - 1
    outputs = self.lambda_b.ndim - stacks
    rows = self.lambda_d.reshape(*self.lambda_d.shape, *[1] * outputs)
    columns = jnp.expand_dims(self.lambda_b, stacks)
    b = promotion.multiplied(promotion.multiplied(rows, self.b), columns)
    return LowRank(None, self.a, b, roles=self.roles)
