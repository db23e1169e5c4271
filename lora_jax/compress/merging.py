"""Models after training: adapters merged into their bases, and arrays for other programs.

decode(adapt(model.apply), keep_smaller(weights), ...)         quantized values and factors stay
export.save(folder, to_arrays(weights), config, tokenizer)     dense, for other programs
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import (
  Adapted,
  Factored,
  Full,
  LowRank,
  Pruned,
  Weight,
  is_weight,
  materialize,
  unmasked,
)
from lora_jax.weights.base import astype
from lora_jax.weights.quantized import Quantized

PyTree = Any


def to_arrays(weights: PyTree) -> PyTree:
  """Returns a tree's arrays in float32, computed in float32 for all dtypes.

  Args:
    weights: a tree of float arrays and Weights, adapted or not.
  """
  return jax.tree.map(lambda x: materialize(_in_float32(x)), weights, is_leaf=is_weight)


def absorb(weights: PyTree) -> PyTree:
  """Returns the tree with adapters merged into their bases where the base keeps its kind.

    an array, alone or inside a mask    the merge is an array, inside the mask
    factors of rank q, LoRA of rank r   factors of rank q + r, `[A a] [B; scale b]`; or the merge,
                                        if that has no more parameters
    any leaf trained in full            the merge, since the change has as many parameters
    quantized; other methods on factors the adapter stays alongside the base

  Sums are computed in float32 and rounded once to the base's dtype.

  Args:
    weights: a tree of arrays and Weights.
  """
  return jax.tree.map(_absorbed, weights, is_leaf=is_weight)


def without_masks(weights: PyTree) -> PyTree:
  """Returns the tree without masks that only learning inside them needs.

  These are the masks of arrays, which have the zeros, and of quantized values that are zero where
  the mask is; alone, in a pair of factors, or below an adapter.
  """
  return jax.tree.map(_unmasked, weights, is_leaf=is_weight)


def deployed(weights: PyTree, *, resident: bool) -> PyTree:
  """Returns a tree for inference, with all resolved that need not be computed at each use.

  Factors that have as many values as their product become the product.

  Args:
    weights: a tree of arrays and Weights without masks, from `keep_smaller` or `without_masks`.
    resident: True to keep a dequantized copy of quantized values instead of them, merged with an
      adapter alongside: as fast as a dense array, and as large. False to dequantize them at each
      use: their own size, and slower wherever the device has no product of such values.
  """
  return jax.tree.map(lambda leaf: _resolved(leaf, resident), weights, is_leaf=is_weight)


def keep_smaller(weights: PyTree) -> PyTree:
  """Returns the tree for inference: adapters absorbed, no masks around arrays that have zeros."""
  return without_masks(absorb(weights))


def _absorbed(leaf: jax.Array | Weight) -> jax.Array | Weight:
  if isinstance(leaf, Pruned) and is_weight(leaf.w):
    w = _absorbed(leaf.w)
    if isinstance(w, Weight):
      return dataclasses.replace(leaf, w=w)
    return Pruned.of(w, leaf.mask, leaf.path)
  if not isinstance(leaf, Adapted):
    return leaf
  leaf = dataclasses.replace(leaf, w=_absorbed(leaf.w))
  if not is_weight(leaf.w) or isinstance(leaf, Full):
    return materialize(leaf)
  if type(leaf) is LowRank and _is_plain(leaf.w) and leaf.all_roles == leaf.w.all_roles:
    joined = _joined(leaf.w, leaf)
    return joined if joined.a.size + joined.b.size < math.prod(joined.shape) else materialize(leaf)
  return leaf


def _unmasked(leaf: jax.Array | Weight) -> jax.Array | Weight:
  match leaf:
    case Pruned():
      inner = _unmasked(leaf.w)
      if isinstance(inner, Adapted) or jnp.any(jnp.where(leaf.mask, 0, materialize(inner))):
        return leaf if inner is leaf.w else dataclasses.replace(leaf, w=inner)
      return inner
    case Factored():
      parts = {name: _unmasked(getattr(leaf, name)) for name in "ab"}
    case Adapted():
      parts = {"w": _unmasked(leaf.w)}
    case _:
      return leaf
  changed = any(x is not getattr(leaf, name) for name, x in parts.items())
  return dataclasses.replace(leaf, **parts) if changed else leaf


def _resolved(leaf: jax.Array | Weight, resident: bool) -> jax.Array | Weight:
  if isinstance(leaf, Factored):
    a, b = (_resolved(x, resident) for x in (leaf.a, leaf.b))
    leaf = dataclasses.replace(leaf, a=a, b=b)
    values = sum(math.prod(x.shape) for x in (a, b))
    return leaf if values < math.prod(leaf.shape) else materialize(leaf)
  if resident and isinstance(leaf.w if isinstance(leaf, Adapted) else unmasked(leaf), Quantized):
    return materialize(leaf)
  return leaf


def _is_plain(base: Weight) -> bool:
  return isinstance(base, Factored) and not is_weight(base.a) and not is_weight(base.b)


def _joined(base: Factored, adapter: LowRank) -> Factored:
  """One pair of factors that computes the sum of both."""
  rank_axis = base.b.ndim - 1 - base.roles.count("o")
  a = adapter.a.astype(base.dtype)
  b = (adapter.scale * adapter.b).astype(base.dtype)
  return dataclasses.replace(
    base, a=jnp.concatenate([base.a, a], axis=-1), b=jnp.concatenate([base.b, b], axis=rank_axis)
  )


def _in_float32(leaf: jax.Array | Weight) -> jax.Array | Weight:
  # Adapters have their base's dtype, and masks may contain any, so their contents are cast.
  if isinstance(leaf, Adapted | Pruned):
    return dataclasses.replace(leaf, w=_in_float32(leaf.w))
  return astype(leaf, jnp.float32)
