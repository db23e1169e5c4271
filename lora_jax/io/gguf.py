"""GGUF files: metadata and tensors of models in llama.cpp's format.

    file = gguf.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    file.metadata["llama.block_count"]          # 30
    file.tensors["blk.0.attn_q.weight"].load()  # dequantised, float32, (out, in)

The header is walked here, with every length held against the bytes that are left before anything
is allocated: the `gguf` package's reader believes the lengths that it finds, so that a damaged file
may keep it busy without end, and it takes seconds for a vocabulary. What the numbers mean (types,
block sizes, dequantisation) is the package's.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
  """A tensor in the file; nothing is read before `load`.

  shape: slowest axis first, as numpy has it (the file holds the reverse).
  data: the bytes as they are stored, uint8 [*shape but the last, bytes of a row].
  """

  name: str
  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  data: np.ndarray

  @property
  def is_quantized(self) -> bool:
    """Whether its numbers are stored in blocks."""
    return gguf.GGML_QUANT_SIZES[self.kind][0] > 1

  def load(self) -> np.ndarray:
    """Returns the tensor dequantised to float32; ValueError where `gguf` cannot dequantise it."""
    try:
      return gguf.quants.dequantize(self.data, self.kind).reshape(self.shape).astype(np.float32)
    except NotImplementedError:
      raise ValueError(
        f"{self.name}: the `gguf` package cannot dequantise {self.kind.name}; "
        "take a file of another kind, such as Q8_0 or F16"
      ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
  """A file's metadata (key -> number, string or list) and tensors (name -> GGUFTensor)."""

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, GGUFTensor]


def read(path: str | Path) -> GGUFFile:
  """Reads the header of a GGUF file; the tensors stay on disk until they are loaded.

  Raises FileNotFoundError, and ValueError for a file which is not GGUF, is of an unknown version,
  is cut short or contradicts itself.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  if not path.stat().st_size:
    raise ValueError(f"{path}: the file is empty; download it again")
  with path.open("rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  try:
    return _read(path, data)
  except _DamagedError as error:
    raise ValueError(f"{path}: not a whole GGUF file: {error}; download it again") from None


class _DamagedError(Exception):
  """The header says something that cannot be true of this file."""


def _read(path: Path, data: mmap.mmap) -> GGUFFile:
  cursor = _Cursor(data)
  if data[:4] != b"GGUF":
    raise _DamagedError(f"it starts with {data[:4]!r} and not b'GGUF'")
  cursor.take(4)
  version = cursor.number("<I")
  if version not in _VERSIONS:
    known = " and ".join(map(str, _VERSIONS))
    raise _DamagedError(f"its version is {version}, known are {known} (little-endian)")
  tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")

  metadata: dict[str, Any] = {}
  for _ in range(entry_count):
    key = cursor.string()
    if key in metadata:
      raise _DamagedError(f"the metadata holds {key!r} twice")
    metadata[key] = cursor.value(cursor.kind(GGUFValueType))

  infos = [_tensor_info(cursor) for _ in range(tensor_count)]
  alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
    raise _DamagedError(f"general.alignment is {alignment!r} and not a power of two")
  start = -(-cursor.offset // alignment) * alignment

  tensors: dict[str, GGUFTensor] = {}
  for name, shape, kind, offset in infos:
    if name in tensors:
      raise _DamagedError(f"tensor {name!r} is there twice")
    tensors[name] = _tensor(data, name, shape, kind, start + offset)
  return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def _tensor_info(cursor: "_Cursor") -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
  name = cursor.string()
  dimensions = cursor.number("<I")
  if dimensions > _MAX_DIMENSIONS:
    raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions")
  shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
  return name, shape, cursor.kind(GGMLQuantizationType), cursor.number("<Q")


def _tensor(data: mmap.mmap, name, shape, kind, offset) -> GGUFTensor:
  if 0 in shape:
    raise _DamagedError(f"tensor {name!r} of shape {shape} is empty")
  block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  row = shape[-1] if shape else 1
  if row % block_size:
    raise _DamagedError(f"tensor {name!r}: rows of {row} are no multiple of {kind.name}'s blocks")
  size = math.prod(shape) // block_size * block_bytes
  if offset + size > len(data):
    raise _DamagedError(
      f"tensor {name!r} of shape {shape} ends at byte {offset + size}, the file at {len(data)}"
    )
  rows = np.frombuffer(data, np.uint8, size, offset).reshape(*shape[:-1], -1)
  return GGUFTensor(name=name, shape=shape, kind=kind, data=rows)


class _Cursor:
  """Reads values one after another and never past the end."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    self.offset = 0

  def take(self, size: int) -> bytes:
    left = len(self._data) - self.offset
    if size > left:
      raise _DamagedError(f"byte {self.offset} wants {size} more bytes, {left} are left")
    self.offset += size
    return self._data[self.offset - size : self.offset]

  def number(self, layout: str) -> int:
    return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

  def string(self) -> str:
    offset = self.offset
    try:
      return self.take(self.number("<Q")).decode("utf-8")
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
    # Each value takes a byte at least, so a false length runs into the end and not out of memory.
    return [self.value(item, nesting + 1) for _ in range(length)]

  def array(self, kind: GGUFValueType, length: int) -> list[Any]:
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
