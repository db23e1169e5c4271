"""Tables as text and Markdown; leaves whose paths differ only in a number share a line."""

import re
from collections.abc import Iterable, Sequence


def grouped(rows: Iterable[tuple[str, tuple]]) -> dict[tuple, int]:
  """`{(path with * for numbers, *the rest): count}`, in the order of first appearance."""
  counts: dict[tuple, int] = {}
  for path, rest in rows:
    key = (re.sub(r"\d+", "*", path), *rest)
    counts[key] = counts.get(key, 0) + 1
  return counts


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """The table in Markdown, with the first column aligned left and the others right."""
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rendered(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """The table with its columns aligned."""
  table = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
