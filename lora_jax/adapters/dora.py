"""DoRA: a low-rank change of every output's direction, with a separately trained length.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": DoRA(w=W, a=A, b=B, magnitude=m, norm=|W|)}}

    m * (W + scale * A B) / |W + scale * A B|        norms over the inputs

B starts at zero and m at |W|, so the adapted model starts as the base. The norm follows A and B,
but is a constant in the backward pass (Liu et al. 2024, arXiv 2402.09353, section 4.3), unless
`constant_norm=False`. As in PEFT, an embedding has one length per feature, over the vocabulary, and
a convolution has one per output channel.

Defined for every kernel that is used in products, convolutions or look-ups, with any number of
axes. It starts from the base's values, so `init` needs arrays or Weights, not shapes. It is not a
sum of the base and a change: it has no low-rank form and cannot be scaled. `unmerge` recovers the
base if no output has turned by more than a right angle and no magnitude is zero. A kernel whose
inputs `shard_map` splits is materialized, since the norm is over all of them. There is no dropout.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax import checks, initializers, weights
from lora_jax.adapters.base import Method, sizes
from lora_jax.adapters.lora import check_rank, check_rank_fits, scale_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(Method):
  """The spec of a low-rank adapter with magnitudes.

  Attributes:
    rank: the inner dimension of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale.
    rslora: True to divide alpha by sqrt(rank) instead of rank.
    constant_norm: True to treat the norm as a constant in the backward pass, as the authors do. It
      saves time and memory and hardly changes the result.
    initializer: the starting values of A and B, one of `lora_jax.initializers` or your own.
  """

  rank: int
  alpha: float
  rslora: bool = False
  constant_norm: bool = True
  initializer: Callable = initializers.kaiming_uniform

  def __post_init__(self):
    check_rank(self)
    self.settle("alpha", checks.finite)
    self.settle("rslora", checks.flag)
    self.settle("constant_norm", checks.flag)
    self.settle("initializer", checks.function)

  @property
  def scale(self) -> float:
    return scale_of(self)

  def init(self, key, path, w, roles):
    """As in `Method`; raises if the rank exceeds that of the kernel, or if w is only a shape."""
    stack, inputs, outputs = sizes(w.shape, roles)
    check_rank_fits(path, self.rank, inputs, outputs)
    if isinstance(w, jax.ShapeDtypeStruct):
      raise ValueError(
        f"{path}: DoRA starts from the norms of the leaf of shape {w.shape}, and a shape has none; "
        "pass the parameters themselves"
      )
    a, b = self.initializer(key, stack, inputs, outputs, self.rank)
    norm = weights.input_norms(w, roles)
    return weights.DoRA(
      w=None,
      a=a,
      b=b,
      magnitude=jnp.array(norm),
      norm=norm,
      scale=self.scale,
      constant_norm=self.constant_norm,
      roles=roles.lstrip("s"),
    )
