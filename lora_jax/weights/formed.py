"""Formed: a weight that cannot be applied in parts, and is formed for one use at a time.

Its array is a temporary of the product that uses it, and the backward pass forms it again. Of
layers that are scanned, one layer's kernels are formed at a time. Of layers that are unrolled it is
for the compiler to say when. XLA on a CPU forms all of them early, unless its scheduler is told to
spare memory (`xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`, as XLA_FLAGS or among
the `compiler_options` of `jax.jit`), and keeps them for the backward pass all the same: it takes
what is formed again for what was formed before.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.weights.base import Weight
from lora_jax.weights.low_rank import PRODUCT


@dataclasses.dataclass(frozen=True)
class Formed(Weight):
  """A weight whose products are those of the array that it stands for."""

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    def product(self, other):
      w = self.materialize()
      operands = (w, other) if weight_is_lhs else (other, w)
      return lax.dot_general(*operands, dimension_numbers, **params)

    return self.used(product, other)

  def conv_general_dilated(self, x, **params):
    return self.used(lambda self, x: lax.conv_general_dilated(x, self.materialize(), **params), x)

  def ragged_dot_general(self, lhs, group_sizes, **params):
    def product(self, lhs, group_sizes):
      return lax.ragged_dot_general(lhs, self.materialize(), group_sizes, **params)

    return self.used(product, lhs, group_sizes)

  def used(self, f: Callable, *operands: jax.Array) -> jax.Array:
    """`f(self, *operands)`, which keeps only the weight's parts and the operands for later."""
    return checkpoint_name(jax.checkpoint(f)(self, *operands), PRODUCT)
