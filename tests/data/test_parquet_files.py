"""Parquet, written by pyarrow: the records of JSONL, and columns that no record can hold."""

import datetime
import decimal
import io
import json
import struct

import pyarrow as pa
import pytest
from pyarrow import parquet

from lora_jax.data import parquet_files, records
from lora_jax.data.records import read


def write(path, columns, schema=None, **options):
  parquet.write_table(pa.table(columns, schema=schema), path, **options)
  return path


def without_none(value):
  """A value without the fields that Parquet has and JSON may leave out."""
  if isinstance(value, dict):
    return {name: without_none(each) for name, each in value.items() if each is not None}
  return [without_none(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["chat_sft/train", "chat_sft/dev", "gsm8k/train", "pref_orca/dev"])
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_the_records_are_those_of_the_lines(public_data, tmp_path, name, compression):
  rows = read(public_data / f"{name}.jsonl")
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.Table.from_pylist(rows), path, compression=compression, row_group_size=100)
  assert read(path) == rows


def test_nested_tool_calls_are_lists_and_dicts(public_data, tmp_path):
  rows = read(public_data / "chat_tools/dev.jsonl")
  for row in rows:  # objects of any fields are no type of Parquet
    row["tools"] = json.dumps(row["tools"])
    for message in row["messages"]:
      for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  assert without_none(read(tmp_path / "a.parquet")) == rows


def test_every_type_that_a_record_can_hold_is_read_as_python_has_it(tmp_path):
  columns = {
    "text": ["a", None],
    "large": pa.array(["é", "日本"], pa.large_string()),
    "category": pa.array(["x", "x"]).dictionary_encode(),
    "flag": [True, False],
    "small": pa.array([1, 255], pa.uint8()),
    "real": pa.array([0.5, -2.0], pa.float32()),
    "nothing": pa.nulls(2),
    "list": [[1, 2], []],
    "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    "object": [{"a": [{"b": "c"}]}, None],
  }
  found = read(write(tmp_path / "a.parquet", columns))
  assert found == [
    {"text": "a", "large": "é", "category": "x", "flag": True, "small": 1, "real": 0.5,
     "nothing": None, "list": [1, 2], "fixed": [1, 2], "object": {"a": [{"b": "c"}]}},
    {"text": None, "large": "日本", "category": "x", "flag": False, "small": 255, "real": -2.0,
     "nothing": None, "list": [], "fixed": [3, 4], "object": None},
  ]  # fmt: skip


def test_dates_times_and_decimals_are_text(tmp_path):
  noon = datetime.datetime(2026, 1, 2, 12, 30, tzinfo=datetime.UTC)
  columns = {
    "day": [datetime.date(2026, 1, 2)],
    "at": [noon],
    "price": [decimal.Decimal("1.50")],
    "time": [datetime.time(1, 2, 3)],
    "text": ["a"],
  }
  [found] = read(write(tmp_path / "a.parquet", columns))
  assert found["day"] == "2026-01-02" and found["at"].startswith("2026-01-02 12:30:00")
  assert found["price"] == "1.50" and found["time"].startswith("01:02:03") and found["text"] == "a"


DEEP = pa.int32()
for _ in range(66):
  DEEP = pa.list_(DEEP)


@pytest.mark.parametrize(
  ("type", "words"),
  [
    (pa.binary(), "values of the type binary"),
    (pa.map_(pa.string(), pa.int32()), "values of the type map<string, int32"),
    (pa.duration("s"), "values of the type duration"),
    (pa.struct({"a": pa.struct({"b": pa.binary()})}), "values of the type binary"),
    (pa.list_(pa.timestamp("s")), "values of the type timestamp"),
    (pa.struct([("a", pa.int32()), ("a", pa.int32())]), "structs with two fields of one name"),
  ],
)
def test_a_column_that_no_record_can_hold_is_refused_by_its_name(tmp_path, type, words):
  schema = pa.schema({"text": pa.string(), "image": type})
  table = schema.empty_table()
  parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(ValueError, match=rf"a.parquet: the column 'image' holds {words}.*without it"):
    read(tmp_path / "a.parquet")


def test_nesting_has_a_limit():
  assert "nested deeper than 64" in parquet_files._unreadable(DEEP)


def test_two_columns_of_one_name_are_refused(tmp_path):
  table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
  parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(ValueError, match=r"a.parquet: the column 'text' is there twice"):
    read(tmp_path / "a.parquet")


@pytest.mark.parametrize("part", [slice(0), slice(3), slice(-1), slice(8, None), slice(None, -8)])
def test_a_part_of_a_file_is_refused(tmp_path, part):
  path = write(tmp_path / "a.parquet", {"text": ["a", "b"]})
  path.write_bytes(path.read_bytes()[part])
  with pytest.raises(ValueError, match=r"a.parquet: is no Parquet file, or a damaged one \(."):
    read(path)


def test_what_else_is_no_parquet_file_is_told(tmp_path):
  (tmp_path / "a.parquet").write_text('{"text": "a"}\n' * 100)
  with pytest.raises(ValueError, match=r"a.parquet: is no Parquet file"):
    read(tmp_path / "a.parquet")
  with pytest.raises(FileNotFoundError, match=r"b.parquet: no such data file.*'a.parquet'"):
    read(tmp_path / "b.parquet")
  path = write(tmp_path / "empty.parquet", {"text": pa.array([], pa.string())})
  with pytest.raises(ValueError, match=r"empty.parquet: the data set is empty, no records in \d+"):
    read(path)
  with pytest.raises(ValueError, match=r"empty.parquet: Parquet holds UTF-8; leave encoding"):
    read(path, encoding="utf-16")


def test_a_parquet_file_under_another_format_is_told(tmp_path):
  path = write(tmp_path / "a.parquet", {"real": [0.1] * 1000})
  for format in ("jsonl", "csv", "json"):
    with pytest.raises(ValueError, match=r"a.parquet: is a Parquet file; give format= .*'parquet'"):
      read(path, format=format)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
  path = write(tmp_path / "a.parquet", {"text": ["a"] * 1000})
  with pytest.raises(ValueError, match=r"a.parquet: changed while it was read"):
    for number, _ in enumerate(parquet_files.rows(path)):
      if number == 100:
        path.write_bytes(path.read_bytes() + b"x")


def test_more_records_than_memory_is_meant_for_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "_MAX_RECORDS", 3)
  path = write(tmp_path / "a.parquet", {"text": ["a"] * 4})
  with pytest.raises(ValueError, match=r"a.parquet: has more than 3 records"):
    read(path)


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path):
  words = r"a.parquet: holds more than 67,108,864 bytes or values, in a file of .*as JSONL"
  for columns, options in (
    ({"text": ["a" * (1 << 20)] * 65}, {}),  # one text in a dictionary, for all rows
    ({"text": ["a" * (1 << 26)]}, {"compression": "zstd", "use_dictionary": False}),
    ({"text": pa.nulls((1 << 26) + 1, pa.int8())}, {}),
  ):
    path = write(tmp_path / "a.parquet", columns, **options)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=words):
      read(path)


def varint(number: int) -> bytes:
  found = b""
  while number > 127:
    found, number = found + bytes([number & 127 | 128]), number >> 7
  return found + bytes([number])


def test_a_schema_of_any_depth_is_refused(tmp_path):
  """Written by hand in Thrift's compact protocol: a group in a group, so many times."""

  def group(name: bytes, tail: bytes) -> bytes:
    return b"\x35\x02\x18" + varint(len(name)) + name + tail

  for depth in (200, 10_000, 60_000):
    groups = [group(b"a", b"\x15\x02\x00")] * (depth + 1)
    leaf = b"\x15\x02\x25\x02\x18\x01b\x00"
    schema = b"\x19\xfc" + varint(depth + 2) + b"".join(groups) + leaf
    footer = b"\x15\x02" + schema + b"\x16\x00\x19\x0c\x00"
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    with pytest.raises(ValueError, match="too deeply nested"):
      read(path)


def test_pyarrow_reads_what_this_reader_reads(tmp_path):
  """The slow twin: the table as a whole."""
  buffer = io.BytesIO()
  columns = {"n": list(range(1000)), "text": [f"{n % 7}" for n in range(1000)]}
  parquet.write_table(pa.table(columns), buffer, row_group_size=90)
  (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
  assert read(tmp_path / "a.parquet") == parquet.read_table(buffer).to_pylist()
