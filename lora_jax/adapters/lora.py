"""LoRA and rsLoRA: `W + scale * A B`, with W frozen.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": LowRank(w=W, a=A, b=B, scale=alpha / rank)}}

B starts at zero, so the adapted model starts as the base. `scale` is alpha / rank (Hu et al. 2021,
LoRA, arXiv 2106.09685, section 4.1), or alpha / sqrt(rank) with `rslora`, which keeps the size of
the update independent of the rank (Kalajdzievski 2023, arXiv 2312.03732). `train_a=False` is
LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A keeps its initial values, and the layer's input is
not saved for the backward pass.

Defined for every kernel that is used in products, convolutions or look-ups, with any number of
axes.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax

from lora_jax import checks, initializers
from lora_jax.adapters.base import Method, sizes
from lora_jax.weights import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
  """A low-rank adapter's spec.

  Attributes:
    rank: the inner dimension of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale. With 0 the model stays at the base and learns nothing.
    rslora: True to divide alpha by sqrt(rank) instead of rank.
    train_a: True to train A as well as B; False is LoRA-FA.
    dropout: the fraction of the inputs of A that a training step drops. It needs a key,
      `lora_jax.with_dropout(weights, key)`; without one nothing is dropped. Rows that are looked
      up, as in an embedding, have no input to drop.
    initializer: the starting values of A and B, one of `lora_jax.initializers` or your own.
  """

  rank: int
  alpha: float
  rslora: bool = False
  train_a: bool = True
  dropout: float = 0.0
  initializer: initializers.Initializer = initializers.kaiming_uniform

  def __post_init__(self):
    check_rank(self)
    self.settle("alpha", checks.finite)
    self.settle("rslora", checks.flag)
    self.settle("train_a", checks.flag)
    self.settle("dropout", checks.fraction)
    self.settle("initializer", checks.function)

  @property
  def scale(self) -> float:
    return scale_of(self)

  def init(self, key, path, w, roles):
    """As in `Method`; raises if the rank exceeds that of the kernel."""
    stack, inputs, outputs = sizes(w.shape, roles)
    check_rank_fits(path, self.rank, inputs, outputs)
    return self.starting_at(*self.initializer(key, stack, inputs, outputs, self.rank), roles)

  def starting_at(self, a: jax.Array, b: jax.Array, roles: str) -> LowRank:
    """Returns the adapter with given factors, of any rank, for a leaf of these roles."""
    return LowRank(
      w=None,
      a=a,
      b=b,
      scale=self.scale,
      dropout=self.dropout,
      roles=roles.lstrip("s"),
      frozen=() if self.train_a else ("a",),
    )


class Scaled(Protocol):
  """A spec whose alpha is divided by its rank or, with `rslora`, by the root of it."""

  @property
  def rank(self) -> int: ...

  @property
  def alpha(self) -> float: ...

  @property
  def rslora(self) -> bool: ...


def check_rank(spec: Method) -> None:
  """Raises TypeError if a spec's rank is no whole number, ValueError if it is below one."""
  spec.settle("rank", checks.whole, least=1)


def scale_of(spec: Scaled) -> float:
  """alpha / rank, or alpha / sqrt(rank) with `rslora`."""
  return spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)


def check_rank_fits(path: str, rank: int, inputs: tuple, outputs: tuple) -> None:
  """Raises ValueError if a rank exceeds that of a kernel with these axes."""
  fan_in, fan_out = math.prod(inputs), math.prod(outputs)
  if rank > min(fan_in, fan_out):
    largest = min(fan_in, fan_out)
    remedy = f"use rank <= {largest}" if largest else "it is empty: leave it out of the targets"
    raise ValueError(f"{path}: rank {rank} exceeds min({fan_in}, {fan_out}); {remedy}")


def check_leaves_start(path: str, spec: Any, method: str) -> None:
  """Raises TypeError if spec is no spec, ValueError if it belongs to another method or has an
  initializer of its own."""
  checks.instance(f"{path}: has", spec, Method, "spec")
  if not isinstance(spec, LoRA):
    raise ValueError(f"{path}: {method} is a start of LoRA, and the spec is {spec}; use LoRA")
  if spec.initializer is not LoRA.initializer:
    raise ValueError(f"{path}: {method} is a start, and so is the spec's initializer; choose one")
