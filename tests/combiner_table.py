"""The table of combiners, by PEFT's names, and what adapters add to a base."""

import jax.numpy as jnp

import lora_jax
from lora_jax.compose import combiners

DENSITY, RANK = 0.4, 3
WEIGHTS = (0.7, -0.4)

MIXES = {
  "linear": combiners.linear,
  "magnitude_prune": combiners.magnitude_prune(DENSITY),
  "ties": combiners.ties(DENSITY),
  "dare_linear": combiners.dare_linear(DENSITY),
  "dare_ties": combiners.dare_ties(DENSITY),
}
COMBINERS = {"cat": combiners.cat, "svd": combiners.svd(RANK)}
COMBINERS |= {name: combiners.on_factors(mix) for name, mix in MIXES.items()}
COMBINERS |= {f"{name}_svd": combiners.on_delta(mix, RANK) for name, mix in MIXES.items()}
del COMBINERS["linear_svd"]  # what peft calls svd


def deltas(adapters):
  """What adapters add to bases of zeros."""
  zeros = {}
  for path, x in adapters.items():
    stacks = x.a.ndim - 1 - x.roles.count("i")
    zeros[path] = jnp.zeros((*x.a.shape[:-1], *x.b.shape[stacks + 1 :]))
  return lora_jax.merge(zeros, adapters)
