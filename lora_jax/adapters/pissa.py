"""PiSSA: the principal part of each kernel trains, the rest is frozen.

    W = U S Vᵀ      A = U √(S / scale), B = √(S / scale) Vᵀ, of the first `rank` singular values
    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": Recentred(w=W - scale * A B, a=A, b=B, ...)}}

Meng et al. 2024, PiSSA, arXiv 2404.02948, sections 3 and 4. The paper trains with scale 1, which is
alpha = rank; another scale is divided out of the factors, as PEFT does, so that the model starts as
the base with any. With `iterations` the decomposition is randomized, the paper's fast variant.

Defined for every kernel, whatever its axes are: the matrix is that of all inputs by all outputs. It
starts from the values of the weights, so it asks for arrays where LoRA is content with shapes, and
an attached tree holds its own copy of the kernels, less their principal part. On a quantized base
the base stays quantized, and the principal part is subtracted in factored form.
"""

import dataclasses

from lora_jax import checks, factorization
from lora_jax.adapters.recentred import FromKernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(FromKernel):
  """A spec of LoRA that starts from the principal singular vectors and values of the kernel.

  Attributes:
    rank: of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale, above zero.
    rslora: divide alpha by sqrt(rank) instead of rank.
    iterations: subspace iterations of the randomized decomposition (PEFT's `pissa_niter_4` has 4),
      each of which costs two products of the kernel with rank + 8 vectors; None decomposes exactly.
  """

  iterations: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.alpha <= 0:
      raise ValueError(f"PiSSA: alpha {self.alpha} is not above 0; its root is divided by")
    self.settle("iterations", checks.whole, least=0)

  def factorize(self, key, matrix):
    if self.iterations is None:
      u, s, vt = factorization.svd(matrix, self.rank)
    else:
      u, s, vt = factorization.randomized_svd(key, matrix, self.rank, self.iterations)
    return factorization.balanced(factorization.Svd(u, s / self.scale, vt))
