"""LoKr: a change of the base that is a Kronecker product.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": LoKr(w=W, w1=C, w2_a=A, w2_b=B, scale=alpha / rank)}}

    W + scale * kron(C, A B)

The flattened inputs of the kernel are split into i1 × i2 and its outputs into o1 × o2. C is
[i1, o1] and A B is [i2, o2]. C starts at zero, so the adapted model starts as the base. From rank
max(i2, o2) / 2 on, A B is one full matrix. With `decompose_both`, C is a product too below rank
max(i1, o1) / 2; its factor at the outputs then starts at zero. All of this is as in PEFT. Source:
Yeh et al. 2023, LyCORIS, arXiv 2309.14859, section 3.2.

Defined for every kernel that is used in products, convolutions or look-ups, with any number of
axes. Products are direct: they materialize neither the Kronecker product nor a low-rank form of it.
Convolutions, look-ups, slices and products over part of the inputs use the low-rank form, whose
rank is min(i1, o1) times that of A B. If that is not below the kernel's own rank, the kernel is
materialized, as it is by a `shard_map` that splits the inputs or the outputs.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lora_jax import checks, weights
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import check_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Method):
  """The spec of a Kronecker product.

  Attributes:
    rank: the inner dimension of A B, at least 1.
    alpha: the numerator of the scale, alpha / rank.
    decompose_both: True to make C a product of two thin matrices too, if the rank is small enough.
    factor: the size of i1 and of o1, or their upper bound if it is no divisor of the inputs or
      outputs; None for the divisor nearest to the square root. PEFT's `decompose_factor`.
    channels: True to split only the last input axis and leave the others whole in A, as PEFT does
      for a convolution with its channels and its window.
  """

  rank: int
  alpha: float
  decompose_both: bool = False
  factor: int | None = None
  channels: bool = False

  def __post_init__(self):
    check_rank(self)
    self.settle("alpha", checks.finite)
    self.settle("decompose_both", checks.flag)
    self.settle("factor", checks.whole, least=1)
    self.settle("channels", checks.flag)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def init(self, key, path, w, roles):
    """As in `Method`."""
    stack, inputs, outputs = sizes(w.shape, roles)
    window = math.prod(inputs[:-1]) if self.channels else 1
    i1, i2 = factorization(math.prod(inputs) // window, self.factor)
    o1, o2 = factorization(math.prod(outputs), self.factor)
    rank = self.rank
    keys = jax.random.split(key)

    def zeros(*shape):
      return jnp.zeros((*stack, *shape), jnp.float32)

    def uniform(key, *shape):
      bound = 1 / math.sqrt(max(1, shape[0]))  # an axis of size zero has no values
      return jax.random.uniform(key, (*stack, *shape), jnp.float32, -bound, bound)

    w1 = w1_a = w1_b = w2 = w2_a = w2_b = None
    if self.decompose_both and rank < max(i1, o1) / 2:
      w1_a, w1_b = uniform(keys[0], i1, rank), zeros(rank, o1)
    else:
      w1 = zeros(i1, o1)
    if rank < max(i2, o2) / 2:
      key_a, key_b = jax.random.split(keys[1])
      w2_a, w2_b = uniform(key_a, i2 * window, rank), uniform(key_b, rank, o2)
    else:
      w2 = uniform(keys[1], i2 * window, o2)
    return weights.LoKr(
      w=None,
      w1=w1,
      w1_a=w1_a,
      w1_b=w1_b,
      w2=w2,
      w2_a=w2_a,
      w2_b=w2_b,
      scale=self.scale,
      roles=roles.lstrip("s"),
      order=_channels_first(roles) if self.channels else (),
    )


def factorization(size: int, factor: int | None = None) -> tuple[int, int]:
  """A size as a product of two.

  The first is `factor` if it divides the size. Otherwise it is the largest divisor that is at most
  `factor` and at most the square root. A size of zero is 1 x 0.

  >>> factorization(128), factorization(128, 4), factorization(128, 6), factorization(127)
  ((8, 16), (4, 32), (4, 32), (1, 127))
  """
  if factor and size % factor == 0:
    return factor, size // factor
  limit = max(1, min(factor or size, math.isqrt(size)))
  first = next(n for n in range(limit, 0, -1) if size % n == 0)
  return first, size // first


def _channels_first(roles: str) -> tuple[int, ...]:
  """The axes, counted from the end, with the last input first."""
  inputs, outputs = ([n - len(roles) for n, x in enumerate(roles) if x == role] for role in "io")
  return (*inputs[-1:], *inputs[:-1], *outputs)
