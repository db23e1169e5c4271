"""A model's folder that `transformers` loads, from plain parameters.

save("runs/quickstart/merged", lora_jax.merge(params, adapters), config, tokenizer)
transformers.AutoModelForCausalLM.from_pretrained("runs/quickstart/merged")
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lora_jax.io import configs, names, safetensors
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import llama


def save(
  folder: str | Path,
  params: Mapping[str, Any],
  config: llama.LlamaConfig,
  tokenizer: Tokenizer,
) -> None:
  """Writes model.safetensors, config.json, generation_config.json and the tokenizer's files.

  folder: new, or empty; it appears whole or not at all.
  params: plain arrays as `llama.Llama(config)` takes them, stacked or not, written in their dtype.
  config, tokenizer: as `pretrained.load` returned them.

  Raises FileExistsError where the folder holds something, TypeError for a leaf which is no array,
  ValueError where params and config do not fit, or config.json has no field for what config says.
  """
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"{folder}: holds something already; name a new or an empty folder")
  described = configs.to_hugging_face(config)
  tensors = file_tensors(params, config, names.LLAMA_HF)
  ids = {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "pad_token_id": tokenizer.pad_id,
  }
  dtype = tensors["model.embed_tokens.weight"].dtype.name

  partial = folder.with_name(f".{folder.name}.{os.getpid()}")
  partial.mkdir(parents=True)
  try:
    safetensors.save_file(tensors, partial / safetensors.SINGLE, metadata={"format": "pt"})
    fields = described | ids | {"torch_dtype": dtype}
    _write_json(partial / "config.json", fields)
    _write_json(partial / "generation_config.json", ids)
    tokenizer.save(partial)
    partial.replace(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def file_tensors(
  params: Mapping[str, Any], config: llama.LlamaConfig, table: names.Table
) -> dict[str, np.ndarray]:
  """Returns {tensor name: array} of a file, layer by layer, kernels as (out, in).

  params, config: as in `save`.
  table: the names of the file's format.

  Raises TypeError for a leaf which is no array, ValueError where params and config do not fit.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for path, leaf in flat.items():
    if not isinstance(leaf, jax.Array | np.ndarray):
      raise TypeError(
        f"{path}: a {type(leaf).__name__} and not an array; merge adapters into the parameters "
        "before they are saved"
      )
  expected = llama.param_shapes(config)
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
    flat = traverse_util.flatten_dict(llama.unstack_layers(params), sep="/")
  named = names.file_names(flat, table)
  return {
    named[path]: np.asarray(leaf).T if path.endswith("/kernel") else np.asarray(leaf)
    for path, leaf in flat.items()
  }


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
