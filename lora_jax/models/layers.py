"""Converts between trees with stacked layers, `blocks`, and separate ones, `block_0`, …"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters for `scan_layers=True`: `block_0`, `block_1`, ... become `blocks`."""
  rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
  blocks = [params[f"block_{i}"] for i in range(len(params) - len(rest))]
  return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters for `scan_layers=False`: the inverse of `stack_layers`."""
  rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
  num_layers = len(jax.tree.leaves(params["blocks"])[0])
  layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(num_layers)]
  return rest | {f"block_{i}": layer for i, layer in enumerate(layers)}


def layer_paths(path: str, num_layers: int) -> list[str]:
  """Returns the paths of a leaf in the unstacked tree: L paths for a stacked leaf."""
  if not path.startswith("blocks/"):
    return [path]
  return [path.replace("blocks", f"block_{i}", 1) for i in range(num_layers)]
