"""Runs the pickle programs in PyTorch's files safely: a stack machine that calls no functions.

    program = Program(content)
    run(program)                 # {"features.0.0.weight": Tensor(Storage("F32", "0", 864), ...)}

A file may ask Python's own machine to call any function. This one knows the few instructions and
names (`ADMITTED`) by which a dict of tensors is said, makes records of its own of them, and refuses
every other one. Its result is not larger than the program.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_jax.checks import shown

_MAX_AXES = 32
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
ADMITTED = frozenset(
  {
    _DICT,
    _TENSOR,
    _PARAMETER,
    *(_Global("torch", name) for name in _STORAGES),
  }
)
"""All names that a file may use."""


class Storage(NamedTuple):
  """Where values lie: their dtype as safetensors write it, the name of the storage, how many."""

  dtype: str
  member: str
  count: int


class Tensor(NamedTuple):
  """A tensor: its storage, the number of its first value there, and its shape."""

  storage: Storage
  first: int
  shape: tuple[int, ...]


class _Mark:
  """Where the arguments of an instruction begin on the stack."""


_MARK = _Mark()


class Program:
  """The bytes of programs, read onwards; `at` is the first that has not been read."""

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


def run(program: Program) -> Any:
  """Returns what the program that comes next leaves on its stack: dicts, lists, tuples, texts,
  numbers, `Tensor`s.

  Raises ValueError for an instruction or a name that is not admitted, and for what makes no sense.
  """
  stack: list[Any] = []
  memo: dict[int, Any] = {}
  for code in iter(program.code, ord(".")):
    match chr(code):
      case "\x80":  # the protocol
        if (protocol := program.number("<B")) not in (2, 3, 4, 5):
          raise ValueError(f"its program is of protocol {protocol}; read are 2 to 5")
      case "\x95":  # a frame, whose bytes are read like others
        program.take(8)
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
        stack.append(program.number("<B"))
      case "M":
        stack.append(program.number("<H"))
      case "J":
        stack.append(program.number("<i"))
      case "\x8a":
        stack.append(int.from_bytes(program.take(program.number("<B")), "little", signed=True))
      case "G":
        stack.append(program.number(">d"))
      case "X":
        stack.append(program.text(program.number("<I")))
      case "\x8c":
        stack.append(program.text(program.number("<B")))
      case "q":
        memo[program.number("<B")] = _top(stack)
      case "r":
        memo[program.number("<I")] = _top(stack)
      case "\x94":
        memo[len(memo)] = _top(stack)
      case "h":
        stack.append(_remembered(memo, program.number("<B")))
      case "j":
        stack.append(_remembered(memo, program.number("<I")))
      case "c":
        stack.append(_named(program.line(), program.line()))
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
        value, key = _pop(stack, object), _pop(stack, object)
        _set(_top(stack, dict), [key, value])
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
          f"its program has the instruction {code:#04x} at byte {program.at - 1}, by which no dict "
          "of tensors is said; save `model.state_dict()` alone"
        )
  return _pop(stack, object)


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
  """The result of an admitted function, in our own types."""
  if function == _DICT and not arguments:
    return {}
  if function == _TENSOR and len(arguments) >= 4:
    return _tensor(*arguments[:4])
  if function == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
    return arguments[0]
  raise ValueError(f"calls {function.name} with {len(arguments)} arguments that it does not take")


def _storage(reference: tuple[Any, ...]) -> Storage:
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
      return Storage(_STORAGES[name], member, count)
  raise ValueError("refers to what is no storage of numbers; the file is damaged")


def _tensor(storage: Any, first: Any, shape: Any, strides: Any) -> Tensor:
  whole = isinstance(storage, Storage) and type(first) is int and first >= 0
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
  return Tensor(storage, first, shape)
