"""Files of one's own: of any format, several, and few records; runs of a tiny model."""

import gzip
import json
import runpy

import pyarrow as pa
import pytest
import tiny_experiment
from main_programs import imported
from ml_collections import ConfigDict
from pyarrow import parquet

from experiments import inputs, parts
from lora_jax.io import pretrained
from lora_jax.run import workdir

train = imported("experiments.train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny model, and its records in one file and in parts of four formats."""
  folder = tmp_path_factory.mktemp("own")
  tiny_experiment.write(folder, pretrained.inspect(pretrained.DEFAULT).tokenizer)
  rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
  parquet.write_table(pa.Table.from_pylist(rows[:30]), folder / "a.parquet")
  (folder / "b.json").write_text(json.dumps(rows[30:60]))
  table = "text\tlabel\n" + "".join(f'"{x["text"]}"\t{x["label"]}\n' for x in rows[60:90])
  (folder / "c.tsv").write_bytes(gzip.compress(table.encode("utf-8-sig")))
  (folder / "d.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows[90:]))
  return folder


PARTS = ("a.parquet", "b.json", "c.tsv", "d.jsonl")


def config_of(folder, **fields):
  config = runpy.run_path(str(folder / "config.py"))["get_config"]()
  config.update_from_flattened_dict({"train.steps": 2} | fields)
  return config


def run(folder, name, **fields):
  config = config_of(folder, **fields)
  with workdir.open_workdir(folder / name, config.to_dict()) as opened:
    train.train(config, opened)
  return json.loads(opened.evaluation.read_text()), opened


@pytest.mark.slow
def test_a_run_on_several_files_is_that_on_one_with_all_their_records(folder):
  unquoted = [x for x in PARTS if x != "c.tsv"]
  (folder / "c.csv").write_bytes(
    gzip.decompress((folder / "c.tsv").read_bytes()).replace(b"\t", b",")
  )
  files = tuple(str(folder / x) for x in (unquoted[0], unquoted[1], "c.csv", unquoted[2]))
  several, opened = run(folder, "several", **{"data.source": files, "data.format": "auto"})
  one, _ = run(folder, "one")
  assert several["after"] == one["after"] and several["after"]["rows"] == 16
  kept = workdir.read_inputs(opened.path)
  assert [name for name in kept if name.startswith("data")] == [
    f"data.source[{n}]" for n in range(4)
  ]

  finished, config = parts.open_run(str(opened.path))
  rows = parts.load_records(config.data, parts.make_task(config))
  assert sum(map(len, rows.values())) == 120
  fields = ["data.source", "data.test_source"]
  inputs.require_of(finished, config, fields, fetch=False)


def test_a_finished_run_says_which_of_several_files_has_changed(folder, caplog):
  files = tuple(str(folder / x) for x in ("b.json", "d.jsonl"))
  config = config_of(folder, **{"data.source": files, "data.format": "auto"})
  with workdir.open_workdir(folder / "begun", config.to_dict()) as opened:
    workdir.settle_inputs(opened, inputs.of_run(config))
  whole = (folder / "d.jsonl").read_text()
  inputs.warn_of_changes(opened, config, ["model.source", "data.source"])
  assert not caplog.text
  (folder / "d.jsonl").write_text(whole + "\n")
  try:
    inputs.warn_of_changes(opened, config, ["model.source", "data.source"])
  finally:
    (folder / "d.jsonl").write_text(whole)
  assert "data.source[1]: " in caplog.text and "data.source[0]" not in caplog.text


def load(folder, sources, **fields):
  config = config_of(folder, **{"data.source": sources} | fields)
  rows = parts.load_records(config.data, parts.make_task(config))
  return [row for name in ("train", "validation", "test") for row in rows[name]]


def test_encoding_and_quotes_are_of_every_file_of_text(folder):
  files = tuple(str(folder / x) for x in ("c.tsv", "c.tsv"))
  found = load(folder, files, **{"data.format": "auto", "data.quoted": True})
  assert len(found) == 60 and all('"' not in row["text"] for row in found)
  (folder / "wide.csv").write_bytes(
    "text,label\né film,positive\nb,negative\nc,x\n".encode("utf-16")
  )
  found = load(
    folder, str(folder / "wide.csv"), **{"data.format": "csv", "data.encoding": "utf-16"}
  )
  assert sorted(row["text"] for row in found) == ["b", "c", "é film"]
  with pytest.raises(ValueError, match=r"a.parquet: columns and quoted are for CSV and TSV"):
    load(folder, str(folder / "a.parquet"), **{"data.format": "auto", "data.quoted": True})


def test_a_wrong_record_is_named_by_its_file_and_its_number_there(folder):
  (folder / "wrong.json").write_text(json.dumps([{"text": "a", "label": "b"}, {"text": "a"}]))
  files = (str(folder / "a.parquet"), str(folder / "wrong.json"))
  with pytest.raises(
    ValueError, match=r"wrong.json: completion template .* record 1 has no column"
  ):
    load(folder, files, **{"data.format": "auto"})


def test_the_test_split_may_be_several_files(folder):
  names = {"data.test_source": tuple(str(folder / x) for x in PARTS[:2]), "data.format": "auto"}
  config = config_of(folder, **names, **{"data.test": 0.0, "data.train": 0.8})
  found = parts.load_records(config.data, parts.make_task(config))
  assert len(found["test"]) == 60 and len(found["train"] + found["validation"]) == 60


FEW = {"data.train": 0.9, "data.validation": 0.05, "data.test": 0.05, "train.evaluate_every": 1}


def few(folder, count):
  """The address of a file of so many records."""
  lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
  (folder / f"few{count}.jsonl").write_text("".join(lines[:count]))
  return {"data.source": str(folder / f"few{count}.jsonl")}


@pytest.mark.parametrize(("count", "sizes"), [(3, [1, 1, 1]), (10, [8, 1, 1]), (20, [18, 1, 1])])
def test_few_records_fill_each_split(folder, count, sizes):
  config = config_of(folder, **FEW, **few(folder, count))
  found = parts.load_records(config.data, parts.make_task(config))
  assert [len(found[name]) for name in ("train", "validation", "test")] == sizes


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_on_few_records_has_some_in_each_split_or_says_what_it_leaves_out(
  folder, capsys, count
):
  results, opened = run(folder, f"few{count}", **FEW, **few(folder, count))
  validated = [x for x in opened.metrics.read_text().splitlines() if "validation" in x]
  said = capsys.readouterr().out
  assert results["after"]["rows"] == 1
  assert ("validation: left out, for there are too few" in said) == (count == 2)
  assert bool(validated) == (count > 2)
  assert "data: 1 to train on, 1 held out" in said


def test_one_record_is_too_few_and_is_refused_before_the_model_is_loaded(folder, monkeypatch):
  monkeypatch.setattr(parts, "load_model", None)
  with pytest.raises(ValueError, match=r"^evaluation.split 'test': no record is in it; .*add some"):
    run(folder, "one_record", **FEW, **few(folder, 1))


def test_a_config_of_an_earlier_run_names_one_file(folder):
  data = ConfigDict({"format": "jsonl", "columns": ()})
  assert len(parts.read_file(data, str(folder / "data.jsonl"))) == 120
  assert parts.addresses("a.csv") == ("a.csv",) and parts.addresses("") == ()
