"""From a data config to its splits."""

import json

import pytest
from ml_collections import ConfigDict

from experiments import parts


@pytest.fixture
def data(tmp_path):
  """A config of 40 records in one file and 3 in another, of which one is in both."""
  rows = [{"mr": f"name[{n} - {n}]", "ref": f"a , {n}"} for n in range(40)]
  held_out = [{"mr": f"name[{n}-{n}]", "ref": f"b, {n}"} for n in (7, 40, 41)]
  for name, records in (("rows", rows), ("held_out", held_out)):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / f"{name}.jsonl").write_text(text)
  return ConfigDict({
    "source": str(tmp_path / "rows.jsonl"),
    "format": "jsonl",
    "columns": (),
    "detokenise": ("mr", "ref"),
    "sign_of": "",
    "neutral": 0.0,
    "prompt": "{mr}:",
    "completion": " {ref}",
    "split_by": "mr",
    "train": 0.8,
    "validation": 0.2,
    "test": 0.0,
    "test_source": str(tmp_path / "held_out.jsonl"),
  })  # fmt: skip


def test_the_test_split_is_the_other_file_and_nothing_of_it_is_trained_on(data):
  found = parts.load_records(data)
  assert found.keys() == {"train", "validation", "test"}
  assert [record["ref"] for record in found["test"]] == ["b, 7", "b, 40", "b, 41"]
  rest = found["train"] + found["validation"]
  assert {record["mr"] for record in rest} == {f"name[{n}-{n}]" for n in range(40) if n != 7}
  assert all(record["ref"].startswith("a, ") for record in rest)


def test_without_another_file_the_test_split_is_a_share(data):
  data.test_source, data.test, data.train = "", 0.3, 0.5
  found = parts.load_records(data)
  assert sum(map(len, found.values())) == 40
  assert set(found) == {"train", "validation", "test"}
  data.test, data.train = 0.0, 0.8
  assert set(parts.load_records(data)) == {"train", "validation"}


def test_two_test_splits_are_refused(data):
  data.test, data.train = 0.3, 0.5
  with pytest.raises(ValueError, match=r"data.test 0.3 is a share.*data.test_source names a file"):
    parts.load_records(data)


def test_the_other_file_is_checked_too(data, tmp_path):
  (tmp_path / "held_out.jsonl").write_text('{"mr": "a", "text": "b"}\n')
  with pytest.raises(ValueError, match="detokenise: record 0 has no column 'ref'"):
    parts.load_records(data)
  data.detokenise = ()
  with pytest.raises(ValueError, match=r"completion template .* record 0 has no column 'ref'"):
    parts.load_records(data)
