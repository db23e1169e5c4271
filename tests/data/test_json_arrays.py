"""One JSON array of objects, as many tools write a data set."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import records
from lora_jax.data.records import read

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@settings(max_examples=40)
@given(
  rows=st.lists(st.dictionaries(st.text(), VALUES), min_size=1),
  indent=st.sampled_from([None, 2]),
  around=st.sampled_from(["", "\n", " \r\n\t"]),
)
def test_what_the_json_module_writes_is_read_back(tmp_path_factory, rows, indent, around):
  path = tmp_path_factory.mktemp("json") / "a.json"
  path.write_text(around + json.dumps(rows, ensure_ascii=False, indent=indent) + around, "utf-8")
  assert read(path) == rows


def test_the_array_of_a_set_has_the_records_of_its_lines(public_data, tmp_path):
  lines = read(public_data / "chat_sft/train.jsonl")
  (tmp_path / "a.json").write_text(json.dumps(lines))
  assert read(tmp_path / "a.json") == lines and len(lines) == 422
  (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(lines).encode("utf-16")))
  assert read(tmp_path / "b.json.gz", encoding="utf-16") == lines


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "the data set is empty, no records in 0 bytes"),
    (" [ ] ", "the data set is empty, no records in 5 bytes"),
    ('{"data": [{"a": 1}]}', r"is no JSON array .* begins with '\{\"data\": .*take it out"),
    ('{"a": 1}\n{"a": 2}\n', ".* where every line is an object, its format is jsonl"),
    ('[{"a": 1}, 2]', r"record 1 is a int; each must be an object, \{\"column\": value"),
    ('[{"a": 1}, {"a": }]', r"record 1 is not JSON: Expecting value at line 1, column 18: '\}\]'"),
    (
      '[{"a": 1},\n {"a": 1} {"a": 1}]',
      r"record 1 is not JSON: Expecting ',' .* line 2, column 11",
    ),
    ('[{"a": 1},]', "record 1 is not JSON: Expecting value at line 1, column 11"),
    ('[{"a": 1}', "record 0 is not JSON: Expecting ',' or ']' at line 1, column 10"),
    ("[", "record 0 is not JSON: Expecting value"),
    ('[{"a": 1}] {"a": 2}', r"goes on after its array with '\{\"a\": 2\}'"),
    ("[] x", "goes on after its array with 'x'"),
    ('[{"a": 1, "b": 2, "a": 3}]', "record 0 names 'a' twice"),
    ('[{}, {"a": ' + "[" * 70 + "]" * 70 + "}]", "record 1 is nested deeper than 64 objects"),
    ('[{"a": ' + "[" * 100_000, "record 0 is nested deeper than 64 objects"),
    ('[{"a": ' + "1" * 5000 + "}]", "record 0 holds a whole number of thousands of digits"),
  ],
)
def test_a_damaged_array_is_refused_with_record_and_remedy(tmp_path, text, words):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(ValueError, match=rf"a.json: {words}") as error:
    read(tmp_path / "a.json")
  assert len(str(error.value)) < 600


def test_an_array_under_the_name_of_lines_is_told(tmp_path):
  for text in ("[\n" + '{"a": 1}\n]', '[{"a": 1}]'):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"a.jsonl: line 1 .*one array, its format is json$"):
      read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", format="json") == [{"a": 1}]


def test_more_records_than_memory_is_meant_for_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "_MAX_RECORDS", 3)
  (tmp_path / "a.json").write_text("[{}, {}, {}]")
  assert len(read(tmp_path / "a.json")) == 3
  (tmp_path / "a.json").write_text("[{}, {}, {}, {}]")
  with pytest.raises(ValueError, match=r"a.json: has more than 3 records"):
    read(tmp_path / "a.json")


def test_json_in_a_text_is_under_the_limits_of_a_record():
  assert records.from_json("tools", '[{"a": [1]}]') == [{"a": [1]}]
  for text, words in (
    ("[1", "tools is not JSON: .* at column 3: '\\[1'"),
    ('{"a": 1, "a": 2}', "tools names 'a' twice"),
    ("[" * 70 + "]" * 70, "tools is nested deeper than 64"),
  ):
    with pytest.raises(ValueError, match=words):
      records.from_json("tools", text)
