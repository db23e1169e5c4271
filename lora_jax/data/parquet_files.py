"""Reads the records of a Parquet file with pyarrow, which is imported only when needed.

for record in rows("chats.parquet"): ...     # {"messages": [{"role": "user", ...}, ...]}
"""

import collections
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.data import text_files

# A dictionary may hold one long text for many rows, so few rows are decoded at a time.
_ROWS = 64
_MAX_DEPTH = 64
# Limits of the file's metadata, whose sizes are untrusted.
_MAX_TEXT, _MAX_ITEMS = 1 << 24, 1 << 16


def rows(path: Path) -> Iterator[dict[str, Any]]:
  """Yields the records of a Parquet file, in order.

  Texts, numbers, booleans and missing values become Python values, lists and structs become lists
  and dicts. Dates, times and decimals become text. Every field of a struct is present, as None if a
  record lacks it.

  Raises:
    ImportError: without pyarrow.
    FileNotFoundError: if there is no such file.
    ValueError: for a file that is not Parquet, is damaged, or changes while it is read; for a
      column of binary data, maps or other unsupported values, by its name; for values of more than
      64 MiB and fifty times the file's size.
  """
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise ImportError(f"{path}: Parquet is read by pyarrow; `pip install pyarrow`") from error
  with text_files.opened(path) as file:
    limit = text_files.most_unpacked(os.fstat(file.fileno()).st_size)
    with _refusing_damage(path):
      opened = parquet.ParquetFile(
        file,
        pre_buffer=False,
        thrift_string_size_limit=_MAX_TEXT,
        thrift_container_size_limit=_MAX_ITEMS,
        page_checksum_verification=True,
      )
      schema = opened.schema_arrow
    as_text = _check_columns(path, schema)
    _check_sizes(path, opened.metadata, limit)
    with _refusing_damage(path):
      batches = opened.iter_batches(batch_size=_ROWS, use_threads=False)
    while True:
      with _refusing_damage(path):
        batch = next(batches, None)
        if batch is None:
          break
        limit -= batch.nbytes
        for name in as_text:
          at = batch.schema.get_field_index(name)
          batch = batch.set_column(at, name, batch.column(at).cast(pa.string()))
        found = batch.to_pylist() if limit >= 0 else []
      if limit < 0:
        raise ValueError(_too_large(path))
      yield from found


@contextlib.contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
  import pyarrow as pa

  try:
    yield
  except MemoryError:
    raise ValueError(f"{path}: its records do not fit into memory; take a part of it") from None
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path}: is no Parquet file, or a damaged one ({reason})") from error


def _check_columns(path: Path, schema: Any) -> list[str]:
  """Checks that all columns are supported; returns those that become text."""
  import pyarrow as pa

  t, counts, as_text = pa.types, collections.Counter(schema.names), []
  for name, type in zip(schema.names, schema.types, strict=True):
    if counts[name] > 1:
      raise ValueError(f"{path}: the column {name[:60]!r} is there twice; rename one")
    if any(x(type) for x in (t.is_date, t.is_time, t.is_timestamp, t.is_decimal)):
      as_text.append(name)
    elif reason := _unreadable(type):
      raise ValueError(
        f"{path}: the column {name[:60]!r} holds {reason}, which no record can; write it as text, "
        "or write the file without it"
      )
  return as_text


def _unreadable(type: Any, depth: int = 0) -> str:
  """Describes the unsupported part of a column's type, or returns ""."""
  import pyarrow as pa

  t = pa.types
  if depth > _MAX_DEPTH:
    return f"values nested deeper than {_MAX_DEPTH} lists and structs"
  if t.is_dictionary(type):
    return _unreadable(type.value_type, depth + 1)
  if t.is_list(type) or t.is_large_list(type) or t.is_fixed_size_list(type):
    return _unreadable(type.value_type, depth + 1)
  if t.is_struct(type):
    fields = [type.field(n) for n in range(type.num_fields)]
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
      return "structs with two fields of one name"
    return next(filter(None, (_unreadable(field.type, depth + 1) for field in fields)), "")
  texts = t.is_string(type) or t.is_large_string(type) or t.is_string_view(type)
  numbers = t.is_integer(type) or t.is_floating(type) or t.is_boolean(type)
  return "" if texts or numbers or t.is_null(type) else f"values of the type {str(type)[:60]}"


def _check_sizes(path: Path, metadata: Any, limit: int) -> None:
  """Checks the declared sizes of the file against the limit, before anything is decompressed.

  It reads only the row groups: with damaged metadata of a column chunk, pyarrow ends the process.
  """
  with _refusing_damage(path):
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    size = sum(max(0, group.total_byte_size) for group in groups)
    values = metadata.num_rows * metadata.num_columns
  if max(size, values) > limit:
    raise ValueError(_too_large(path))


def _too_large(path: Path) -> str:
  size = path.stat().st_size
  return (
    f"{path}: holds more than {text_files.most_unpacked(size):,} bytes or values, in a file of "
    f"{size:,} bytes; if you trust it, write it as JSONL and name that"
  )
