"""AdaLoRA: `W + scale * P diag(E) Q`; training distributes the ranks over the matrices.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": AdaLoRA(w=W, a=P, e=E, b=Q, scale=alpha / rank)}}

Every matrix starts with `rank` triplets: a column of P, a value of E and a row of Q. Training
estimates the importance of each triplet and keeps the most important ones within a budget for all
matrices together. `lora_jax.train.adalora` wraps the optimizer for this, and a penalty keeps P and
Q nearly orthogonal. E starts at zero, so the adapted model starts as the base.

Defined for every kernel that LoRA is defined for. The layers of a stack have ranks of their own.

Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, section 3.1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import checks, weights
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import check_rank, check_rank_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
  """The spec of a low-rank adapter in the form of a singular value decomposition.

  Attributes:
    rank: the triplets that each matrix starts with; the authors use 1.5 times the average rank at
      the end.
    alpha: the numerator of the scale, alpha / rank, which does not follow the budget.
    deviation: the standard deviation of the initial P and Q; 0.02 in the authors' code and in PEFT.
  """

  rank: int
  alpha: float
  deviation: float = 0.02

  def __post_init__(self):
    check_rank(self)
    self.settle("alpha", checks.finite)
    self.settle("deviation", checks.finite, least=0)

  def init(self, key, path, w, roles):
    """As in `Method`; raises if the rank exceeds that of the kernel."""
    stack, inputs, outputs = sizes(w.shape, roles)
    check_rank_fits(path, self.rank, inputs, outputs)
    for_a, for_b = jax.random.split(key)
    return weights.AdaLoRA(
      w=None,
      a=self.deviation * jax.random.normal(for_a, (*stack, *inputs, self.rank), jnp.float32),
      e=jnp.zeros((*stack, self.rank), jnp.float32),
      b=self.deviation * jax.random.normal(for_b, (*stack, self.rank, *outputs), jnp.float32),
      scale=self.alpha / self.rank,
      roles=roles.lstrip("s"),
    )
