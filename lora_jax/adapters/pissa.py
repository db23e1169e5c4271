"""PiSSA: the principal part of each kernel trains, the rest is frozen.

    W = U S Vᵀ      A = U √(S / scale), B = √(S / scale) Vᵀ, of the first `rank` singular values
    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": Recentred(w=W - scale * A B, a=A, b=B, ...)}}

Source: Meng et al. 2024, PiSSA, arXiv 2404.02948, sections 3 and 4. The paper trains with scale 1,
that is, alpha = rank. Any other scale is divided out of the factors, as in PEFT, so that the model
starts as the base. With `iterations` the decomposition is randomized, the paper's fast variant.

Defined for every kernel with any axes: the matrix is that of all inputs by all outputs. It starts
from the values of the weights, so `init` needs arrays where LoRA needs only shapes. An attached
tree holds its own copy of the kernels without their principal part. A quantized base stays
quantized, and the principal part is subtracted in factored form.
"""

import dataclasses

import jax

from lora_jax import checks, decompositions
from lora_jax.adapters.recentred import FromKernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(FromKernel):
  """A spec of LoRA that starts from the principal singular vectors and values of the kernel.

  Attributes:
    rank: of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale, above zero.
    rslora: True to divide alpha by sqrt(rank) instead of rank.
    iterations: subspace iterations of the randomized decomposition (4 in PEFT's `pissa_niter_4`).
      Each costs two products of the kernel with rank + 8 vectors. None decomposes exactly.
  """

  iterations: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.alpha <= 0:
      raise ValueError(f"PiSSA: alpha {self.alpha} is not above 0; the factors divide by its root")
    self.settle("iterations", checks.whole, least=0)

  def factorize(self, key: jax.Array, matrix: jax.Array) -> decompositions.Factors:
    if self.iterations is None:
      u, s, vt = decompositions.svd(matrix, self.rank)
    else:
      u, s, vt = decompositions.randomized_svd(key, matrix, self.rank, self.iterations)
    return decompositions.balanced(decompositions.Svd(u, s / self.scale, vt))
