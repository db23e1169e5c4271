"""Writes plain parameters as a model folder that `transformers` loads.

save("runs/quickstart/merged", lora_jax.merge(params, adapters), config, tokenizer)
transformers.AutoModelForCausalLM.from_pretrained("runs/quickstart/merged")
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lora_jax import families
from lora_jax.io import casting, expert_tensors, names, outputs, safetensors, weight_norm
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import encoder_attention, layers

_OF_THE_FILE = ("dtype", "torch_dtype", "quantization_config")
"""Fields of the loaded config.json that describe how its values were stored."""


def save(
  folder: str | Path,
  params: Mapping[str, Any],
  config: families.Config,
  tokenizer: Tokenizer | None,
) -> None:
  """Writes model.safetensors, config.json and, for a text model, generation_config.json and the
  tokenizer's files.

  The settings of special tokens, generation and chat templates are copied from the tokenizer's
  folder, and nothing is added to them.

  folder: new or empty; it is written completely or not at all.
  params: plain arrays for the config's model, stacked or not, written in their dtype.
  config, tokenizer: from `pretrained.load`.

  Raises FileExistsError if the folder is not empty; TypeError for a leaf that is not an array; and
  ValueError for values that are not finite, for a folder that cannot be written, for params that do
  not match the config, for settings without a field in config.json, and for Linformer's attention.
  """
  encoder_attention.check_storable(config)
  folder = outputs.new_folder(folder)
  family = families.family_of(config)
  described = family.write_config(config)
  tensors = file_tensors(params, config, families.tensor_names(config))
  casting.check_finite(tensors)
  dtype = max(tensors.values(), key=lambda tensor: tensor.size).dtype.name

  with outputs.whole_folder(folder) as partial:
    safetensors.save_file(tensors, partial / safetensors.SINGLE, metadata={"format": "pt"})
    said = tokenizer.files.config if tokenizer else {}
    kept = {k: x for k, x in said.items() if k not in _OF_THE_FILE}
    fields = kept | described | {"torch_dtype": dtype}
    _write_json(partial / "config.json", fields)
    if tokenizer is None:
      return
    if tokenizer.files.generation is not None:
      _write_json(partial / "generation_config.json", tokenizer.files.generation)
    tokenizer.save(partial)


def file_tensors(
  params: Mapping[str, Any], config: families.Config, table: names.Table
) -> dict[str, np.ndarray]:
  """Returns {tensor name: array} of a file, layer by layer, by its table; experts are split.

  params, config: as in `save`.
  table: the names of the file's format.

  Raises TypeError for a leaf that is not an array, and ValueError for params that do not match the
  config.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  for path, leaf in flat.items():
    if not isinstance(leaf, jax.Array | np.ndarray):
      raise TypeError(
        f"{path}: a {type(leaf).__name__} and not an array; merge adapters into the parameters "
        "before they are saved"
      )
  expected = families.param_shapes(config)
  if flat.keys() != expected.keys():
    raise ValueError(
      "the parameters are not those of the configuration; "
      f"missing: {sorted(expected.keys() - flat.keys())[:8]}, "
      f"unexpected: {sorted(flat.keys() - expected.keys())[:8]}"
    )
  for path, leaf in flat.items():
    if leaf.shape != expected[path]:
      raise ValueError(f"{path}: shape {leaf.shape}, the configuration says {expected[path]}")
  if config.scan_layers:
    flat = traverse_util.flatten_dict(layers.unstack_layers(params), sep="/")
  arrays = {name: np.asarray(flat[path]) for path, name in names.file_names(flat, table).items()}
  arrays = {
    name: array.transpose(np.argsort(names.axes_of(name, table, array.ndim)))
    for name, array in arrays.items()
  }
  return weight_norm.apart(expert_tensors.apart(arrays, table), table)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
  outputs.write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
