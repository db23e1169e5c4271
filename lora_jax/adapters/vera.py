"""VeRA: two trained vectors per layer, between random matrices that all layers share.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": VeRA(w=W, a=A, b=B, lambda_d=d, lambda_b=b)}}

    W + A diag(d) B diag(b)

A and B are frozen and random. Layers with the same `rank`, `seed` and `fan_in` share them: a layer
takes the first rows of A for its inputs and the first columns of B for its outputs. b starts at
zero, so the adapted model starts as the base. Only d and b train, r + k parameters for a kernel of
k outputs. So ranks are much larger than LoRA's, and may exceed the kernel's own.

The largest sizes of the model need not be known: every input has its own row of A and every output
its own column of B, each drawn from the seed and its index. For the same reason the bound of the
uniform distribution cannot depend on a layer; see `fan_in`.

Stacked layers hold a copy of the shared matrices for each layer of the stack. An adapter from
elsewhere, such as PEFT, has an A and a B of its own, passed to `weights.VeRA` as arrays.

Source: Kopiczko et al. 2023, arXiv 2310.11454, sections 3.1 and 3.3. Defined for every kernel that
is used in products, convolutions or look-ups, with any number of axes. (PEFT: linear layers only.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lora_jax import checks, weights
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import check_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
  """The spec of a layer's two vectors and the shared matrices.

  Attributes:
    rank: the inner dimension of A B, at least 1.
    seed: the seed of the shared matrices. It is part of the adapter: with another seed the trained
      vectors are meaningless.
    d_initial: the initial value of d.
    fan_in: the number of inputs for which A is drawn, uniform in ±√(6 / fan_in), the bound of He et
      al. 2015. PEFT takes the largest of the adapted layers; pass that for the same distribution.
      None takes the rank, which is A's number of outputs and B's of inputs: He's bound then
      preserves the size of gradients instead of activations.
  """

  rank: int
  seed: int = 0
  d_initial: float = 0.1
  fan_in: int | None = None

  def __post_init__(self):
    check_rank(self)
    self.settle("seed", checks.whole, least=0, most=checks.MAX_SEED)
    self.settle("d_initial", checks.finite)
    self.settle("fan_in", checks.whole, least=1)

  def init(self, key, path, w, roles):
    """As in `Method`; the key is not used, since all layers share the seed."""
    stack, inputs, outputs = sizes(w.shape, roles)
    a, b = self.matrices(math.prod(inputs), math.prod(outputs))
    a, b = a.reshape(*inputs, self.rank), b.reshape(self.rank, *outputs)
    return weights.VeRA(
      w=None,
      a=jnp.broadcast_to(a, (*stack, *a.shape)),
      b=jnp.broadcast_to(b, (*stack, *b.shape)),
      lambda_d=jnp.full((*stack, self.rank), self.d_initial, jnp.float32),
      lambda_b=jnp.zeros((*stack, *outputs), jnp.float32),
      roles=roles.lstrip("s"),
    )

  def matrices(self, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    """The first rows of A, [inputs, rank], and the first columns of B, [rank, outputs]."""
    # An explicit generator, so that no setting of JAX changes the meaning of a seed.
    keys = jax.random.split(jax.random.key(self.seed, impl="threefry2x32"))

    def rows(key, count, fan_in):
      bound = math.sqrt(6 / fan_in)

      def row(n):
        key_n = jax.random.fold_in(key, n)
        return jax.random.uniform(key_n, (self.rank,), jnp.float32, -bound, bound)

      return jax.vmap(row)(jnp.arange(count))

    return rows(keys[0], inputs, self.fan_in or self.rank), rows(keys[1], outputs, self.rank).T
