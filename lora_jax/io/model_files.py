"""Opens the files of a pretrained model, a folder or one file, without reading the tensors.

A file is a GGUF file, a state dict of PyTorch's, or an ONNX file. The latter two have no
configuration, and a folder of CTranslate2's has none of the model's shape; a family that supports
such files derives it from the tensors.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.families import Config, Family, family_of, parse_config, stored_names
from lora_jax.io import (
  ctranslate2,
  expert_tensors,
  gguf,
  gguf_configs,
  json_files,
  mxfp4,
  names,
  onnx_files,
  safetensors,
  torch_files,
  weight_norm,
)
from lora_jax.io import tokenizer as tokenizers

Tensors = Mapping[str, Any]
"""`{name: tensor}`; a tensor has `name`, `shape` and `load()`, as `safetensors.StoredTensor`."""

CTRANSLATE2 = "model.bin"
_GGUF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFile:
  """The content of a source, with unread tensors in the layout of the file.

  `rotates_neighbours`: whether rotary positions rotate the pairs (x[2r], x[2r + 1]) of a query or
    key, as in llama.cpp, instead of (x[r], x[r + H / 2]), as in the model.
  blocks: the tensors of a GGUF file in their stored form.
  dtypes: of the tensors of a folder that have been read.
  """

  config: Config
  family: Family
  tokenizer: tokenizers.Tokenizer | None
  tensors: Tensors
  table: names.Table
  rotates_neighbours: bool
  blocks: Mapping[str, gguf.GGUFTensor] = dataclasses.field(default_factory=dict)
  dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def stored_dtype(self) -> str:
    """The narrowest float dtype for the stored matrices; float32 for quantized ones."""
    kinds = {block.kind.name for block in self.blocks.values() if len(block.shape) > 1}
    found = {_GGUF_DTYPES.get(kind, "float32") for kind in kinds} or set(self.dtypes.values())
    return found.pop() if len(found) == 1 and found <= set(_GGUF_DTYPES.values()) else "float32"


def read_config(folder: Path, families: Mapping[str, Family]) -> Config:
  """Returns the configuration in the config.json of a folder.

  Raises FileNotFoundError without one, and ValueError as `families.parse_config` does.
  """
  path = folder / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file; {folder} is not a model's folder")
  fields = json_files.read_json(path, what="a model's configuration")
  try:
    return parse_config(fields, families)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def read_tokenizer(folder: Path, family: Family) -> tokenizers.Tokenizer | None:
  """Returns the tokenizer of a folder; None for a family without one."""
  return tokenizers.from_folder(folder, end=family.end_token) if family.has_tokenizer else None


def is_ctranslate2(folder: Path) -> bool:
  """Whether a folder holds a model in CTranslate2's format."""
  return (folder / CTRANSLATE2).is_file() and not any(folder.glob("*.safetensors"))


def read_shape(folder: Path, families: Mapping[str, Family]) -> Config:
  """As `read_config`, completed by the names of the tensors if these are present."""
  if is_ctranslate2(folder):
    return open_folder(folder, families).config
  config = read_config(folder, families)
  family = family_of(config, families)
  if family.as_stored and any(folder.glob("*.safetensors")):
    return family.as_stored(config, safetensors.open_folder(folder))
  return config


def open_folder(folder: Path, families: Mapping[str, Family]) -> ModelFile:
  """Opens a folder with `config.json`, `*.safetensors` and a tokenizer, or with CTranslate2's
  `model.bin`; raises as `load` does."""
  if is_ctranslate2(folder):
    path = folder / CTRANSLATE2
    found = _open_bare(path, "ctranslate2", ctranslate2.open_file(path), families)
    return dataclasses.replace(found, tokenizer=read_tokenizer(folder, found.family))
  config = read_shape(folder, families)
  family = family_of(config, families)
  table = stored_names(config, families)
  tensors = names.with_prefix(safetensors.open_folder(folder), table, family.prefix)
  if getattr(config, "tie_embeddings", False) and not config.classes:
    tensors = _without_tied_head(folder, tensors, table)
  tensors = mxfp4.joined(tensors, folder, table)
  try:
    tensors = weight_norm.joined(tensors, table)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from None
  return ModelFile(
    config=config,
    family=family,
    tokenizer=read_tokenizer(folder, family),
    tensors=expert_tensors.joined(tensors, folder, table),
    table=table,
    rotates_neighbours=False,
  )


def _without_tied_head(folder: Path, tensors: Tensors, table: names.Table) -> Tensors:
  """Removes the second copy of a tied embedding, which some writers store as the head."""
  paths = ("head/kernel", "embed/embedding")
  found = [name for path in paths for name in names.names_of(path, table) if name in tensors]
  if len(found) < 2:
    return tensors
  head, embedding = found
  pair = tensors[head], tensors[embedding]
  if pair[0].shape != pair[1].shape or not np.array_equal(pair[0].load(), pair[1].load()):
    raise ValueError(
      f"{folder}: config.json ties the embeddings, yet {head} differs from {embedding}; set "
      "tie_word_embeddings to false if the head is meant"
    )
  return {name: tensor for name, tensor in tensors.items() if name != head}


def open_file(path: Path, families: Mapping[str, Family]) -> ModelFile:
  """Opens a file of any of the formats; raises as `load` does."""
  if path.suffix.lower() == ".onnx":
    return _open_bare(path, "onnx", onnx_files.open_file(path), families)
  if torch_files.is_one(path):
    return _open_bare(path, "torch", torch_files.open_file(path), families)
  return open_gguf(path, families)


def _open_bare(path: Path, kind: str, found: Any, families: Mapping[str, Family]) -> ModelFile:
  """Opens a file without a configuration, by the family that recognizes its tensors."""
  readers = {name: x.of_tensors[kind] for name, x in families.items() if kind in x.of_tensors}
  for name, read in readers.items():
    try:
      if (known := read(found)) is None:
        continue
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None
    config, tensors = known
    return ModelFile(
      config=config,
      family=families[name],
      tokenizer=None,
      tensors=tensors,
      table=families[name].names[kind],
      rotates_neighbours=False,
    )
  raise ValueError(
    f"{path}: holds no configuration, and its tensors are those of no family that is known by them "
    f"({', '.join(readers) or 'none is'}); convert it with transformers' `save_pretrained`"
  )


def open_gguf(path: Path, families: Mapping[str, Family]) -> ModelFile:
  """Opens a GGUF file; raises as `load` does."""
  file = gguf.read(path)
  factors = {x: file.tensors[x] for x in gguf_configs.ROPE_FACTORS if x in file.tensors}
  try:
    config = gguf_configs.from_gguf(
      file.metadata,
      tie_embeddings="output.weight" not in file.tensors,
      rope_factors={name: tensor.load() for name, tensor in factors.items()},
    )
    family = family_of(config, families)
    tokenizer = tokenizers.from_gguf(file.metadata)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  tensors = expert_tensors.joined(file.tensors, path, family.names["gguf"])
  return ModelFile(
    config=config,
    family=family,
    tokenizer=tokenizer,
    tensors=tensors,
    table=family.names["gguf"],
    rotates_neighbours=gguf_configs.rotates_neighbours(file.metadata["general.architecture"]),
    blocks=tensors,
  )
