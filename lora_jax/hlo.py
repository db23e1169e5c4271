"""The arrays of a compiled program and its communication between devices, read from its text.

    text = jitted.lower(*args).compile().as_text()
    for op in collectives(text):
      print(op.kind, op.shapes, op.bytes, op.where)
    for value in largest(text, 5):
      print(value.bytes, value.array, value.where)

If the text shows the length of a loop, its collectives count once per step.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
  "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_LOOP = re.compile(r" while\(.*condition=%?([^\s,]+), body=%?([^\s,]+)")
_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"%?(\S+) = s32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r" compare\([^,]+, (?:s32\[\]\S* )?%?([^\s),]+)\), direction=LT")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_OP = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<shape>[\d,]*)\](?P<layout>\{[^}]*\})?")
_VALUE = re.compile(
  r"^\s+(?:ROOT )?%?\S+ = (?P<array>\w+\[[\d,]+\])(?P<layout>\S*) (?P<op>[\w-]+)\("
)
_FUSED = re.compile(r" fusion\(.*calls=%?([^\s,]+)")
_NAME = re.compile(r'op_name="([^"]*)"')
# Views of existing arrays, and the program's arguments.
_NO_MEMORY = ("parameter", "bitcast", "get-tuple-element", "constant", "while", "tuple")
# The memory space of a TPU core, which is not part of the device's memory.
_IN_CORE = "S(1)"


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    kind: such as "all-gather".
    shapes: the shapes of its results on each device.
    bytes: the bytes of these results, over all times that it runs.
    where: its op_name.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  bytes: int
  where: str


class Value(NamedTuple):
  """An array that a program makes in a device's memory.

  Attributes:
    bytes: the bytes of the array, without padding.
    array: its dtype and shape, as "bf16[8,512,49152]".
    where: its op_name.
    count: the number of equal arrays.
  """

  bytes: int
  array: str
  where: str
  count: int = 1


def collectives(program: str) -> list[Collective]:
  """Returns the collective operations of the text of a compiled program, in its order."""
  found, times = [], _times(program)
  for computation, line in _lines(program):
    if op := _OP.search(line):
      arrays = [
        (a["dtype"], tuple(int(n) for n in a["shape"].split(",") if n))
        for a in _ARRAY.finditer(op["result"])
        if a["dtype"] in _BYTES
      ]
      if op["start"] and len(arrays) > 1 and op["result"].startswith("("):
        arrays = _results_of_a_start(op["kind"], arrays)
      size = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
      shapes = tuple(shape for _, shape in arrays)
      found.append(Collective(op["kind"], shapes, int(size * times(computation)), _where(line)))
  return found


def _results_of_a_start(kind: str, arrays: list) -> list:
  """The results among the values of the first half of an asynchronous operation, which repeats its
  operands before them and appends counters of the device."""
  arrays = [each for each in arrays if not (each[0] in ("u32", "s32") and each[1] == ())]
  return arrays if kind == "all-reduce" else arrays[len(arrays) // 2 :]


def moved(ops: list[Collective]) -> dict[str, int]:
  """Returns the bytes of each kind of operation."""
  total = collections.Counter()
  for op in ops:
    total[op.kind] += op.bytes
  return dict(total)


def largest(program: str, count: int) -> list[Value]:
  """Returns the largest arrays that a program makes, without arguments; equal ones are grouped."""
  fused = set(_FUSED.findall(program))
  found = collections.Counter()
  for computation, line in _lines(program):
    value = _VALUE.match(line)
    if computation in fused or not value or value["op"] in _NO_MEMORY:
      continue
    if _IN_CORE in value["layout"] or value["op"].endswith("-done"):
      continue
    found[value["array"], _where(line)] += 1
  values = [Value(_size(array), array, where, n) for (array, where), n in found.items()]
  return sorted(values, key=lambda value: -value.bytes)[:count]


def _size(array: str) -> int:
  found = _ARRAY.match(array)
  assert found is not None  # _VALUE matched it
  numbers = (int(n) for n in found["shape"].split(",") if n)
  return int(_BYTES.get(found["dtype"], 4) * math.prod(numbers))


def _where(line: str) -> str:
  name = _NAME.search(line)
  return name[1] if name else ""


def _lines(program: str) -> Iterator[tuple[str, str]]:
  """(computation, line) of each operation."""
  computation = ""
  for line in program.splitlines():
    if start := _COMPUTATION.match(line):
      computation = start[1]
    else:
      yield computation, line


def _times(program: str):
  """Returns a function from a computation to the number of times that it runs."""
  inside, constants, limits = {}, {}, {}
  for computation, line in _lines(program):
    if loop := _LOOP.search(line):
      known = _COUNT.search(line)
      inside[loop[2]] = (computation, loop[1], int(known[1]) if known else None)
    elif constant := _CONSTANT.search(line):
      constants[computation, constant[1]] = int(constant[2])
    elif less := _LESS.search(line):
      limits[computation] = (computation, less[1])

  def times(computation: str) -> int:
    outer, condition, count = inside.get(computation, ("", "", 1))
    if count is None:  # the text of a TPU program has the length only in the condition
      count = constants.get(limits.get(condition), 1)
    return count * times(outer) if outer else count

  return times
