"""PyTorch's files (`.pth`, `.pt`, `.bin`): the tensors of a state dict, and nothing else.

    tensors = open_file("mobilenet_v2.pth")     # {name: StoredTensor}, read by load()

Such a file holds a program for a stack machine, which may call any function. Here it calls none: a
reader of its own knows the few instructions and names by which a dict of tensors is said, and
refuses every other one. Places and sizes are held against the file before a tensor is read.

Since version 1.6 PyTorch writes zip files, of which each storage is a member, stored as it is. Its
older files are five programs, one after another, and then the storages. Both are read.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import files
from lora_jax.io.safetensors import StoredTensor

_ZIP = b"PK\x03\x04"
_MAX_DIRECTORY = 1 << 26
_MAX_MEMBERS = 1 << 17
_MAX_PROGRAM = 1 << 25
_MAX_AXES = 32
_LOCAL_HEADER = 30
# The number that an older file begins with, as its first program says it.
_OLD = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
_OLD_VERSION = 1001

_SIZES = {
  "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
}  # fmt: skip
_STORAGES = {
  "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
  "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
  "ByteStorage": "U8",
}  # fmt: skip


class _Global(NamedTuple):
  """A name that a program may use."""

  module: str
  name: str


_DICT = _Global("collections", "OrderedDict")
_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
ADMITTED = frozenset({
  _DICT, _TENSOR, _PARAMETER, *(_Global("torch", name) for name in _STORAGES),
})  # fmt: skip
"""All names that a file may use."""


class _Storage(NamedTuple):
  dtype: str
  member: str
  count: int


class _Tensor(NamedTuple):
  storage: _Storage
  first: int
  shape: tuple[int, ...]


class _Mark:
  """Where the arguments of an instruction begin on the stack."""


_MARK = _Mark()


def is_one(path: Path) -> bool:
  """Whether a file begins as one of PyTorch's does."""
  with files.open_regular(path) as file:
    return file.read(len(_OLD)).startswith((_ZIP, _OLD))


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


def _old(path: Path) -> tuple[dict[str, "_Tensor"], dict[str, tuple[int, int]]]:
  """The tensors, and `{storage: its first byte, its bytes}`."""
  with files.open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    reader = _Reader(file.read(_MAX_PROGRAM))
  _run(reader)  # the number that it was recognised by
  if (version := _run(reader)) != _OLD_VERSION:
    raise ValueError(f"is of version {shown(version)}; read is {_OLD_VERSION}")
  system = _run(reader)
  if not isinstance(system, dict) or system.get("little_endian") is not True:
    raise ValueError("its numbers are not little-endian; write it again on another machine")
  tensors = _state_dict(_run(reader))
  members = _run(reader)
  if not isinstance(members, list) or not all(isinstance(x, str) for x in members):
    raise ValueError("has no list of its storages; the file is damaged")
  storages = {tensor.storage.member: tensor.storage for tensor in tensors.values()}
  places, at = {}, reader.at
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


def _zipped(path: Path) -> tuple[dict[str, "_Tensor"], dict[str, tuple[int, int]]]:
  """The tensors, and `{storage: its first byte, its bytes}`."""
  members, size = _members(path)
  prefix = _prefix(members)
  tensors = _state_dict(_run(_Reader(_program(path, members, size))))
  places = {}
  for member in {tensor.storage.member for tensor in tensors.values()}:
    info = members.get(f"{prefix}data/{member}")
    if info is None:
      raise ValueError(f"its storage {shown(member)} is not in the file")
    places[member] = _place(path, info, size)
  return tensors, places


class _Capped(io.BufferedReader):
  """A file of which no single read is larger than a zip's directory may be."""

  def read(self, size: int | None = -1) -> bytes:
    if size is not None and size > _MAX_DIRECTORY:
      raise ValueError(f"its directory of {size:,} bytes is over the limit of {_MAX_DIRECTORY:,}")
    return super().read(size)


def _members(path: Path) -> tuple[dict[str, zipfile.ZipInfo], int]:
  """The members by their names, and the bytes of the file."""
  with files.open_regular(path) as file:
    if file.read(4) != _ZIP:
      raise ValueError("is no zip file; write it again by torch.save of PyTorch 1.6 or newer")
    size = os.fstat(file.fileno()).st_size
    with _Capped(io.FileIO(os.dup(file.fileno()))) as capped, zipfile.ZipFile(capped) as packed:
      infos = packed.infolist()
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
      raise ValueError("its numbers are not little-endian; write it again on another machine")
  first, length = _place(path, members[f"{prefix}data.pkl"], size)
  if length > _MAX_PROGRAM:
    raise ValueError(f"its data.pkl of {length:,} bytes is over the limit of {_MAX_PROGRAM:,}")
  return files.read_array(path, first, (length,), np.uint8).tobytes()


# ---- the program


def _run(reader: "_Reader") -> Any:
  """What the program that comes next leaves on its stack."""
  stack: list[Any] = []
  memo: dict[int, Any] = {}
  for code in iter(reader.code, ord(".")):
    match chr(code):
      case "\x80":  # the protocol
        if (protocol := reader.number("<B")) not in (2, 3, 4, 5):
          raise ValueError(f"its program is of protocol {protocol}; read are 2 to 5")
      case "\x95":  # a frame, whose bytes are read like others
        reader.take(8)
      case "}":
        stack.append({})
      case ")":
        stack.append(())
      case "]":
        stack.append([])
      case "(":
        stack.append(_MARK)
      case "N":
        stack.append(None)
      case "\x88" | "\x89":
        stack.append(code == 0x88)
      case "K":
        stack.append(reader.number("<B"))
      case "M":
        stack.append(reader.number("<H"))
      case "J":
        stack.append(reader.number("<i"))
      case "\x8a":
        stack.append(int.from_bytes(reader.take(reader.number("<B")), "little", signed=True))
      case "G":
        stack.append(reader.number(">d"))
      case "X":
        stack.append(reader.text(reader.number("<I")))
      case "\x8c":
        stack.append(reader.text(reader.number("<B")))
      case "q":
        memo[reader.number("<B")] = _top(stack)
      case "r":
        memo[reader.number("<I")] = _top(stack)
      case "\x94":
        memo[len(memo)] = _top(stack)
      case "h":
        stack.append(_remembered(memo, reader.number("<B")))
      case "j":
        stack.append(_remembered(memo, reader.number("<I")))
      case "c":
        stack.append(_named(reader.line(), reader.line()))
      case "\x93":
        name, module = _pop(stack, str), _pop(stack, str)
        stack.append(_named(module, name))
      case "\x85" | "\x86" | "\x87":
        stack.append(tuple(_last(stack, code - 0x84)))
      case "t":
        stack.append(tuple(_since_mark(stack)))
      case "Q":
        stack.append(_storage(_pop(stack, tuple)))
      case "R":
        arguments, function = _pop(stack, tuple), _pop(stack, _Global)
        stack.append(_called(function, arguments))
      case "s":
        value, key = _pop(stack, object), _pop(stack, str)
        _top(stack, dict)[key] = value
      case "u":
        items = _since_mark(stack)
        _set(_top(stack, dict), items)
      case "a":
        value = _pop(stack, object)
        _top(stack, list).append(value)
      case "e":
        items = _since_mark(stack)
        _top(stack, list).extend(items)
      case "b":  # attributes of a dict, as its `_metadata`: nothing is made of them
        _pop(stack, dict)
        _top(stack, dict)
      case _:
        raise ValueError(
          f"its program has the instruction {code:#04x} at byte {reader.at - 1}, by which no dict of "
          "tensors is said; save `model.state_dict()` alone"
        )
  return _pop(stack, object)


class _Reader:
  """The bytes of a program, read onwards."""

  def __init__(self, content: bytes):
    self._content, self.at = content, 0

  def take(self, count: int) -> bytes:
    found = self._content[self.at : self.at + count]
    if len(found) < count:
      raise ValueError("its program ends within an instruction; the file is damaged")
    self.at += count
    return found

  def code(self) -> int:
    return self.take(1)[0]

  def number(self, format: str) -> Any:
    return struct.unpack(format, self.take(struct.calcsize(format)))[0]

  def text(self, length: int) -> str:
    return self.take(length).decode("utf-8")

  def line(self) -> str:
    end = self._content.find(b"\n", self.at)
    if end < 0:
      raise ValueError("its program ends within a name; the file is damaged")
    found = self._content[self.at : end].decode("utf-8")
    self.at = end + 1
    return found


def _top(stack: list[Any], kind: type = object) -> Any:
  if not stack or stack[-1] is _MARK or not isinstance(stack[-1], kind):
    raise ValueError("its program does not make sense where it stands; the file is damaged")
  return stack[-1]


def _pop(stack: list[Any], kind: type) -> Any:
  found = _top(stack, kind)
  stack.pop()
  return found


def _last(stack: list[Any], count: int) -> Iterator[Any]:
  return reversed([_pop(stack, object) for _ in range(count)])


def _since_mark(stack: list[Any]) -> list[Any]:
  found = []
  while stack and stack[-1] is not _MARK:
    found.append(stack.pop())
  if not stack:
    raise ValueError("its program ends a list that it has not begun; the file is damaged")
  stack.pop()
  return found[::-1]


def _remembered(memo: dict[int, Any], number: int) -> Any:
  if number not in memo:
    raise ValueError(f"its program asks for what it has not kept, number {number}")
  return memo[number]


def _set(target: dict[str, Any], items: list[Any]) -> None:
  if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
    raise ValueError("its program has a dict whose keys are not texts; save a state dict")
  for key, value in zip(items[::2], items[1::2], strict=True):
    if key in target:
      raise ValueError(f"its program has {shown(key)} twice in a dict")
    target[key] = value


def _named(module: str, name: str) -> _Global:
  found = _Global(module, name)
  if found not in ADMITTED:
    raise ValueError(
      f"asks for {shown(f'{module}.{name}')}, which no tensor needs, and which is not called; save "
      "`model.state_dict()` alone"
    )
  return found


def _called(function: _Global, arguments: tuple[Any, ...]) -> Any:
  """What an admitted function gives, said by our own types."""
  if function == _DICT and not arguments:
    return {}
  if function == _TENSOR and len(arguments) >= 4:
    return _tensor(*arguments[:4])
  if function == _PARAMETER and arguments and isinstance(arguments[0], _Tensor):
    return arguments[0]
  raise ValueError(f"calls {function.name} with {len(arguments)} arguments that it does not take")


def _storage(reference: tuple[Any, ...]) -> _Storage:
  match reference:
    # An older file says of what another storage is a view: of none, where it is written whole.
    case ("storage", _Global(module="torch", name=name), str(member), str(), int(count)) | (
      "storage",
      _Global(module="torch", name=name),
      str(member),
      str(),
      int(count),
      None,
    ) if name in _STORAGES and type(count) is int and 0 <= count < 1 << 60:
      return _Storage(_STORAGES[name], member, count)
  raise ValueError("refers to what is no storage of numbers; the file is damaged")


def _tensor(storage: Any, first: Any, shape: Any, strides: Any) -> _Tensor:
  whole = isinstance(storage, _Storage) and type(first) is int and first >= 0
  for sizes in (shape, strides):
    whole = whole and isinstance(sizes, tuple) and len(sizes) <= _MAX_AXES
    whole = whole and all(type(n) is int and 0 <= n < 1 << 62 for n in sizes)
  if not whole or len(shape) != len(strides):
    raise ValueError("has a tensor without a storage, a shape or strides; the file is damaged")
  if first + math.prod(shape) > storage.count:
    raise ValueError(f"has a tensor {shape} that its storage of {storage.count} cannot hold")
  expected = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
  if any(size > 1 and x != y for size, x, y in zip(shape, strides, expected, strict=True)):
    raise ValueError(
      f"has a tensor {shape} whose strides are {strides}; save `tensor.contiguous()` of it"
    )
  return _Tensor(storage, first, shape)


# ---- the tensors


def _state_dict(found: Any) -> dict[str, _Tensor]:
  for key in ("state_dict", "model"):
    if isinstance(found, dict) and isinstance(found.get(key), dict):
      found = found[key]
  if not isinstance(found, dict) or not found:
    raise ValueError("holds no dict of tensors; save `model.state_dict()`")
  for name, value in found.items():
    if not isinstance(value, _Tensor):
      raise ValueError(f"{shown(name)} is no tensor; save `model.state_dict()` alone")
  return found


def _placed(
  path: Path, name: str, tensor: _Tensor, places: Mapping[str, tuple[int, int]]
) -> StoredTensor:
  dtype, member, count = tensor.storage
  if member not in places:
    raise ValueError(f"{shown(name)}: its storage {shown(member)} is not in the file")
  first, length = places[member]
  if length != count * _SIZES[dtype]:
    raise ValueError(f"{shown(name)}: {count} values of {dtype} are not of {length} bytes")
  offset = first + tensor.first * _SIZES[dtype]
  return StoredTensor(path=path, name=name, shape=tensor.shape, dtype=dtype, offset=offset)
