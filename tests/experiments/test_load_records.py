"""From a data config to its splits."""

import json

import pytest
from ml_collections import ConfigDict

from experiments import parts
from lora_jax import tasks


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
    "choices": (),
    "append_eos": False,
    "special_tokens": False,
    "max_length": 40,
    "buckets": (40,),
    "packed_length": 0,
    "split_by": "mr",
    "train": 0.8,
    "validation": 0.2,
    "test": 0.0,
    "test_source": str(tmp_path / "held_out.jsonl"),
  })  # fmt: skip


def load_records(data):
  return parts.load_records(data, tasks.make({"name": "completion"}, data, loss_chunk=0))


def test_the_test_split_is_the_other_file_and_nothing_of_it_is_trained_on(data):
  found = load_records(data)
  assert found.keys() == {"train", "validation", "test"}
  assert [record["ref"] for record in found["test"]] == ["b, 7", "b, 40", "b, 41"]
  rest = found["train"] + found["validation"]
  assert {record["mr"] for record in rest} == {f"name[{n}-{n}]" for n in range(40) if n != 7}
  assert all(record["ref"].startswith("a, ") for record in rest)


def test_without_another_file_the_test_split_is_a_share(data):
  data.test_source, data.test, data.train = "", 0.3, 0.5
  found = load_records(data)
  assert sum(map(len, found.values())) == 40
  assert set(found) == {"train", "validation", "test"}
  data.test, data.train = 0.0, 0.8
  assert set(load_records(data)) == {"train", "validation"}


def test_two_test_splits_are_refused(data):
  data.test, data.train = 0.3, 0.5
  with pytest.raises(
    ValueError, match=r"data.test 0.3 is a fraction.*data.test_source names a file"
  ):
    load_records(data)


def test_the_other_file_is_checked_too(data, tmp_path):
  (tmp_path / "held_out.jsonl").write_text('{"mr": "a", "text": "b"}\n')
  with pytest.raises(ValueError, match="detokenise: record 0 has no column 'ref'"):
    load_records(data)
  data.detokenise = ()
  with pytest.raises(ValueError, match=r"completion template .* record 0 has no column 'ref'"):
    load_records(data)


def test_what_a_record_cannot_say_is_refused_with_its_file_and_its_number_there(data, tmp_path):
  """Before any record is left out."""
  rows = [{"mr": "a", "ref": "b", "rating": 0.0}] * 2
  for bad, words in (
    ({"mr": "a", "ref": float("nan")}, "column 'ref' of record 2 holds nan"),
    ({"mr": "a\ud83d", "ref": "b"}, r"column 'mr' of record 2 holds U\+D83D"),
  ):
    lines = [json.dumps(row) + "\n" for row in [*rows, bad | {"rating": 1.0}]]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data.sign_of = "rating"
    with pytest.raises(ValueError, match="rows.jsonl: .*" + words):
      load_records(data)


def test_a_config_says_how_its_file_is_encoded_and_quoted(data, tmp_path):
  text = 'mr\tref\n"name[a\tb]"\té\n'
  (tmp_path / "rows.tsv").write_bytes(text.encode("utf-16"))
  data.source, data.format, data.test_source = str(tmp_path / "rows.tsv"), "tsv", ""
  data.detokenise, data.train, data.validation = (), 1.0, 0.0
  data.encoding, data.quoted = "utf-16", True
  assert load_records(data)["train"] == [{"mr": "name[a\tb]", "ref": "é"}]
  data.quoted = False
  with pytest.raises(ValueError, match=r"line 2 has 3 fields.*data.quoted"):
    load_records(data)
