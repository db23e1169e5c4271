"""What a compiled program sends between devices, read from its text.

for op in collectives(jitted.lower(*args).compile().as_text()):
  print(op.kind, op.shapes, op.bytes, op.where)
"""

import collections
import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_LOOP = re.compile(r' while\(.*body=%?([^\s,]+),.*"known_trip_count":\{"n":"(\d+)"\}')
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_OP = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")


class Collective(NamedTuple):
  """One operation.

  Attributes:
    kind: such as "all-gather".
    shapes: of the arrays that it makes on each device.
    bytes: of these arrays, over all the times that it runs.
    where: its op_name.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  bytes: int
  where: str


def collectives(program: str) -> list[Collective]:
  """The collective operations of the text of a compiled program for CPU, in its order."""
  computation, found, inside = "", [], {}
  for line in program.splitlines():
    if start := _COMPUTATION.match(line):
      computation = start[1]
    elif loop := _LOOP.search(line):
      inside[loop[1]] = (computation, int(loop[2]))
    elif op := _OP.search(line):
      arrays = [
        (a["dtype"], tuple(int(n) for n in a["shape"].split(",") if n))
        for a in _ARRAY.finditer(op["result"])
      ]
      size = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
      name = re.search(r'op_name="([^"]*)"', line)
      shapes = tuple(shape for _, shape in arrays)
      found.append((computation, Collective(op["kind"], shapes, size, name[1] if name else "")))

  def times(computation: str) -> int:
    outer, count = inside.get(computation, ("", 1))
    return count * times(outer) if outer else count

  return [op._replace(bytes=op.bytes * times(where)) for where, op in found]


def moved(ops: list[Collective]) -> dict[str, int]:
  """The bytes of each kind of operation."""
  total = collections.Counter()
  for op in ops:
    total[op.kind] += op.bytes
  return dict(total)
