"""VeRA: two trained vectors that scale random matrices, which all layers share.

    w + a @ diag(lambda_d) @ b @ diag(lambda_b)

Only the vectors train. It is applied as a low-rank sum, with the vectors multiplied into b.

Source: Kopiczko et al. 2023, VeRA, arXiv 2310.11454, section 3.1. (The paper's A and B are in the
opposite order, for weights that multiply from the left.)
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
    a: [*stack, *inputs, rank]; it does not train.
    b: [*stack, rank, *outputs]; it does not train.
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
    # Both vectors go to b and leave a unchanged, so no gradient of a's size is computed.
    stacks = self.lambda_d.ndim - 1
    outputs = self.lambda_b.ndim - stacks
    rows = self.lambda_d.reshape(*self.lambda_d.shape, *[1] * outputs)
    columns = jnp.expand_dims(self.lambda_b, stacks)
    b = promotion.multiplied(promotion.multiplied(rows, self.b), columns)
    return LowRank(None, self.a, b, roles=self.roles)
