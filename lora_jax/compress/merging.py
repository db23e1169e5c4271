"""Models on their way to other programs: every Weight as an array, or as it is where it is smaller.

export.save(folder, to_arrays(weights), config, tokenizer)          dense, for other programs
artifact.save(folder, adapt(model.apply), keep_smaller(weights), ...)    codes and factors stay
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import Adapted, Pruned, Weight, is_weight, materialize
from lora_jax.weights.base import astype

PyTree = Any


def to_arrays(weights: PyTree) -> PyTree:
  """The arrays in float32 that a tree stands for, computed in it whatever its dtypes are.

  weights: a tree of float arrays and Weights, adapted or not.
  """
  return jax.tree.map(lambda x: materialize(_in_float32(x)), weights, is_leaf=is_weight)


def keep_smaller(weights: PyTree) -> PyTree:
  """The tree with adapters and masks of dense arrays merged into them.

  What is coded or factored stays what it is, with what was learnt or masked beside it.
  """
  return jax.tree.map(lambda x: x if _is_smaller(x) else materialize(x), weights, is_leaf=is_weight)


def _in_float32(leaf: jax.Array | Weight) -> jax.Array | Weight:
  # Adapters have their base's dtype and a mask hides numbers of any, so what they hold is cast.
  if isinstance(leaf, Adapted | Pruned):
    return dataclasses.replace(leaf, w=_in_float32(leaf.w))
  return astype(leaf, jnp.float32)


def _is_smaller(leaf: jax.Array | Weight) -> bool:
  while isinstance(leaf, Adapted | Pruned):
    leaf = leaf.w
  return is_weight(leaf)
