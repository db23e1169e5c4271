"""Reads and writes safetensors files, whole or in shards, with errors that name the file.

    tensors = load_file("adapter_model.safetensors")     # {name: numpy array}
    save_file(tensors, "copy.safetensors")
    lazy = open_folder("SmolLM2-135M")                    # {name: StoredTensor}, read by load()

bfloat16 and float8 tensors come as `ml_dtypes` has them. The format holds no code, unlike pickled
weights, which are never read.

The header is checked here and the tensors are read, not mapped: the library's reader maps the file,
so that one which is cut short meanwhile ends the process, and its numpy half knows no float8.
"""

import collections
import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file as _save_file

from lora_jax.checks import shown
from lora_jax.io import files, json_files, outputs

_log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
_MAX_HEADER = 1 << 25
_MAX_AXES = 32  # of numpy's arrays, before version 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
  """A tensor in a file; nothing is read before `load`.

  Attributes:
    path: of the file.
    name: of the tensor.
    shape: as numpy has it.
    dtype: as the file writes it, "BF16".
    offset: of its first byte in the file.
  """

  path: Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  offset: int

  def load(self) -> np.ndarray:
    """Returns the tensor; raises ValueError where the file has become shorter."""
    return files.read_array(self.path, self.offset, self.shape, _DTYPES[self.dtype])


def open_file(path: str | Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a file, unread.

  Raises FileNotFoundError and PermissionError, and ValueError for a file that is cut short, not
  safetensors, or of a dtype that is not read.
  """
  path = Path(path)
  with files.open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    content = file.read(length) if length <= min(_MAX_HEADER, size - 8) else b""
  try:
    if size < 8 or len(content) < length:
      raise ValueError(f"its header is to be {length} bytes long, and the file is {size}")
    fields = json_files.parse(content)
    fields.pop("__metadata__", None)
    tensors = [_tensor(path, 8 + length, *item) for item in fields.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda x: (x.offset, math.prod(x.shape))):
      if tensor.offset != end:
        raise ValueError(f"{shown(tensor.name)} begins at byte {tensor.offset}, not {end}")
      end += math.prod(tensor.shape) * np.dtype(_DTYPES[tensor.dtype]).itemsize
    if end != size:
      raise ValueError(f"its tensors end at byte {end}, and the file at {size}")
  except ValueError as error:
    raise ValueError(
      f"{path}: not a whole safetensors file ({error}); download or write it again"
    ) from None
  return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, start: int, name: str, fields: Any) -> StoredTensor:
  """The tensor that an entry of the header describes; its place is checked by the caller."""
  if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{shown(name)} is described by {shown(fields)}")
  dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise ValueError(
      f"{shown(name)}: dtype {shown(dtype)} is not read; read are {', '.join(_DTYPES)}"
    )
  if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
    raise ValueError(f"{shown(name)}: shape {shown(shape)}, offsets {shown(offsets)}")
  if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
    raise ValueError(f"{shown(name)}: {dtype} {shown(shape)} is not of its bytes")
  return StoredTensor(
    path=path, name=name, shape=tuple(shape), dtype=dtype, offset=start + offsets[0]
  )


def _are_sizes(value: Any) -> bool:
  return (
    isinstance(value, list) and len(value) <= _MAX_AXES and all(type(n) is int for n in value)
  ) and all(0 <= n < 1 << 62 for n in value)


def load_file(path: str | Path) -> dict[str, np.ndarray]:
  """Returns every tensor of a file; raises as `open_file` does."""
  return {name: tensor.load() for name, tensor in open_file(path).items()}


def save_file(
  tensors: Mapping[str, np.ndarray], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes tensors to a file which appears whole or not at all.

  metadata: strings for the header; `{"format": "pt"}` is what transformers looks for.

  Raises OSError where it cannot be written, as on a full disk.
  """
  path = outputs.replaceable_file(path)
  # The writer takes an array's memory as it lies, so a transposed view has to be laid out first.
  contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  try:
    with outputs.whole_file(path) as partial:
      _save_file(contiguous, partial, metadata=dict(metadata or {}))
  except SafetensorError as error:
    raise OSError(f"{path}: cannot be written ({error})") from None


def tensor_names(path: str | Path) -> list[str]:
  """Returns the names of the tensors in a file; raises as `open_file` does."""
  return list(open_file(path))


def tensor_kinds(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
  """Returns the shape and the dtype ("F32") of each tensor in a file, of which nothing else is
  read; raises as `open_file` does."""
  return {name: (tensor.shape, tensor.dtype) for name, tensor in open_file(path).items()}


def open_folder(folder: str | Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a model's folder, unread.

  The folder holds `model.safetensors`, or shards and `model.safetensors.index.json`. Where it holds
  both, `model.safetensors` is read, as transformers does: an index may be left from a model that
  was there before. A warning says so, unless the index leads to that very file.

  Raises FileNotFoundError without them or without one of the shards, and ValueError for a damaged
  file or an index which disagrees with its shards.
  """
  folder = Path(folder)
  index = folder / INDEX
  if (folder / SINGLE).exists():
    tensors = open_file(folder / SINGLE)
    if index.exists() and not _leads_to(index, dict.fromkeys(tensors, SINGLE)):
      _log.warning(
        "%s: holds %s and also %s, which leads to other tensors; the former is read, as in "
        "transformers. Delete the one that is not meant",
        *(folder, SINGLE, INDEX),
      )
    return tensors
  if index.exists():
    return _sharded(index)
  raise FileNotFoundError(
    f"{folder}: holds neither {SINGLE} nor {INDEX}; pickled weights (*.bin, *.pth) are not read: "
    "convert them with transformers' `save_pretrained`"
  )


def files_of(folder: str | Path) -> list[str]:
  """Returns the names of the files that `open_folder` reads; none where there are no tensors.

  Raises ValueError for an invalid index.
  """
  folder = Path(folder)
  if (folder / SINGLE).exists():
    return [SINGLE]
  if not (folder / INDEX).exists():
    return []
  return [INDEX, *sorted(set(_read_index(folder / INDEX).values()))]


def _leads_to(index: Path, places: Mapping[str, str]) -> bool:
  """Whether an index leads to these tensors in these files."""
  try:
    return _read_index(index) == places
  except (ValueError, OSError):
    return False


def _read_index(index: Path) -> dict[str, str]:
  places = json_files.read_json(index, what="an index of tensors").get("weight_map")
  if not isinstance(places, dict):
    raise ValueError(
      f"{index}: is not an index of tensors: it has no `weight_map` with their files"
    )
  for shard in places.values():
    if not isinstance(shard, str) or not shard or Path(shard).name != shard or "\\" in shard:
      raise ValueError(f"{index}: {shown(shard)} is not the name of a file in the same folder")
  return places


def _sharded(index: Path) -> dict[str, StoredTensor]:
  listed_in = collections.defaultdict(set)
  for name, shard in _read_index(index).items():
    listed_in[shard].add(name)
  tensors = {}
  for shard, listed in sorted(listed_in.items()):
    present = open_file(index.parent / shard)
    if listed != present.keys():
      raise ValueError(
        f"{index}: disagrees with {shard[:120]}; only in the index: "
        f"{shown(sorted(listed - present.keys()))}, only in the shard: "
        f"{shown(sorted(present.keys() - listed))}"
      )
    tensors |= present
  return tensors
