"""VeRA: two trained vectors for a layer, between random matrices that all layers share.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": VeRA(w=W, a=A, b=B, lambda_d=d, lambda_b=b)}}

    W + A diag(d) B diag(b)

A and B are frozen, random, and the same in every layer of one `rank`, `seed` and `fan_in`: of each
the first rows, or columns, that the layer has inputs and outputs for. b starts at zero, so the
adapted model starts as the base. Only d and b train, r + k numbers for a kernel of k outputs, and
so ranks are much larger than LoRA's, and may exceed the kernel's own.

No layer is asked for the largest sizes of the model: every input has its own row of A and every
output its own column of B, each drawn from the seed and its number. For the same reason no bound of
the uniform distribution can be that of a layer; see `fan_in`.

Stacked layers hold the shared matrices once for each layer of the stack. An adapter from elsewhere,
such as PEFT, has an A and a B of its own, given to `weights.VeRA` as arrays.

Source: Kopiczko et al. 2023, arXiv 2310.11454, sections 3.1 and 3.3. Defined for every kernel that
is multiplied by, convolved or gathered, with any number of axes. (PEFT has it for linear layers.)
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
  """The spec of a layer's two vectors.

  Attributes:
    rank: the inner dimension of A B, at least 1.
    seed: from which the shared matrices are drawn. It is part of what was learned: with another one
      the trained vectors mean nothing.
    d_initial: the start of d.
    fan_in: the number of inputs for which A is drawn, uniform in ±√(6 / fan_in), the bound of He et
      al. 2015. PEFT takes the largest of the adapted layers; with that, A is distributed as there.
      None for the rank, which is A's number of outputs and B's of inputs, so that He's bound keeps
      gradients at their size where the other keeps activations.
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
    """As in `Method`; the key is not used, since the seed is all layers' own."""
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
    # The generator is named, so that no setting of JAX changes what a seed means.
    keys = jax.random.split(jax.random.key(self.seed, impl="threefry2x32"))

    def rows(key, count, fan_in):
      bound = math.sqrt(6 / fan_in)

      def row(n):
        key_n = jax.random.fold_in(key, n)
        return jax.random.uniform(key_n, (self.rank,), jnp.float32, -bound, bound)

      return jax.vmap(row)(jnp.arange(count))

    return rows(keys[0], inputs, self.fan_in or self.rank), rows(keys[1], outputs, self.rank).T
