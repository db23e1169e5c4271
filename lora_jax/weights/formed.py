"""Formed: a weight whose factored form is not usable in products; each use materializes it.

The array is a temporary of the product that uses it, and the backward pass computes it again. In
scanned layers, one layer's kernels are materialized at a time. In unrolled layers the compiler
decides when. XLA on CPU materializes all of them early, unless its scheduler is told to save memory
(`xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`, in XLA_FLAGS or in the
`compiler_options` of `jax.jit`). Even then it keeps them for the backward pass, since it merges the
second computation with the first.
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
  """A weight whose products are those of the array that it represents."""

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
    """`f(self, *operands)`, which saves only the weight's parts and the operands for backward."""
    return checkpoint_name(jax.checkpoint(f)(self, *operands), PRODUCT)
