"""PyTorch's files (`.pth`, `.pt`, `.bin`): the tensors of a state dict, and nothing else.

    tensors = open_file("mobilenet_v2.pth")     # {name: StoredTensor}, read by load()

Such a file holds programs for a stack machine; `lora_jax.io.torch_programs` reads them, and calls
nothing. Places and sizes are compared with the file before a tensor is read.

Since version 1.6 PyTorch writes zip files, of which each storage is a member, stored as it is. Its
older files are five programs, one after another, and then the storages. Both are read.
"""

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import archives, files
from lora_jax.io.safetensors import StoredTensor
from lora_jax.io.torch_programs import Program, Tensor, run

_ZIP = b"PK\x03\x04"
_MAX_MEMBERS = 1 << 17
_MAX_PROGRAM = 1 << 25
_LOCAL_HEADER = 30
# The number that an older file begins with, as its first program says it.
_OLD = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
_OLD_VERSION = 1001

_SIZES = {
  "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
}  # fmt: skip


def is_one(path: Path) -> bool:
  """Whether a file begins as one of PyTorch's does."""
  with files.open_regular(path) as file:
    return file.read(len(_OLD)).startswith((_ZIP, _OLD))


def is_zip_of_tensors(path: Path) -> bool:
  """Whether a zip file is one of PyTorch's; raises ValueError for a damaged one."""
  names = archives.list_zip(path)
  return any(name == "data.pkl" or name.endswith("/data.pkl") for name in names)


def open_file(path: str | Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a state dict, unread, by their names; those of dicts within by paths.

  A state dict that lies in a dict under `state_dict` or `model` is taken from there.

  Raises:
    FileNotFoundError, PermissionError: as `files.open_regular` does.
    ValueError: for a file that is no whole one of PyTorch's, a name or an instruction that is not
      admitted, what is no dict of tensors, and tensors that do not lie in the file.
  """
  path = Path(path)
  with files.open_regular(path) as file:
    start = file.read(len(_OLD))
  try:
    tensors, places = (_old if start == _OLD else _zipped)(path)
    return {name: _placed(path, name, x, places) for name, x in tensors.items()}
  except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError) as error:
    raise ValueError(f"{path}: not a whole zip file ({str(error)[:200]})") from None
  except ValueError as error:
    raise ValueError(f"{path}: {str(error)[:1000]}") from None


# ---- the older format


def _old(path: Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
  """The tensors, and `{storage: its first byte, its bytes}`."""
  with files.open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    programs = Program(file.read(_MAX_PROGRAM))
  run(programs)  # the number that it was recognized by
  if (version := run(programs)) != _OLD_VERSION:
    raise ValueError(f"is of version {shown(version)}; read is {_OLD_VERSION}")
  system = run(programs)
  if not isinstance(system, dict) or system.get("little_endian") is not True:
    raise ValueError("its values are not little-endian; write it again on another machine")
  tensors = _state_dict(run(programs))
  members = run(programs)
  if not isinstance(members, list) or not all(isinstance(x, str) for x in members):
    raise ValueError("has no list of its storages; the file is damaged")
  storages = {tensor.storage.member: tensor.storage for tensor in tensors.values()}
  places, at = {}, programs.at
  for member in members:
    if member not in storages or member in places:
      raise ValueError(f"has a storage {shown(member)} that no tensor is in, or twice")
    dtype, _, count = storages[member]
    first, length = at + 8, count * _SIZES[dtype]
    if first + length > size:
      raise ValueError(f"its storage {shown(member)} is to end at {first + length} of {size} bytes")
    said = files.read_array(path, at, (1,), np.int64)[0]
    if said != count:
      raise ValueError(f"its storage {shown(member)} has {said} values, and a tensor says {count}")
    places[member] = first, length
    at = first + length
  if at != size:
    raise ValueError(f"its storages end at byte {at}, and the file at {size}")
  return tensors, places


# ---- the zip file


def _zipped(path: Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
  """The tensors, and `{storage: its first byte, its bytes}`."""
  members, size = _members(path)
  prefix = _prefix(members)
  tensors = _state_dict(run(Program(_program(path, members, size))))
  places = {}
  for member in {tensor.storage.member for tensor in tensors.values()}:
    info = members.get(f"{prefix}data/{member}")
    if info is None:
      raise ValueError(f"its storage {shown(member)} is not in the file")
    places[member] = _place(path, info, size)
  return tensors, places


def _members(path: Path) -> tuple[dict[str, zipfile.ZipInfo], int]:
  """The members by their names, and the bytes of the file."""
  with files.open_regular(path) as file:
    if file.read(4) != _ZIP:
      raise ValueError("is no zip file; write it again by torch.save of PyTorch 1.6 or newer")
    size = os.fstat(file.fileno()).st_size
    try:
      with (
        archives.Capped(io.FileIO(os.dup(file.fileno()))) as capped,
        zipfile.ZipFile(capped) as packed,
      ):
        infos = packed.infolist()
    except OSError as error:  # of a place before the file's beginning
      raise ValueError(f"its directory leads nowhere ({error.strerror})") from None
  if len(infos) > _MAX_MEMBERS:
    raise ValueError(f"has {len(infos):,} members, over the limit of {_MAX_MEMBERS:,}")
  members = {info.filename: info for info in infos}
  if len(members) < len(infos):
    raise ValueError("has two members of one name")
  return members, size


def _prefix(members: dict[str, zipfile.ZipInfo]) -> str:
  """The folder in the zip file that all is in, with a slash."""
  found = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
  if len(found) != 1:
    raise ValueError(f"holds {len(found)} members data.pkl, and a file of PyTorch's has one")
  return found[0].removesuffix("data.pkl")


def _place(path: Path, info: zipfile.ZipInfo, size: int) -> tuple[int, int]:
  """The first byte of a member, and its bytes."""
  name = shown(info.filename)
  if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
    raise ValueError(f"{name} is compressed, which PyTorch's files are not")
  if not 0 <= info.header_offset <= size - _LOCAL_HEADER:
    raise ValueError(f"{name} is to begin at byte {info.header_offset} of {size}")
  header = files.read_array(path, info.header_offset, (_LOCAL_HEADER,), np.uint8).tobytes()
  if header[:4] != _ZIP:
    raise ValueError(f"{name} has no header at byte {info.header_offset}")
  lengths = struct.unpack("<HH", header[26:30])
  first = info.header_offset + _LOCAL_HEADER + sum(lengths)
  if first + info.file_size > size:
    raise ValueError(f"{name} is to end at byte {first + info.file_size}, and the file at {size}")
  return first, info.file_size


def _program(path: Path, members: dict[str, zipfile.ZipInfo], size: int) -> bytes:
  prefix = _prefix(members)
  if (order := members.get(f"{prefix}byteorder")) is not None:
    first, length = _place(path, order, size)
    if length > 16 or files.read_array(path, first, (length,), np.uint8).tobytes() != b"little":
      raise ValueError("its values are not little-endian; write it again on another machine")
  first, length = _place(path, members[f"{prefix}data.pkl"], size)
  if length > _MAX_PROGRAM:
    raise ValueError(f"its data.pkl of {length:,} bytes is over the limit of {_MAX_PROGRAM:,}")
  return files.read_array(path, first, (length,), np.uint8).tobytes()


# ---- the tensors


def _state_dict(found: Any) -> dict[str, Tensor]:
  for key in ("state_dict", "model"):
    if isinstance(found, dict) and isinstance(found.get(key), dict):
      found = found[key]
  if not isinstance(found, dict) or not found:
    raise ValueError("holds no dict of tensors; save `model.state_dict()`")
  for name, value in found.items():
    if not isinstance(value, Tensor):
      raise ValueError(f"{shown(name)} is no tensor; save `model.state_dict()` alone")
  return found


def _placed(
  path: Path, name: str, tensor: Tensor, places: Mapping[str, tuple[int, int]]
) -> StoredTensor:
  dtype, member, count = tensor.storage
  if member not in places:
    raise ValueError(f"{shown(name)}: its storage {shown(member)} is not in the file")
  first, length = places[member]
  if length != count * _SIZES[dtype]:
    raise ValueError(f"{shown(name)}: {count} values of {dtype} are not of {length} bytes")
  offset = first + tensor.first * _SIZES[dtype]
  return StoredTensor(path=path, name=name, shape=tensor.shape, dtype=dtype, offset=offset)
