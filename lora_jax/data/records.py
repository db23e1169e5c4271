"""Reads JSONL, JSON, CSV, TSV and Parquet files into a list of dict records.

  records = read("reviews.jsonl")
  records = read("reviews.json")                            # one array, [{...}, {...}]
  records = read("ratings.txt", format="tsv", columns=("id", "rating", "text"))   # no header line
  records[0]["text"]

Data sets for fine-tuning fit in memory, so all records are read and checked at once: a damaged line
is refused with its number, before any model is loaded. Files are streamed, except for a JSON array,
whose text is read as a whole.
"""

import collections
import contextlib
import csv
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lora_jax.data import parquet_files, text_files

Record = dict[str, Any]

_DELIMITERS = {"csv": ",", "tsv": "\t"}
FORMATS = ("jsonl", "json", *_DELIMITERS, "parquet")
"""The formats that `read` knows; also the ends of the names of such files."""

UTF_8 = "utf-8-sig"
"""The encoding that is taken where none is given: UTF-8, with a byte-order mark or without."""

# Python decodes a pair to one character, so a remaining surrogate is half of a pair.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\n\r]*")
_MAX_RECORDS = 1 << 24  # even empty records would take gigabytes
_MAX_DEPTH = 64
_SHOWN, _CUT = 8, 60  # names in a message, and characters of each


def read(
  path: str | pathlib.Path,
  format: str | None = None,
  columns: Sequence[str] | None = None,
  quoted: bool | None = None,
  encoding: str = UTF_8,
) -> list[Record]:
  """Returns the file's records in order, one dict each, without blank lines.

  Args:
    path: a local file; gzip is recognized by its content, a byte-order mark is skipped.
    format: one of `FORMATS`; None selects it by the file's name, ignoring ".gz".
    columns: the names of the fields of a CSV or TSV file without a header line.
    quoted: whether a double quote opens a field that may contain delimiters and line breaks
      (`csv.QUOTE_MINIMAL`), or is an ordinary character (`csv.QUOTE_NONE`). None: True for CSV and
      False for TSV, as in published TSV sets.
    encoding: the text's encoding; Parquet has its own.

  The fields of CSV and TSV are strings; those of JSONL and JSON are JSON values; for Parquet see
  `parquet_files.rows`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for an unknown format, an option that does not apply to the format, a folder, a pipe
      or a device, a file that changes while it is read, text in another encoding, gzip that is
      damaged or expands more than fifty times, a malformed line, a row with too many or too few
      fields, no records, more than 16,777,216 records; and as `parquet_files.rows` does.
  """
  path = pathlib.Path(path)
  format = format or _format_of(path)
  if format not in FORMATS:
    raise ValueError(f"{path}: unknown format {format!r}; use one of {', '.join(FORMATS)}")
  if format not in _DELIMITERS and (columns is not None or quoted is not None):
    raise ValueError(
      f"{path}: columns and quoted are for CSV and TSV; a record of {format} names its own fields"
    )
  if format == "parquet":
    if encoding != UTF_8:
      raise ValueError(f"{path}: Parquet holds UTF-8; leave encoding at {UTF_8!r}")
    records = []
    for record in parquet_files.rows(path):
      _append(path, records, record)
  elif format in _DELIMITERS:
    quoted = (format == "csv") if quoted is None else quoted
    with text_files.lines(path, encoding, newline="") as (lines, size):
      records = _parse_table(path, lines, size, _DELIMITERS[format], columns, quoted)
  else:
    # Lines end only at "\n": JSON strings may contain U+2028 and other line separators.
    with text_files.lines(path, encoding, newline="\n") as (lines, _):
      records = (_parse_jsonl if format == "jsonl" else _parse_array)(path, lines)
  if not records:
    raise ValueError(f"{path}: the data set is empty, no records in {path.stat().st_size:,} bytes")
  return records


def require(records: Sequence[Record], columns: Iterable[str], wanted_by: str) -> None:
  """Checks that there are records and that each has these columns.

  Args:
    records: from `read`.
    columns: the required names.
    wanted_by: the start of the error: what needs the columns.

  Raises:
    ValueError: for no records, or a column that a record lacks; the message lists those it has.
  """
  if not records:
    raise ValueError(f"{wanted_by}: the data set is empty")
  columns = tuple(columns)
  for number, record in enumerate(records):
    for column in columns:
      if column not in record:
        raise ValueError(
          f"{wanted_by}: record {number} has no column {column!r}; "
          f"it has {_listed(record) or 'none'}{text_files.nearest(column, record)}"
        )


def check_values(records: Sequence[Record], columns: Iterable[str], wanted_by: str) -> None:
  """Checks that the values of these columns can be written as text; absent ones are skipped.

  Args:
    records: from `read`.
    columns: the names of the columns.
    wanted_by: the start of the error: what needs the columns.

  Raises:
    ValueError: for a value that is neither text nor a number, such as null, a number that is not
      finite, or text with half of a surrogate pair.
  """
  columns = tuple(columns)
  for number, record in enumerate(records):
    for column in columns:
      value = record.get(column, "")
      where = f"{wanted_by}: column {column!r} of record {number}"
      if not isinstance(value, (str, int, float)):
        raise ValueError(
          f"{where} holds a {type(value).__name__}, not text or a number; make it a string first"
        )
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
          f"{where} holds {value}, which stands for a missing value; write the text that is meant, "
          "or leave the record out"
        )
      if isinstance(value, str) and (half := _LONE_SURROGATE.search(value)):
        raise ValueError(
          f"{where} holds U+{ord(half[0]):04X} in {value[:40]!r}, half of a surrogate pair; the "
          "text was cut within a character, as by a limit in UTF-16: take the half out"
        )


def from_json(what: str, text: str) -> Any:
  """Returns the value of JSON text, with the limits of a record.

  Args:
    what: describes the text at the start of an error.
    text: JSON.

  Raises:
    ValueError: for text that is not JSON, repeats a key or is nested deeper than 64.
  """
  with _named(what, lambda error: f"column {error.colno}: {text[:80]!r}"):
    value = json.loads(text, object_pairs_hook=_object)
  _check_depth(what, value, text.count("[") + text.count("{"))
  return value


def _format_of(path: pathlib.Path) -> str:
  name = path.name.lower().removesuffix(".gz")
  suffix = name.rpartition(".")[2]
  if suffix not in FORMATS:
    raise ValueError(
      f"{path}: the name does not tell the format; give format= (data.format in a config) one of "
      f"{', '.join(FORMATS)}"
    )
  return suffix


def _parse_jsonl(path: pathlib.Path, lines: Iterable[str]) -> list[Record]:
  records = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    where, hint = f"{path}: line {number}", _hint_of_array(line, number)
    with _named(
      where, lambda error, line=line: f"column {error.colno}: {line[:80].rstrip()!r}", hint
    ):
      record = json.loads(line, object_pairs_hook=_object)
    if not isinstance(record, dict):
      raise ValueError(
        f"{where} holds a {type(record).__name__}; "
        f'every line must be one object, {{"column": value, ...}}{hint}'
      )
    _check_depth(where, record, line.count("[") + line.count("{"))
    _append(path, records, record)
  return records


def _hint_of_array(line: str, number: int) -> str:
  if number > 1 or not line.lstrip().startswith("["):
    return ""
  return "; where the file is one array, its format is json"


def _parse_array(path: pathlib.Path, lines: Iterable[str]) -> list[Record]:
  text = "".join(lines)
  at = _after_space(text, 0)
  if at == len(text):
    return []
  if text[at] != "[":
    raise ValueError(
      f"{path}: is no JSON array of objects, [{{...}}, {{...}}], but begins with "
      f"{text[at : at + 40]!r}; where every line is an object, its format is jsonl, and where an "
      "object holds the array, take it out"
    )
  decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
  records, at = [], _after_space(text, at + 1)
  closed = text[at : at + 1] == "]"
  while not closed:
    where, start = f"{path}: record {len(records)}", at
    with _named(where, _place_in_array):
      record, end = decode(text, start)
      at = _after_space(text, end)
      if text[at : at + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if not isinstance(record, dict):
      raise ValueError(
        f'{where} is a {type(record).__name__}; each must be an object, {{"column": value, ...}}'
      )
    _check_depth(where, record, text.count("[", start, end) + text.count("{", start, end))
    _append(path, records, record)
    closed = text[at] == "]"
    at = _after_space(text, at + 1)
  if not records:
    at = _after_space(text, at + 1)
  if at < len(text):
    raise ValueError(
      f"{path}: goes on after its array with {text[at : at + 80]!r}; a file is to hold one array"
    )
  return records


def _after_space(text: str, at: int) -> int:
  found = _SPACE.match(text, at)
  assert found is not None  # it matches nothing, too
  return found.end()


def _place_in_array(error: json.JSONDecodeError) -> str:
  shown = error.doc[error.pos : error.pos + 80]
  return f"line {error.lineno}, column {error.colno}: {shown!r}"


@contextlib.contextmanager
def _named(
  where: str, place: Callable[[json.JSONDecodeError], str], hint: str = ""
) -> Iterator[None]:
  """Names the record that the JSON parser rejects, and the position in it."""
  try:
    yield
  except json.JSONDecodeError as error:
    raise ValueError(f"{where} is not JSON: {error.msg} at {place(error)}{hint}") from error
  except RecursionError:
    raise ValueError(_too_deep(where)) from None
  except _RepeatedName as error:
    raise ValueError(f"{where} names {error} twice; take one out") from None
  except ValueError as error:
    # Python limits the digits of an integer, since parsing takes quadratic time.
    raise ValueError(
      f"{where} holds a whole number of thousands of digits; write it as a string"
    ) from error


class _RepeatedName(ValueError):
  """A repeated name in an object; `json` would silently keep the last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    raise _RepeatedName(_listed(repr(name) for name in counts if counts[name] > 1))
  return found


def _depth(value: Any) -> int:
  depth, level = 0, [value]
  while level:
    depth += 1
    inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
    level = [x for values in inner for x in values]
  return depth - 1


def _check_depth(where: str, record: Any, brackets: int) -> None:
  if brackets > _MAX_DEPTH and _depth(record) > _MAX_DEPTH:
    raise ValueError(_too_deep(where))


def _too_deep(where: str) -> str:
  return f"{where} is nested deeper than {_MAX_DEPTH} objects and lists; flatten it"


def _append(path: pathlib.Path, records: list[Record], record: Record) -> None:
  if len(records) == _MAX_RECORDS:
    raise ValueError(
      f"{path}: has more than {_MAX_RECORDS:,} records, which are held in memory; take a part of it"
    )
  records.append(record)


def _parse_table(
  path: pathlib.Path,
  lines: Iterable[str],
  size: int,
  delimiter: str,
  columns: Sequence[str] | None,
  quoted: bool,
) -> list[Record]:
  rows = csv.reader(
    lines,
    delimiter=delimiter,
    quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    strict=quoted,
  )
  names = None if columns is None else _distinct(path, columns)
  records = []
  # The csv module limits a field to 131,072 characters, to catch a stray quote; here the size of
  # the file is the limit. The setting is global to the process, so it is restored.
  limit = csv.field_size_limit(max(size, csv.field_size_limit()))
  try:
    for row in rows:
      if not row:
        continue
      if names is None:
        names = _distinct(path, row)
        continue
      if len(row) != len(names):
        remedy = (
          "quote a field that holds the delimiter"
          if quoted
          else "a field must not hold the delimiter (fields in double quotes: quoted=True, or "
          "data.quoted in a config)"
        )
        raise ValueError(
          f"{path}: line {rows.line_num} has {len(row)} fields, not the {len(names)} of "
          f"{_listed(names)}; {remedy}"
        )
      if columns is not None and not records and row == names:
        raise ValueError(f"{path}: the first line is a header that repeats columns=; leave it out")
      _append(path, records, dict(zip(names, row, strict=True)))
  except csv.Error as error:
    raise ValueError(
      f"{path}: line {rows.line_num}: {error}; if double quotes are plain characters here, "
      "read with quoted=False (data.quoted in a config)"
    ) from error
  finally:
    csv.field_size_limit(limit)
  return records


def _distinct(path: pathlib.Path, names: Sequence[str]) -> list[str]:
  counts = collections.Counter(names)
  repeated = sorted(name for name in counts if counts[name] > 1)
  if repeated:
    raise ValueError(
      f"{path}: the column {_listed(map(repr, repeated))} is named more than once; "
      "a file without a header line needs columns="
    )
  return list(names)


def _listed(names: Iterable[str]) -> str:
  """Formats names for a message, with limits on their number and length."""
  names = list(names)
  shown = [name if len(name) <= _CUT else name[:_CUT] + "…" for name in names[:_SHOWN]]
  more = [f"{len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
  return ", ".join(shown + more)
