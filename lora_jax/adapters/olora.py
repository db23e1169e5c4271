"""OLoRA: LoRA that starts from an orthonormal basis of each kernel.

    Wᵀ = Q R        A = the first `rank` rows of R, transposed; B = those columns of Q, transposed
    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": Recentred(w=W - scale * A B, a=A, b=B, ...)}}

Source: Büyükakyüz 2024, OLoRA, arXiv 2406.01775, section 3. W is inputs by outputs here and outputs
by inputs in the paper, hence the transposes: the rows of B are orthonormal. As in PEFT, and unlike
in PiSSA, the factors are not divided by the scale: the part that trains is `scale * A B`.

Defined for every kernel. Like PiSSA, it starts from the values of the weights.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import decompositions
from lora_jax.adapters.recentred import FromKernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class OLoRA(FromKernel):
  """A spec of LoRA that starts from the QR decomposition of the kernel.

  Attributes:
    rank: of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale.
    rslora: True to divide alpha by sqrt(rank) instead of rank.
  """

  def factorize(self, key: jax.Array, matrix: jax.Array) -> decompositions.Factors:
    q, r = jnp.linalg.qr(jnp.swapaxes(matrix, -2, -1))
    a, b = jnp.swapaxes(r, -2, -1), jnp.swapaxes(q, -2, -1)
    return a[..., : self.rank], b[..., : self.rank, :]
