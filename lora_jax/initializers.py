"""Starting values of the factors: `(key, stack, inputs, outputs, rank) -> (a, b)`.

The shapes are those of the stacked, input and output axes. Each function makes a,
[*stack, *inputs, rank], and b, [*stack, rank, *outputs], in float32 with a·b = 0, so that
a fresh adapter is the identity.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Sizes = tuple[int, ...]
Factors = tuple[jax.Array, jax.Array]
Initializer = Callable[[jax.Array, Sizes, Sizes, Sizes, int], Factors]


def kaiming_uniform(
  key: jax.Array, stack: Sizes, inputs: Sizes, outputs: Sizes, rank: int
) -> Factors:
  """a uniform in ±1/√fan_in, b zero: the default of the LoRA authors' code and of PEFT.

  The bound is that of He et al. 2015 with the slope √5 that PyTorch's linear layers use.
  """
  bound = 1 / math.sqrt(math.prod(inputs))
  a = jax.random.uniform(key, (*stack, *inputs, rank), jnp.float32, -bound, bound)
  return a, jnp.zeros((*stack, rank, *outputs), jnp.float32)


def gaussian(key: jax.Array, stack: Sizes, inputs: Sizes, outputs: Sizes, rank: int) -> Factors:
  """a normal with deviation 1/rank, b zero: Hu et al. 2021, section 4.1, as PEFT's `gaussian`."""
  a = jax.random.normal(key, (*stack, *inputs, rank), jnp.float32) / rank
  return a, jnp.zeros((*stack, rank, *outputs), jnp.float32)
