"""From `{path: adapter}` to the factors of a GGUF file, for models of the Llama family.

For a Llama, llama.cpp rotates neighboring features where this library rotates features that are
half a head apart. So the rows of the query and key weights have another order there, and so have
those of their B. For other architectures both rotate the same features.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.exchange.modules import Module
from lora_jax.families import Config
from lora_jax.io import gguf_configs
from lora_jax.weights import Adapted, LowRank, NotFactored


class Factors(NamedTuple):
  """The contents to write: `{name: (a, b)}` of the base's tensors, and the file's alpha."""

  factors: dict[str, tuple[np.ndarray, np.ndarray]]
  alpha: float


def factors(
  adapters: Mapping[str, Adapted], modules: Mapping[str, Module], config: Config
) -> Factors:
  """The adapters in llama.cpp's form; errors as in `lora_jax.exchange.save_gguf`."""
  if not adapters:
    raise ValueError("there is no adapter to save")
  low_rank = {path: _low_rank(path, adapter) for path, adapter in adapters.items()}
  alphas = [x.scale * x.rank for x in low_rank.values() if x.scale]
  # A file has one alpha; deviations from it are multiplied into b.
  alpha = float(np.float32(max(alphas, key=alphas.count))) if alphas else 1.0
  architecture = gguf_configs.architecture(config)
  heads = {}
  if gguf_configs.rotates_neighbours(architecture):
    heads = {"query": config.num_heads, "key": config.num_kv_heads}
  found = {}
  for path, adapter in low_rank.items():
    module = modules.get(path)
    if module is None or module.stacks_oddly or adapter.roles != module.roles.lstrip("s"):
      raise ValueError(f"{path}: a GGUF file of {architecture!r} has no such matrix")
    if module.is_head_too:
      raise ValueError(
        f"{path}: is the head too, and llama.cpp adapts the two by factors of different shapes; "
        "merge the adapter into the model"
      )
    parts = {"a": np.asarray(adapter.a, np.float32), "b": np.asarray(adapter.b, np.float32)}
    for layer, name in module.by_layer().items():
      a, b = (part if layer is None else part[layer] for part in parts.values())
      a, b = module.to_tensor(a, "ir", "ri"), module.to_tensor(b, "ro", "or")
      projection = path.split("/")[-2]
      if projection in heads:
        b = halves_to_neighbours(b, heads[projection])
      factor = adapter.scale * adapter.rank / alpha
      found[name] = a, b if factor == 1 else b * np.float32(factor)
  return Factors(found, alpha)


def _low_rank(path: str, adapter: Adapted) -> LowRank:
  try:
    return adapter.as_low_rank()
  except NotFactored as error:
    raise ValueError(
      f"{path}: llama.cpp supports only products of two factors: {error}; export the merged model"
    ) from None


def halves_to_neighbours(rows: np.ndarray, num_heads: int) -> np.ndarray:
  """Reorders the rows of each head, so that rows that are half a head apart become neighbors."""
  pairs = rows.reshape(num_heads, 2, -1, rows.shape[1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)
