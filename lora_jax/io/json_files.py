"""Reads JSON objects from untrusted files.

    fields = read_json("config.json", what="a model's configuration")
    fields = parse(content)                       # the same for bytes

Python's parser keeps the last of two equal keys, accepts NaN and 1e400, and recurses until the
interpreter's stack overflows. All of that is refused here, so the result can be compared, shown and
written as JSON again.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.io import files

MAX_BYTES = 1 << 24
MAX_DEPTH = 64
# transformers writes 1000000000000000019884624838656 for an unlimited length.
_MAX_DIGITS = 40
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, what: str = "", *, most: int = MAX_BYTES) -> dict[str, Any]:
  """Returns the object of a JSON file.

  Args:
    path: of the file.
    what: describes the file in errors, as "a model's configuration".
    most: the most bytes that it may have.

  Raises:
    FileNotFoundError: if there is no such file.
    PermissionError: if it may not be read.
    ValueError: if it is not a regular file or too large, and as `parse` does; with the path.
  """
  content = files.read_bytes(path, most)
  try:
    return parse(content)
  except ValueError as error:
    raise ValueError(f"{path}: is not {what}: {error}" if what else f"{path}: {error}") from None


def parse(content: bytes) -> dict[str, Any]:
  """Returns the object of JSON text.

  Raises:
    ValueError: for text that is not JSON in UTF-8, or whose root is not an object; for a repeated
      key, NaN, infinity, a number that overflows a float, an integer of more than 40 digits, half
      of a surrogate pair, and nesting deeper than `MAX_DEPTH`. The message is short.
  """
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"not JSON: byte {error.start} is not UTF-8") from None
  try:
    fields = json.loads(
      text,
      object_pairs_hook=_unique,
      parse_constant=_refuse_constant,
      parse_float=_float,
      parse_int=_integer,
    )
  except RecursionError:
    raise ValueError(f"not JSON: nested more than {MAX_DEPTH} deep") from None
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON: {error}") from None
  if not isinstance(fields, dict):
    raise ValueError(f"not a JSON object, but a {type(fields).__name__}")
  _check_depth(fields)
  if _SURROGATE.search(text):
    _check_text(fields)
  return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise ValueError(f"{twice[:80]!r} is there twice")
  return found


def _refuse_constant(text: str) -> NoReturn:
  raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f"{text[:40]} is beyond what a float holds")
  return value


def _integer(text: str) -> int:
  if len(text) > _MAX_DIGITS:
    raise ValueError(f"not JSON: {text[:8]}... is an integer of {len(text)} digits")
  return int(text)


def _check_depth(fields: dict[str, Any]) -> None:
  level: list[Any] = [fields]
  for _ in range(MAX_DEPTH):
    level = [x for each in level for x in _inside(each) if isinstance(x, dict | list)]
  if level:
    raise ValueError(f"not JSON: nested more than {MAX_DEPTH} deep")


def _check_text(value: Any) -> None:
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError:
      raise ValueError(f"{value[:40]!r} holds half of a surrogate pair") from None
  elif isinstance(value, dict | list):
    for each in (*value, *value.values()) if isinstance(value, dict) else value:
      _check_text(each)


def _inside(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
  return iter(value.values() if isinstance(value, dict) else value)
