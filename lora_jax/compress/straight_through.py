"""Training against the quantized merge, so that to merge and to quantize loses nothing.

    def loss(adapters):
      weights = straight_through(lora_jax.attach(params, adapters), formats, axes)
      return cross_entropy(apply({"params": weights}, x), y)

    ...
    small = compress.quantize(lora_jax.merge(params, adapters), formats, axes)    # the same model

The base is held in full, and every step rounds what base and adapter add up to: a kernel at a time,
forward and again backward. So a step costs more than one of LoRA, and its result is a plain
quantized model with no adapter beside it.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax import checks, tree
from lora_jax.axes import Axes
from lora_jax.compress.quantize import columns_of
from lora_jax.targets import axes_of
from lora_jax.weights import Coded, is_weight
from lora_jax.weights.quantized import Format
from lora_jax.weights.rounded import Rounded

PyTree = Any


def straight_through(
  weights: PyTree, formats: Mapping[str, Format], axes: Mapping[str, Axes] | None = None
) -> PyTree:
  """The tree with the leaves at these paths rounded where they are used, and a gradient of them.

  Args:
    weights: what `lora_jax.attach` made; arrays are rounded too.
    formats: `{path: Format}`, that the merged model will be quantized to.
    axes: what `trace_axes` found; by default what `match` was given for `formats`.

  Raises:
    ValueError: when a path is no leaf, or one that is quantized already; or its axes are not known.
  """
  leaves = tree.flatten(weights, is_leaf=is_weight)
  checks.by_path(formats, Format, "format", leaves)
  axes = axes_of(formats, axes, leaves)

  def leaf_of(path, leaf):
    if path not in formats:
      return leaf
    if isinstance(leaf, Coded):
      raise ValueError(f"{path}: is quantized already, a {type(leaf).__name__}")
    columns = columns_of(path, leaf, axes)
    return Rounded(leaf, format=formats[path], columns=columns, path=path)

  return tree.map_with_path(leaf_of, weights, is_leaf=is_weight)
