"""Reads GGUF files: metadata and tensors of models in llama.cpp's format.

    file = gguf.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    file.metadata["llama.block_count"]          # 30
    file.tensors["blk.0.attn_q.weight"].load()  # dequantized, float32, (out, in)

The header is parsed here, with every length checked against the remaining bytes before anything is
allocated. The reader of the `gguf` package trusts the lengths, so a damaged file may keep it busy
forever, and it takes seconds for a vocabulary. It also maps the file, and a truncation then ends
the process. Types, block sizes and dequantization are the package's.

As in llama.cpp, the tensors are stored in the order of the header, each aligned, and nothing
follows them. So no two tensors share bytes.
"""

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from lora_jax.checks import shown
from lora_jax.io import files

_SCALARS = {
  GGUFValueType.UINT8: "<u1",
  GGUFValueType.INT8: "<i1",
  GGUFValueType.UINT16: "<u2",
  GGUFValueType.INT16: "<i2",
  GGUFValueType.UINT32: "<u4",
  GGUFValueType.INT32: "<i4",
  GGUFValueType.FLOAT32: "<f4",
  GGUFValueType.BOOL: "?",
  GGUFValueType.UINT64: "<u8",
  GGUFValueType.INT64: "<i8",
  GGUFValueType.FLOAT64: "<f8",
}
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4
_MAX_HEADER = 1 << 26  # a vocabulary of 262,144 tokens takes 10 MB; in memory a header is up to 8x
_MAX_NAME = 63  # bytes of a tensor's name, as in ggml
_ALIGNMENTS = [1 << n for n in range(17)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
  """A tensor in a file; nothing is read before `load` or `data`.

  path: of the file.
  shape: slowest axis first, as numpy has it (the file holds the reverse).
  offset: of its first byte in the file.
  """

  path: Path
  name: str
  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  offset: int

  @property
  def data(self) -> np.ndarray:
    """The stored bytes, uint8 [*shape but the last, bytes of a row], read at each access.

    Raises ValueError if the file has become shorter.
    """
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
    *rows, row = self.shape or (1,)
    shape = (*rows, row // block_size * block_bytes)
    return files.read_array(self.path, self.offset, shape, np.uint8)

  @property
  def is_quantized(self) -> bool:
    """Whether its values are stored in blocks."""
    return gguf.GGML_QUANT_SIZES[self.kind][0] > 1

  def load(self) -> np.ndarray:
    """Returns the tensor dequantized to float32.

    Raises ValueError if `gguf` cannot dequantize it, if it has values that are not finite, and if
    the file has become shorter.
    """
    try:
      with np.errstate(over="ignore", invalid="ignore"):  # in a damaged block; checked later
        values = gguf.quants.dequantize(self.data, self.kind)
    except NotImplementedError:
      raise ValueError(
        f"{self.path}: {self.name}: the `gguf` package cannot dequantize {self.kind.name}; "
        "take a file of another kind, such as Q8_0 or F16"
      ) from None
    if not np.isfinite(values).all():
      raise ValueError(
        f"{self.path}: {self.name}: holds values that are not finite; the file is damaged"
      )
    return values.reshape(self.shape).astype(np.float32, copy=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
  """A file's metadata (key -> number, string or list) and tensors (name -> GGUFTensor)."""

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, GGUFTensor]


def read(path: str | Path) -> GGUFFile:
  """Reads the header of a GGUF file; the tensors stay on disk until they are loaded.

  Raises FileNotFoundError and PermissionError, and ValueError for a file that is not GGUF, has an
  unknown version, is truncated or is inconsistent.
  """
  path = Path(path)
  with files.open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    if not size:
      raise ValueError(f"{path}: the file is empty; download it again")
    try:
      return _read(path, _Cursor(file, size), size)
    except _DamagedError as error:
      raise ValueError(f"{path}: not a whole GGUF file: {error}; download it again") from None


class _DamagedError(Exception):
  """The header is not consistent with the file."""


def _read(path: Path, cursor: "_Cursor", size: int) -> GGUFFile:
  magic = cursor.take(min(4, size))
  if magic != b"GGUF":
    raise _DamagedError(f"it starts with {magic!r} and not b'GGUF'")
  version = cursor.number("<I")
  if version not in _VERSIONS:
    known = " and ".join(map(str, _VERSIONS))
    raise _DamagedError(f"its version is {version}, known are {known} (little-endian)")
  tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")

  metadata: dict[str, Any] = {}
  for _ in range(entry_count):
    key = cursor.string()
    if key in metadata:
      raise _DamagedError(f"the metadata holds {shown(key)} twice")
    metadata[key] = cursor.value(cursor.kind(GGUFValueType))

  infos = [_tensor_info(cursor) for _ in range(tensor_count)]
  alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
  if alignment not in _ALIGNMENTS or type(alignment) is not int:
    raise _DamagedError(
      f"general.alignment is {shown(alignment)} and not a power of two up to {_ALIGNMENTS[-1]}"
    )

  def aligned(offset: int) -> int:
    return -(-offset // alignment) * alignment

  start = end = aligned(cursor.offset)
  tensors: dict[str, GGUFTensor] = {}
  for name, shape, kind, offset in infos:
    if name in tensors:
      raise _DamagedError(f"tensor {name!r} is there twice")
    length = _bytes_of(name, shape, kind)
    if start + offset + length > size:
      raise _DamagedError(
        f"tensor {name!r} of shape {shape} ends at byte {start + offset + length}, the file at "
        f"{size}"
      )
    if start + offset != aligned(end):
      raise _DamagedError(
        f"tensor {name!r} begins at byte {start + offset}, where the tensors before it and the "
        f"alignment of {alignment} say {aligned(end)}"
      )
    tensors[name] = GGUFTensor(path=path, name=name, shape=shape, kind=kind, offset=start + offset)
    end = start + offset + length
  if size > aligned(end):
    raise _DamagedError(f"its last tensor ends at byte {end}, the file at {size}")
  return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def _tensor_info(cursor: "_Cursor") -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
  name = cursor.string(_MAX_NAME)
  dimensions = cursor.number("<I")
  if dimensions > _MAX_DIMENSIONS:
    raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions")
  shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
  return name, shape, cursor.kind(GGMLQuantizationType), cursor.number("<Q")


def _bytes_of(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
  if 0 in shape:
    raise _DamagedError(f"tensor {name!r} of shape {shape} is empty")
  block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  row = shape[-1] if shape else 1
  if row % block_size:
    raise _DamagedError(f"tensor {name!r}: rows of {row} are no multiple of {kind.name}'s blocks")
  return math.prod(shape) // block_size * block_bytes


class _Cursor:
  """Reads values one after another, never past the end."""

  def __init__(self, file: BinaryIO, size: int):
    self._file, self._size = file, size
    self.offset = 0

  def take(self, size: int) -> bytes:
    left = self._size - self.offset
    if size > left:
      raise _DamagedError(f"byte {self.offset} wants {size} more bytes, {left} are left")
    if self.offset + size > _MAX_HEADER:
      raise _DamagedError(f"its header is over the limit of {_MAX_HEADER:,} bytes")
    taken = self._file.read(size)
    if len(taken) < size:
      raise _DamagedError("it was cut while it was read")
    self.offset += size
    return taken

  def number(self, layout: str) -> int:
    return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

  def string(self, most: int = _MAX_HEADER) -> str:
    offset, size = self.offset, self.number("<Q")
    if size > most and size <= self._size - self.offset:
      raise _DamagedError(f"the name at byte {offset} has {size} bytes, {most} are allowed")
    try:
      return self.take(size).decode("utf-8")
    except UnicodeDecodeError:
      raise _DamagedError(f"the string at byte {offset} is not UTF-8") from None

  def kind(self, enum):
    number = self.number("<I")
    try:
      return enum(number)
    except ValueError:
      raise _DamagedError(f"{number} at byte {self.offset - 4} is no {enum.__name__}") from None

  def value(self, kind: GGUFValueType, nesting: int = 0) -> Any:
    if kind in _SCALARS:
      return self.array(kind, 1)[0]
    if kind == GGUFValueType.STRING:
      return self.string()
    if nesting == _MAX_NESTING:
      raise _DamagedError(f"an array at byte {self.offset} is nested more than {nesting} deep")
    item, length = self.kind(GGUFValueType), self.number("<Q")
    if item in _SCALARS:
      return self.array(item, length)
    # Each value takes at least a byte, so a false length reaches the end before memory runs out.
    return [self.value(item, nesting + 1) for _ in range(length)]

  def array(self, kind: GGUFValueType, length: int) -> list[Any]:
    dtype = np.dtype(_SCALARS[kind])
    taken = self.take(length * dtype.itemsize)
    if kind == GGUFValueType.BOOL and max(taken, default=0) > 1:
      raise _DamagedError(f"a bool before byte {self.offset} is neither 0 nor 1")
    return np.frombuffer(taken, dtype).tolist()
