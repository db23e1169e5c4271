"""Training against the quantized merge, so that merging and quantizing afterwards loses nothing.

    def loss(adapters):
      weights = straight_through(lora_jax.attach(params, adapters), formats, axes)
      return cross_entropy(apply({"params": weights}, x), y)

    ...
    small = compress.quantize(lora_jax.merge(params, adapters), formats, axes)    # the same model

The base is stored in full precision. Every step quantizes the sum of base and adapter, one kernel
at a time, in the forward and again in the backward pass. A step therefore costs more than one of
LoRA. The result is a plain quantized model without an adapter.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax import checks, tree
from lora_jax.axes import Axes
from lora_jax.compress.quantization import columns_of
from lora_jax.targets import axes_of
from lora_jax.weights import Coded, is_weight
from lora_jax.weights.quantized import Format
from lora_jax.weights.rounded import Rounded

PyTree = Any


def straight_through(
  weights: PyTree, formats: Mapping[str, Format], axes: Mapping[str, Axes] | None = None
) -> PyTree:
  """Returns the tree with leaves that are quantized at their use, with straight-through gradients.

  Args:
    weights: the result of `lora_jax.attach`; arrays are quantized too.
    formats: `{path: Format}` of the future quantization of the merged model.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `formats`.

  Raises:
    ValueError: if a path is not a leaf or is quantized already, or if its axes are not known.
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
