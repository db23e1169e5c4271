"""LoRA and rsLoRA: `W + scale * A B`, with W frozen.

    before    {"query": {"kernel": W}}
    after     {"query": {"kernel": LowRank(w=W, a=A, b=B, scale=alpha / rank)}}

B starts at zero, so the adapted model starts as the base. `scale` is alpha / rank (Hu et al. 2021,
LoRA, arXiv 2106.09685, section 4.1), or alpha / sqrt(rank) with `rslora`, which keeps the size of
the update independent of the rank (Kalajdzievski 2023, arXiv 2312.03732).
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from lora_jax import initializers
from lora_jax.weights import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """A low-rank adapter's spec.

  Attributes:
    rank: the inner dimension of A B, at least 1 and at most that of the kernel.
    alpha: the numerator of the scale.
    rslora: divide alpha by sqrt(rank) instead of rank.
    initializer: starting values of A and B, one of `lora_jax.initializers` or your own.
  """

  rank: int
  alpha: float
  rslora: bool = False
  initializer: Callable = initializers.kaiming_uniform

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"LoRA: rank {self.rank} is below 1; use a positive whole number")

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  def init(self, key, path: str, w, roles: str) -> "LoRAAdapter":
    """The adapter of one leaf at its start.

    Args:
      key: a random key of this leaf's own.
      path: the leaf's path, for errors.
      w: the leaf, of which only the shape is read.
      roles: the role of each of its axes, as in `lora_jax.weights.low_rank`.

    Raises:
      ValueError: when the rank exceeds that of the kernel.
    """
    stack, inputs, outputs = _sizes(w.shape, roles)
    fan_in, fan_out = math.prod(inputs), math.prod(outputs)
    if self.rank > min(fan_in, fan_out):
      raise ValueError(
        f"{path}: rank {self.rank} exceeds min({fan_in}, {fan_out}); "
        f"use rank <= {min(fan_in, fan_out)}"
      )
    a, b = self.initializer(key, stack, inputs, outputs, self.rank)
    return LoRAAdapter(a=a, b=b, scale=self.scale, roles=roles.lstrip("s"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAAdapter:
  """The factors of one leaf; both train.

  Attributes:
    a: float32 [*stack, *inputs, rank].
    b: float32 [*stack, rank, *outputs].
    scale: the factor of a·b.
    roles: the leaf's axes, leading stacks left out.
  """

  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})
  roles: str = dataclasses.field(metadata={"static": True})

  def attach(self, w, path: str) -> LowRank:
    """The Weight that stands for `w + scale * a @ b`.

    Raises:
      ValueError: when the factors are not those of a leaf of w's shape.
    """
    if not self._fits(tuple(w.shape)):
      raise ValueError(
        f"{path}: the adapter's factors {self.a.shape} and {self.b.shape}, for a leaf of the roles "
        f"{self.roles!r}, do not fit {tuple(w.shape)}; it was made for another model"
      )
    return LowRank(w=w, a=self.a, b=self.b, scale=self.scale, roles=self.roles, path=path)

  def detach(self, weight: LowRank) -> "LoRAAdapter":
    """This adapter with the factors of a weight that it was attached as."""
    return dataclasses.replace(self, a=weight.a, b=weight.b)

  def _fits(self, shape: tuple[int, ...]) -> bool:
    roles = self.roles.rjust(len(shape), "s")
    if len(roles) != len(shape):
      return False
    stack, inputs, outputs = _sizes(shape, roles)
    rank = self.a.shape[-1]
    return self.a.shape == (*stack, *inputs, rank) and self.b.shape == (*stack, rank, *outputs)

  def unmerge(self, merged, path: str) -> jax.Array:
    """The base of which `merged` is the merge: `merged - scale * a @ b`, in at least float32."""
    delta = self.attach(merged, path).delta()
    return (merged.astype(delta.dtype) - delta).astype(merged.dtype)


def _sizes(shape, roles: str) -> tuple[tuple[int, ...], ...]:
  """The sizes of the stacked, the input and the output axes."""
  return tuple(
    tuple(size for size, x in zip(shape, roles, strict=True) if x == role) for role in "sio"
  )
