import json
import os
import subprocess
import sys

import pytest

from lora_jax.run.workdir import (
  fingerprint,
  open_workdir,
  read_config,
  read_inputs,
  settle_inputs,
  write_json,
)

CONFIG = {"model": "tiny", "lora": {"rank": 8, "targets": ("query", "value")}, "steps": 10}


def refuse(error, words, path, config=CONFIG):
  """Asserts that the folder cannot be opened, with these words; returns the whole message."""
  with pytest.raises(error, match=words) as caught, open_workdir(path, config):
    pass
  return str(caught.value)


def test_the_folder_is_made_and_its_config_written(tmp_path):
  with open_workdir(tmp_path / "runs" / "a", CONFIG) as workdir:
    assert json.loads(workdir.config.read_text())["lora"]["rank"] == 8
    assert workdir.metrics.parent == workdir.path
  assert read_config(tmp_path / "runs" / "a")["steps"] == 10


def test_the_same_config_opens_the_folder_again(tmp_path):
  for _ in range(2):
    with open_workdir(tmp_path, CONFIG):
      pass


def test_another_config_is_refused_with_every_field_that_differs(tmp_path):
  with open_workdir(tmp_path, CONFIG) as workdir:
    workdir.metrics.write_text('{"step": 1}\n')
    before = workdir.config.read_bytes()
  other = {"model": "tiny", "lora": {"rank": 4, "alpha": 16.0}, "steps": 20}
  message = refuse(ValueError, "different config", tmp_path, other)
  assert message.splitlines() == [
    f"{tmp_path}: holds a run with a different config:",
    "  lora.alpha: absent there, 16.0 now",
    "  lora.rank: 8 there, 4 now",
    "  lora.targets: ['query', 'value'] there, absent now",
    "  steps: 10 there, 20 now",
    "Use another workdir, or delete this one",
  ]
  assert workdir.config.read_bytes() == before


WORK = {
  "a line of metrics": lambda run: run.metrics.write_text('{"step": 1}\n'),
  "a checkpoint": lambda run: (run.checkpoints / "3").mkdir(parents=True),
  "a damaged checkpoint": lambda run: (run.checkpoints / "damaged-3").mkdir(parents=True),
  "an adapter": lambda run: run.adapter.mkdir(),
  "a model": lambda run: (run.path / "model").mkdir(),
  "members": lambda run: (run.path / "members").mkdir(),
}
NO_WORK = {
  "nothing": lambda run: None,
  "an empty log": lambda run: run.metrics.touch(),
  "half a line": lambda run: run.metrics.write_text('{"step":'),
  "what it was before": lambda run: run.evaluation.write_text("{}"),
  "a page": lambda run: run.readme.write_text("Not begun"),
  "half a checkpoint": lambda run: (run.checkpoints / "3.orbax-checkpoint-tmp").mkdir(parents=True),
  "events": lambda run: run.tensorboard.mkdir(),
}
OTHER = {"model": "tiny", "steps": 1}


@pytest.mark.parametrize("leave", WORK.values(), ids=WORK)
def test_a_folder_is_a_run_s_own_from_the_first_thing_to_lose(leave, tmp_path):
  with open_workdir(tmp_path, CONFIG) as run:
    leave(run)
  refuse(ValueError, "different config", tmp_path, OTHER)
  with open_workdir(tmp_path, CONFIG):  # the same command goes on
    pass


@pytest.mark.parametrize("leave", NO_WORK.values(), ids=NO_WORK)
def test_a_run_that_came_to_nothing_leaves_its_folder_to_the_mended_command(leave, tmp_path):
  with open_workdir(tmp_path, CONFIG) as run:
    leave(run)
  with open_workdir(tmp_path, CONFIG):  # kept for the same command
    kept = {path.name for path in tmp_path.iterdir()}
  with open_workdir(tmp_path, OTHER):
    assert read_config(tmp_path) == OTHER
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock"} <= kept


def test_a_run_that_a_check_stops_leaves_no_config(tmp_path):
  with pytest.raises(ValueError, match="batch"), open_workdir(tmp_path / "run", CONFIG):
    raise ValueError("batch_size 7 is no multiple")
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
  with open_workdir(tmp_path / "run", OTHER):
    pass


def test_what_is_of_no_run_is_not_written_over(tmp_path):
  (tmp_path / "README.md").write_text("mine")
  refuse(ValueError, r"holds README\.md, which no run wrote", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(("path", "words"), [("", "is empty"), ("/", "the root"), ("a/../", None)])
def test_a_workdir_is_a_path_as_any_other(path, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  if words:
    refuse(ValueError, words, path)
  else:
    with open_workdir(path, CONFIG) as run:
      assert run.path == tmp_path


INPUTS = {"data.source": {"a.csv": "3 bytes, sha256 aa"}, "model.source": {"x": "1", "y": "2"}}
CHANGED = {"data.source": {"a.csv": "4 bytes, sha256 bb"}, "model.source": {"x": "1", "z": "2"}}


def settle(path, inputs, work=False):
  with open_workdir(path, CONFIG) as run:
    settle_inputs(run, inputs)
    if work:
      run.metrics.write_text('{"step": 1}\n')


def test_what_a_run_reads_is_held_to_what_it_began_with(tmp_path):
  settle(tmp_path, INPUTS)
  (tmp_path / "eval.json").write_text("of the data that were there")
  settle(tmp_path, CHANGED)  # nothing is lost yet
  assert not (tmp_path / "eval.json").exists()
  settle(tmp_path, INPUTS, work=True)
  settle(tmp_path, INPUTS)
  assert read_config(tmp_path) == json.loads(json.dumps(CONFIG))
  assert read_inputs(tmp_path) == INPUTS
  with pytest.raises(ValueError, match="the files that the run reads have changed") as caught:
    settle(tmp_path, CHANGED)
  assert str(caught.value).splitlines() == [
    f"{tmp_path}: the files that the run reads have changed since it began:",
    "  data.source a.csv: 3 bytes, sha256 aa there, 4 bytes, sha256 bb now",
    "  model.source y: 2 there, absent now",
    "  model.source z: absent there, 2 now",
    "Restore them, or use another workdir",
  ]


def test_a_run_from_before_there_were_fingerprints_goes_on(tmp_path):
  with open_workdir(tmp_path, CONFIG) as run:
    run.metrics.write_text('{"step": 1}\n')
  for inputs in (INPUTS, CHANGED):
    settle(tmp_path, inputs)
  assert read_inputs(tmp_path) == {}


def test_a_run_without_its_config_is_refused(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  refuse(ValueError, "holds a run but no config", tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_config_cut_off_on_disk_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"model": ')
  refuse(ValueError, r"config\.json: not valid JSON", tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
    read_config(tmp_path)


def test_a_config_that_json_cannot_hold_is_refused_before_anything_is_made(tmp_path):
  refuse(TypeError, "cannot be written as JSON", tmp_path / "a", {"f": len})
  assert not (tmp_path / "a").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  refuse(OSError, r"file/run: cannot write here \(Not a directory\)", tmp_path / "file" / "run")


def test_what_a_killed_run_left_half_written_is_gone_when_the_folder_is_opened_again(tmp_path):
  with open_workdir(tmp_path, CONFIG) as workdir:
    (tmp_path / ".adapter.4711").mkdir()
    (tmp_path / ".adapter.4711" / "adapter_config.json").write_text("{")
    (tmp_path / "members/3/.adapter.4711").mkdir(parents=True)
    (tmp_path / "eval.json.tmp").write_text("{")
    workdir.adapter.mkdir()
    workdir.evaluation.write_text("{}")
    (tmp_path / "notes.tmp").write_text("not the run's own")
  with open_workdir(tmp_path, CONFIG):
    names = {path.name for path in tmp_path.iterdir()}
  assert names == {"adapter", "config.json", "eval.json", "lock", "members", "notes.tmp"}
  assert not any((tmp_path / "members/3").iterdir())


HOLDER = """
import sys, time
from lora_jax.run.workdir import open_workdir
with open_workdir(sys.argv[1], {"model": "tiny"}):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_a_killed_one_lets_it_go(tmp_path):
  config = {"model": "tiny"}
  holder = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  try:
    assert holder.stdout.readline() == "held\n"
    refuse(ValueError, rf"another run is at work here \(process {holder.pid}\)", tmp_path, config)
  finally:
    holder.kill()
    holder.communicate()
  with open_workdir(tmp_path, config) as workdir:
    assert workdir.lock.read_text() == f"{os.getpid()}\n"


def test_a_fingerprint_tells_configs_apart_and_knows_no_order():
  assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
  assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_json_file_is_replaced_whole(tmp_path):
  path = tmp_path / "eval.json"
  write_json(path, {"accuracy": 0.5})
  with pytest.raises(TypeError):
    write_json(path, {"accuracy": object()})
  assert json.loads(path.read_text()) == {"accuracy": 0.5}
