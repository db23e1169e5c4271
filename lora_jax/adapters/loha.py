"""LoHa: a change of the base that is the elementwise product of two low-rank products.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": LoHa(w=W, a1=A1, b1=B1, a2=A2, b2=B2, scale=alpha / rank)}}

    W + scale * (A1 B1) * (A2 B2)

It has twice the parameters of a LoRA of the same rank r, and a change of rank up to r². A2 starts
at zero, so the adapted model starts as the base; the other factors start as in PEFT. Source:
Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098.

It costs as much as a LoRA of rank r²: 3 r² (d + k) multiplications per row of a d × k kernel,
forward and backward together. To materialize the sum and differentiate by it costs d·k per row.
That is less from r² = d·k / (3 (d + k)) on, r = 13 for d = k = 1024. From there on, call the bare
function on `lora_jax.materialize(weights)` instead of adapting it.

Defined for every kernel that is used in products, convolutions or look-ups, with any number of
axes. A convolution's window belongs to the inputs, as in PEFT without `use_effective_conv2d`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lora_jax import checks, weights
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import check_rank, check_rank_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Method):
  """The spec of an elementwise product of low-rank products.

  Attributes:
    rank: the inner dimension of A1 B1 and of A2 B2, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale, alpha / rank.
  """

  rank: int
  alpha: float

  def __post_init__(self):
    check_rank(self)
    self.settle("alpha", checks.finite)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def init(self, key, path, w, roles):
    """As in `Method`; raises if the rank exceeds that of the kernel."""
    stack, inputs, outputs = sizes(w.shape, roles)
    check_rank_fits(path, self.rank, inputs, outputs)
    key_a1, key_b1, key_b2 = jax.random.split(key, 3)

    def uniform(key, shape, fan_in):
      bound = 1 / math.sqrt(fan_in)
      return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    a_shape, b_shape = (*stack, *inputs, self.rank), (*stack, self.rank, *outputs)
    return weights.LoHa(
      w=None,
      a1=uniform(key_a1, a_shape, math.prod(inputs)),
      b1=uniform(key_b1, b_shape, self.rank),
      a2=jnp.zeros(a_shape, jnp.float32),
      b2=uniform(key_b2, b_shape, self.rank),
      scale=self.scale,
      roles=roles.lstrip("s"),
    )
