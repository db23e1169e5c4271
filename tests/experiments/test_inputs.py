"""A run that resumes is held to the files that it began with, before anything else is done."""

import dataclasses
import json
import runpy
import shutil
from unittest import mock

import pytest
import tiny_experiment
from main_programs import imported

from configs import quickstart
from experiments import inputs, parts, samples
from lora_jax.data import examples
from lora_jax.io import pretrained
from lora_jax.run import workdir

train = imported("experiments.train")


class Begun(Exception):
  """Raised in the place of what a run does after its checks."""


@pytest.fixture(scope="module")
def words():
  return pretrained.inspect(pretrained.DEFAULT).tokenizer


@pytest.fixture
def folder(tmp_path, words, monkeypatch):
  """A tiny model, a teacher, data and a config of them."""
  tiny_experiment.write(tmp_path, words)
  shutil.copytree(tmp_path / "model", tmp_path / "teacher")
  shutil.copy(tmp_path / "data.jsonl", tmp_path / "held_out.jsonl")

  def stop(*_):
    raise Begun

  monkeypatch.setattr(parts, "load_records", stop)
  return tmp_path


def config_of(folder, **fields):
  config = runpy.run_path(str(folder / "config.py"))["get_config"]()
  fields = {"distill.teacher": str(folder / "teacher")} | fields
  fields |= {"data.test_source": str(folder / "held_out.jsonl"), "data.test": 0.0}
  config.update_from_flattened_dict(fields)
  return config


def begin(folder, config):
  """Runs a config up to where its data are read; a line is logged then, as if it had begun."""
  with workdir.open_workdir(folder / "run", config.to_dict()) as run:
    with pytest.raises(Begun):
      train.train(config, run)
    run.metrics.write_text('{"step": 1}\n')
  return run


def append(path, text=" "):
  with path.open("a") as file:
    file.write(text)


def fewer(path):
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:-3]))


def other_values(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


CHANGES = {
  "data.source data.jsonl": ("data.jsonl", fewer),
  "data.test_source held_out.jsonl": ("held_out.jsonl", fewer),
  "model.source model.safetensors": ("model/model.safetensors", other_values),
  "model.source config.json": ("model/config.json", append),
  "model.source tokenizer.json": ("model/tokenizer.json", append),
  "distill.teacher model.safetensors": ("teacher/model.safetensors", other_values),
}


def test_a_file_that_was_replaced_under_its_path_stops_the_run_that_resumes(folder):
  config = config_of(folder)
  run = begin(folder, config)
  for field, (name, damage) in CHANGES.items():
    saved = (folder / name).read_bytes()
    damage(folder / name)
    refuse(run, config, rf"(?s)have changed since it began:\n  {field}: .* bytes")
    (folder / name).write_bytes(saved)  # the remedy that the message names
  begin(folder, config)


def refuse(run, config, words):
  with (
    workdir.open_workdir(run.path, config.to_dict()) as opened,
    pytest.raises(ValueError, match=words),
  ):
    train.train(config, opened)


def test_a_sweep_is_held_to_its_files_too(folder):
  fields = {"distill.teacher": "none", "data.buckets": (24,), "sweep.members": ({"seed": 1},)}
  config = config_of(folder, **fields)
  run = begin(folder, config)
  fewer(folder / "data.jsonl")
  refuse(run, config, r"data.source data.jsonl: .* bytes")


def test_a_run_from_before_there_were_fingerprints_resumes_as_it_did(folder):
  config = config_of(folder)
  run = begin(folder, config)
  run.config.write_text(json.dumps(config.to_dict()))
  fewer(folder / "data.jsonl")
  begin(folder, config)


def test_a_run_that_a_check_stopped_leaves_its_workdir_to_the_mended_config(folder):
  config = config_of(folder, **{"train.batch_size": 7, "train.accumulate": 2})
  with (
    pytest.raises(ValueError, match="is no multiple"),
    workdir.open_workdir(folder / "run", config.to_dict()) as run,
  ):
    train.train(config, run)
  begin(folder, config_of(folder))


def test_a_finished_run_says_that_its_base_has_changed(folder, caplog):
  config = config_of(folder)
  run = begin(folder, config)
  inputs.warn_of_changes(run, config, ["model.source", "data.source"])
  assert not caplog.text
  other_values(folder / "model/model.safetensors")
  inputs.warn_of_changes(run, config, ["model.source", "data.source"])
  assert "model.source: " in caplog.text and "has changed since the run in" in caplog.text
  assert "data.source" not in caplog.text


def test_samples_of_other_examples_are_refused_before_training(words):
  def example(text):
    rows = [{"text": text, "label": " positive"}]
    return examples.encode(
      rows, words, prompt="{text}", completion="{label}", max_length=20, append_eos=False
    )

  task = parts.make_task(quickstart.get_config())
  task = dataclasses.replace(task, model=mock.Mock(tokenizer=words))
  kept = task.given(example("a joy") + example("a bore"))
  samples.check(kept, task.given(example("a joy") + example("a bore")))
  for now in (example("a joy"), example("a joy") + example("another")):
    with pytest.raises(ValueError, match="held-out examples are not those that the run began with"):
      samples.check(kept, task.given(now))
