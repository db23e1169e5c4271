"""The common part of PiSSA and OLoRA: a start that is taken from the kernel itself."""

import dataclasses

import jax

from lora_jax import checks, decompositions
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import check_rank, check_rank_fits, scale_of
from lora_jax.weights.base import materialize
from lora_jax.weights.recentred import Recentred


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromKernel(Method):
  """A spec whose A and B start as factors of the kernel; the base then loses their product.

  Attributes:
    rank: of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale.
    rslora: True to divide alpha by sqrt(rank) instead of rank.
  """

  rank: int
  alpha: float
  rslora: bool = False

  def __post_init__(self):
    check_rank(self)
    self.settle("alpha", checks.finite)
    self.settle("rslora", checks.flag)

  @property
  def scale(self) -> float:
    return scale_of(self)

  def factorize(self, key: jax.Array, matrix: jax.Array) -> decompositions.Factors:
    """Returns a, [*stack, d, rank], and b, [*stack, rank, k], of matrices [*stack, d, k]."""
    raise NotImplementedError

  def init(self, key, path, w, roles):
    """As in `Method`; raises if the rank exceeds the kernel's, or if w is only a shape."""
    _, inputs, outputs = sizes(w.shape, roles)
    check_rank_fits(path, self.rank, inputs, outputs)
    if isinstance(w, jax.ShapeDtypeStruct):
      raise ValueError(
        f"{path}: {type(self).__name__} starts from the values of the weights, and this is only a "
        "shape; pass arrays, or call init under jax.eval_shape"
      )
    a, b = decompositions.factorized(
      materialize(w), roles, lambda matrix: self.factorize(key, matrix)
    )
    return Recentred.start(a, b, self.scale, roles)
