"""Safetensors files, whole or in shards, with errors that say which file is at fault.

    tensors = load_file("adapter_model.safetensors")     # {name: numpy array}
    save_file(tensors, "copy.safetensors")
    lazy = open_folder("SmolLM2-135M")                    # {name: function that reads the tensor}

bfloat16 tensors come as `ml_dtypes.bfloat16`. The format holds no code, unlike pickled weights,
which are never read.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as _save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_file(path: str | Path) -> dict[str, np.ndarray]:
  """Returns every tensor of a file.

  Raises FileNotFoundError, and ValueError for a file that is cut short or not safetensors.
  """
  path = Path(path)
  return {name: read_tensor(path, name) for name in tensor_names(path)}


def save_file(
  tensors: Mapping[str, np.ndarray], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes tensors to a file which appears whole or not at all.

  metadata: strings for the header; `{"format": "pt"}` is what transformers looks for.

  Raises OSError where it cannot be written, as on a full disk.
  """
  path = Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  # The writer takes an array's memory as it lies, so a transposed view has to be laid out first.
  contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  try:
    _save_file(contiguous, partial, metadata=dict(metadata or {}))
    partial.replace(path)
  except SafetensorError as error:
    raise OSError(f"{path}: cannot be written ({error})") from None
  finally:
    partial.unlink(missing_ok=True)


def tensor_names(path: str | Path) -> list[str]:
  """Returns the names of the tensors in a file; raises as `load_file` does."""
  with _open(Path(path)) as file:
    return list(file.keys())


def read_tensor(path: str | Path, name: str) -> np.ndarray:
  """Returns one tensor of a file; raises as `load_file` does."""
  with _open(Path(path)) as file:
    return file.get_tensor(name)


def tensor_kinds(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
  """Returns the shape and the dtype ("F32") of each tensor in a file, of which nothing else is
  read; raises as `load_file` does."""
  with _open(Path(path)) as file:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
    return {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}


def open_folder(folder: str | Path) -> dict[str, Callable[[], np.ndarray]]:
  """Returns, for each tensor of a model's folder, a function that reads it.

  The folder holds `model.safetensors`, or shards and `model.safetensors.index.json`.

  Raises FileNotFoundError without them or without one of the shards, and ValueError for a damaged
  file or an index which disagrees with its shards.
  """
  folder = Path(folder)
  index = folder / INDEX
  if index.is_file():
    places = _places(index)
  elif (folder / SINGLE).is_file():
    places = dict.fromkeys(tensor_names(folder / SINGLE), SINGLE)
  else:
    raise FileNotFoundError(
      f"{folder}: holds neither {SINGLE} nor {INDEX}; pickled weights (*.bin, *.pth) are not read: "
      "convert them with transformers' `save_pretrained`"
    )
  return {
    name: functools.partial(read_tensor, folder / shard, name) for name, shard in places.items()
  }


def _places(index: Path) -> dict[str, str]:
  try:
    places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
  except (ValueError, KeyError, TypeError):
    raise ValueError(f"{index}: not an index: it must be JSON with a `weight_map`") from None
  for shard in sorted(set(places.values()), key=str):
    if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
      raise ValueError(f"{index}: {shard!r} is not the name of a file in the same folder")
    listed = {name for name, place in places.items() if place == shard}
    present = set(tensor_names(index.parent / shard))
    if listed != present:
      raise ValueError(
        f"{index}: disagrees with {shard}; only in the index: {sorted(listed - present)[:8]}, "
        f"only in the shard: {sorted(present - listed)[:8]}"
      )
  return places


def _open(path: Path):
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  try:
    return safe_open(path, framework="numpy")
  except SafetensorError as error:
    raise ValueError(
      f"{path}: not a whole safetensors file ({error}); download or write it again"
    ) from None
