"""Reads JSONL, CSV and TSV files into a list of dict records.

  records = read("reviews.jsonl")
  records = read("ratings.txt", format="tsv", columns=("id", "rating", "text"))   # no header line
  records[0]["text"]

A data set for fine-tuning fits in memory, so a file is read and checked whole: a damaged line is
refused, with its number, before any model is loaded.
"""

import csv
import difflib
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_FORMATS = ("jsonl", *_DELIMITERS)


def read(
  path: str | pathlib.Path,
  format: str | None = None,
  columns: Sequence[str] | None = None,
  quoted: bool | None = None,
  encoding: str = "utf-8-sig",
) -> list[Record]:
  """Returns the file's records in its order, one dict each, blank lines left out.

  Args:
    path: a local file; gzip is recognised by its content, a byte-order mark is skipped.
    format: "jsonl", "csv" or "tsv"; None goes by the file's name (".gz" aside).
    columns: the names of the fields of a CSV or TSV file that has no header line.
    quoted: whether a double quote opens a field that may hold delimiters and line breaks
      (`csv.QUOTE_MINIMAL`), or is a character like any other (`csv.QUOTE_NONE`). None: quoted
      for CSV, not for TSV, as published TSV sets are written.
    encoding: the text's encoding.

  The fields of CSV and TSV are strings; those of JSONL are what the line says.

  Raises:
    FileNotFoundError: no such file.
    ValueError: an unknown format or an option that the format has no use for, text in another
      encoding, damaged gzip, a malformed line, a row with too many or too few fields, no records.
  """
  path = pathlib.Path(path)
  format = format or _format_of(path)
  if format not in _FORMATS:
    raise ValueError(f"{path}: unknown format {format!r}; use one of {', '.join(_FORMATS)}")
  text = _decode(path, _contents(path), encoding)
  if format == "jsonl":
    if columns is not None or quoted is not None:
      raise ValueError(
        f"{path}: columns and quoted are for CSV and TSV; a JSONL line names its own fields"
      )
    records = _parse_jsonl(path, text)
  else:
    quoted = (format == "csv") if quoted is None else quoted
    records = _parse_table(path, text, _DELIMITERS[format], columns, quoted)
  if not records:
    raise ValueError(f"{path}: the data set is empty, no records in {len(text)} characters")
  return records


def require(records: Sequence[Record], columns: Iterable[str], wanted_by: str) -> None:
  """Checks that there are records and that each has these columns.

  Args:
    records: as `read` returns them.
    columns: the names that must be there.
    wanted_by: who needs them, the first words of the error.

  Raises:
    ValueError: no records, or a column that a record lacks; the message lists those it has.
  """
  if not records:
    raise ValueError(f"{wanted_by}: the data set is empty")
  columns = tuple(columns)
  for number, record in enumerate(records):
    for column in columns:
      if column not in record:
        raise ValueError(
          f"{wanted_by}: record {number} has no column {column!r}; "
          f"it has {', '.join(record) or 'none'}{_nearest(column, record)}"
        )


def _nearest(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _format_of(path: pathlib.Path) -> str:
  name = path.name.lower().removesuffix(".gz")
  suffix = name.rpartition(".")[2]
  if suffix not in _FORMATS:
    raise ValueError(
      f"{path}: the name does not tell the format; give format= one of {', '.join(_FORMATS)}"
    )
  return suffix


def _contents(path: pathlib.Path) -> bytes:
  if path.is_dir():
    raise ValueError(f"{path}: is a folder; name one of its files")
  if not path.exists():
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(f"{path}: no such data file{_nearest(path.name, there)}")
  contents = path.read_bytes()
  if contents[:2] != b"\x1f\x8b":
    return contents
  try:
    return gzip.decompress(contents)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{path}: damaged gzip ({error}); fetch the file again") from error


def _decode(path: pathlib.Path, contents: bytes, encoding: str) -> str:
  try:
    return contents.decode(encoding)
  except UnicodeDecodeError as error:
    line = contents.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"{path}: line {line} is not {encoding}: byte {contents[error.start]:#04x} at {error.start} "
      f"({error.reason}); give the file's own encoding=, e.g. 'latin-1' or 'utf-16'"
    ) from error


def _parse_jsonl(path: pathlib.Path, text: str) -> list[Record]:
  records = []
  # Not `splitlines`: JSON strings may hold U+2028 and other characters it takes for line ends.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{path}: line {number} is not JSON: {error.msg} at column {error.colno}: {line[:80]!r}"
      ) from error
    if not isinstance(record, dict):
      raise ValueError(
        f"{path}: line {number} holds a {type(record).__name__}; "
        'every line must be one object, {"column": value, ...}'
      )
    records.append(record)
  return records


def _parse_table(
  path: pathlib.Path, text: str, delimiter: str, columns: Sequence[str] | None, quoted: bool
) -> list[Record]:
  rows = csv.reader(
    io.StringIO(text, newline=""),
    delimiter=delimiter,
    quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    strict=quoted,
  )
  names = None if columns is None else _distinct(path, columns)
  records = []
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
          else "a field must not hold the delimiter (fields in double quotes: quoted=True)"
        )
        raise ValueError(
          f"{path}: line {rows.line_num} has {len(row)} fields, not the {len(names)} of "
          f"{', '.join(names)}; {remedy}"
        )
      if columns is not None and not records and row == names:
        raise ValueError(f"{path}: the first line is a header that repeats columns=; leave it out")
      records.append(dict(zip(names, row, strict=True)))
  except csv.Error as error:
    raise ValueError(
      f"{path}: line {rows.line_num}: {error}; if double quotes are plain characters here, "
      "read with quoted=False"
    ) from error
  return records


def _distinct(path: pathlib.Path, names: Sequence[str]) -> list[str]:
  repeated = sorted({name for name in names if list(names).count(name) > 1})
  if repeated:
    raise ValueError(
      f"{path}: the column {', '.join(map(repr, repeated))} is named more than once; "
      "a file without a header line needs columns="
    )
  return list(names)
