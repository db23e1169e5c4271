"""Reads CTranslate2's `model.bin`, version 6: names, shapes and places of its variables.

    file = open_file("whisper/model.bin")
    file.spec                                       # "WhisperSpec"
    file.variables["encoder/conv1/weight"].load()   # float16
    file.scalars["encoder/num_heads"]               # 6

The format, all little-endian, as CTranslate2 4 writes it (python/ctranslate2/specs/model_spec.py):

    u32 version; text spec; u32 revision
    u32 count, then of each variable: text name; u8 rank; u32 of each axis; u8 type; u32 bytes; data
    u32 count, then of each alias: text alias; text name

A text is a u16, the number of its bytes, and then the bytes; the last byte is 0. Every offset and
size is compared with the file before anything of that size is read.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import files
from lora_jax.io.safetensors import StoredTensor

VERSION = 6
_TYPES = {0: "F32", 1: "I8", 2: "I16", 3: "I32", 4: "F16", 5: "BF16"}
_BYTES = {"F32": 4, "I8": 1, "I16": 2, "I32": 4, "F16": 2, "BF16": 2}
_MAX_COUNT = 1 << 17
_MAX_AXES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
  """The content of a file.

  Attributes:
    path: of the file.
    spec: what kind of model it is.
    variables: the arrays by their names, unread.
    scalars: the integers by their names.
    aliases: {alias: name of a variable}.
  """

  path: Path
  spec: str
  variables: Mapping[str, StoredTensor]
  scalars: Mapping[str, int]
  aliases: Mapping[str, str]


def open_file(path: str | Path) -> File:
  """Reads the header and the places of all variables.

  Raises:
    FileNotFoundError, PermissionError: as `files.open_regular` does.
    ValueError: for another version, a variable that does not lie in the file, or whose bytes are
      not those of its shape, a name that is there twice, and bytes after the end.
  """
  path = Path(path)
  with files.open_regular(path) as file:
    reader = _Reader(path, file, os.fstat(file.fileno()).st_size)
    try:
      return _read(reader)
    except ValueError as error:
      raise ValueError(
        f"{path}: not a whole model.bin of CTranslate2, version {VERSION} ({error}); download or "
        "convert it again"
      ) from None


def _read(reader: "_Reader") -> File:
  version = reader.integer("I")
  if version != VERSION:
    raise ValueError(f"its version is {version}")
  spec = reader.text()
  reader.integer("I")  # the revision of the spec: the names and shapes are checked instead
  variables, scalars = {}, {}
  for _ in range(reader.count()):
    name = reader.text()
    if name in variables or name in scalars:
      raise ValueError(f"{shown(name)} is there twice")
    rank = reader.integer("B")
    if rank > _MAX_AXES:
      raise ValueError(f"{shown(name)} has {rank} axes")
    shape = tuple(reader.integer("I") for _ in range(rank))
    kind = reader.integer("B")
    if kind not in _TYPES:
      raise ValueError(f"{shown(name)} is of the unknown type {kind}")
    dtype, size = _TYPES[kind], reader.integer("I")
    if size != math.prod(shape) * _BYTES[dtype]:
      raise ValueError(f"{shown(name)}: {dtype} {shape} is not of {size:,} bytes")
    offset = reader.skip(size)
    if rank:
      variables[name] = StoredTensor(
        path=reader.path, name=name, shape=shape, dtype=dtype, offset=offset
      )
    elif dtype.startswith("I"):
      scalars[name] = int.from_bytes(reader.again(offset, size), "little", signed=True)
  aliases = {}
  for _ in range(reader.count()):
    alias, name = reader.text(), reader.text()
    if name not in variables or alias in variables or alias in aliases:
      raise ValueError(f"the alias {shown(alias)} of {shown(name)} is there twice, or of nothing")
    aliases[alias] = name
  if reader.at != reader.size:
    raise ValueError(f"it ends at byte {reader.at:,}, and the file at {reader.size:,}")
  return File(path=reader.path, spec=spec, variables=variables, scalars=scalars, aliases=aliases)


class _Reader:
  """Reads onwards through a file, and never beyond its end."""

  def __init__(self, path: Path, file: BinaryIO, size: int):
    self.path, self.size, self.at = path, size, 0
    self._file = file

  def skip(self, count: int) -> int:
    """Passes over so many bytes; returns where they begin."""
    start = self.at
    if count > self.size - start:
      raise ValueError(f"it ends at byte {self.size:,}, and more is to follow at byte {start:,}")
    self.at += count
    self._file.seek(self.at)
    return start

  def again(self, offset: int, count: int) -> bytes:
    """The bytes at a place before, which `skip` has passed over."""
    return files.read_array(self.path, offset, (count,), np.uint8).tobytes()

  def _take(self, count: int) -> bytes:
    if count > self.size - self.at:
      raise ValueError(f"it ends at byte {self.size:,}, and more is to follow at byte {self.at:,}")
    found = self._file.read(count)
    if len(found) != count:
      raise ValueError("it was cut while it was read")
    self.at += count
    return found

  def integer(self, kind: str) -> int:
    return struct.unpack(f"<{kind}", self._take(struct.calcsize(kind)))[0]

  def count(self) -> int:
    count = self.integer("I")
    if count > _MAX_COUNT:
      raise ValueError(f"it has {count:,} entries, over the limit of {_MAX_COUNT:,}")
    return count

  def text(self) -> str:
    content = self._take(self.integer("H"))
    try:
      text = content.decode()
    except UnicodeDecodeError:
      raise ValueError(f"a name is no text, {content[:40]!r}") from None
    if not text.endswith("\0") or "\0" in text[:-1]:
      raise ValueError(f"a name does not end where it is to, {text[:40]!r}")
    return text[:-1]
