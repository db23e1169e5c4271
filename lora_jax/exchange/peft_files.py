"""Reads and writes adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    file = read("runs/quickstart/adapter")
    file.config["lora_alpha"], file.shapes["model.layers.0.self_attn.q_proj.lora_A.weight"]
    file.load("model.layers.0.self_attn.q_proj.lora_A.weight")
    write("copy", config, tensors)

Folders are untrusted: the config's types and values, and the names, shapes and dtypes of the
tensors, are checked before a tensor is read. `lora_jax.exchange` interprets the tensors.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.exchange import peft_config
from lora_jax.io import casting, files, json_files, outputs, safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHARED = ("base_model.vera_A", "base_model.vera_B")
"""The names of tensors that belong to no module of the model."""
_PREFIX = "base_model.model."
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
  """An adapter's folder with unread tensors.

  Attributes:
    path: of the tensors' file, for messages.
    config: the fields that `peft_config` reads, with PEFT's defaults for absent ones.
    tensors: by their stored names; a module's name is that in the model without adapters.
  """

  path: Path
  config: dict[str, Any]
  tensors: dict[str, safetensors.StoredTensor]

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """`{name: shape}` of the tensors."""
    return {name: tensor.shape for name, tensor in self.tensors.items()}

  def load(self, name: str) -> np.ndarray:
    """Returns a tensor as float32; raises ValueError for values that are not finite."""
    tensor = self.tensors[name].load()
    with np.errstate(over="ignore"):  # a float64 may be too large, and is not finite then
      tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
      raise ValueError(f"{self.path}: {name}: holds values that are not finite; it is damaged")
    return tensor


def read(folder: str | Path) -> AdapterFile:
  """Reads an adapter's config and the header of its tensors.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: for a damaged file, an unsupported config, or a tensor of unknown name or dtype.
  """
  folder = Path(folder)
  path = folder / CONFIG
  if not path.exists() or path.is_dir():
    raise FileNotFoundError(f"{path}: no such file; an adapter's folder holds {CONFIG}")
  content = files.read_bytes(path, json_files.MAX_BYTES)
  try:
    config = peft_config.parse(content)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  path = folder / TENSORS
  if not path.exists():
    raise FileNotFoundError(
      f"{path}: no such file; pickled weights (adapter_model.bin) are not read: load the adapter "
      "in peft and write it again with `save_pretrained`"
    )
  tensors = safetensors.open_file(path)
  strange = [
    f"{name[:120]} ({tensor.dtype})"
    for name, tensor in tensors.items()
    if tensor.dtype not in _DTYPES or not (name.startswith(_PREFIX) or name in SHARED)
  ]
  if strange:
    raise ValueError(
      f"{path}: {len(strange)} tensors are not named {_PREFIX}… or of no dtype of "
      f"{', '.join(_DTYPES)}: {', '.join(strange[:8])}"
    )
  named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
  if len(named) < len(tensors):
    raise ValueError(f"{path}: {' or '.join(SHARED)} is there with {_PREFIX} and without")
  return AdapterFile(path, config, named)


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
  """Writes an adapter that `peft` loads, completely or not at all.

  Args:
    folder: replaced if it is an adapter's folder already.
    config: the fields of adapter_config.json.
    tensors: `{name: array}`, by names as in `AdapterFile.shapes`.

  Raises:
    FileExistsError: when the folder holds something else.
    ValueError: when values are not finite, or nothing can be written at the path.
  """
  casting.check_finite(tensors)
  folder = check_folder(folder)
  with outputs.whole_folder(folder) as partial:
    outputs.write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")
    named = {_key(name): tensor for name, tensor in tensors.items()}
    safetensors.save_file(named, partial / TENSORS, metadata={"format": "pt"})


def check_folder(folder: str | Path) -> Path:
  """The absolute path of a folder that `write` may write or replace; raises as it does."""
  return outputs.replaceable_folder(folder, CONFIG, {CONFIG, TENSORS, "README.md"}, "adapter's")


def _key(name: str) -> str:
  return name if name in SHARED else _PREFIX + name
