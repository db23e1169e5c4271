"""The factors of factorized kernels as separate kernels, for later compression steps.

    opened = open_factors(params)          # .../kernel becomes {"a": ..., "b": ...}
    params = close_factors(change(opened), params)

They are then pruned and quantized by the same functions as dense kernels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax import tree
from lora_jax.axes import Axes
from lora_jax.weights import Factored, is_weight

PyTree = Any

_PRODUCT = ("dot_general",)


def open_factors(params: PyTree) -> PyTree:
  """Returns the tree with every Factored replaced by a dict of its factors."""
  return jax.tree.map(
    lambda x: {"a": x.a, "b": x.b} if isinstance(x, Factored) else x, params, is_leaf=is_weight
  )


def open_axes(params: PyTree, axes: Mapping[str, Axes]) -> dict[str, Axes]:
  """Returns the axes of `open_factors(params)`, given those of the parameters.

  The rank is the output of the first factor and the input of the second, for a kernel of any axes,
  such as a convolution's.
  """
  found = dict(axes)
  for path, leaf in tree.flatten(params, is_leaf=is_weight).items():
    if isinstance(leaf, Factored):
      del found[path]
      stack, inputs, outputs = (leaf.all_roles.count(role) for role in "sio")
      found[f"{path}/a"] = Axes("s" * stack + "i" * inputs + "o", _PRODUCT)
      found[f"{path}/b"] = Axes("s" * stack + "i" + "o" * outputs, _PRODUCT)
  return found


def close_factors(opened: PyTree, like: PyTree) -> PyTree:
  """Returns the tree with Factored kernels where `like` has them; factors may be Weights now."""
  leaves = tree.flatten(opened, is_leaf=is_weight)

  def closed(path, leaf):
    if not isinstance(leaf, Factored):
      return leaves[path]
    return dataclasses.replace(leaf, a=leaves[f"{path}/a"], b=leaves[f"{path}/b"])

  return tree.map_with_path(closed, like, is_leaf=is_weight)
