"""A config's sweep, on a tiny Llama: what every member is, against a run of its own."""

import contextlib
import io
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny_experiment
from main_programs import imported

from experiments import parts, planning, sweep_config
from lora_jax import sharding
from lora_jax.io import safetensors
from lora_jax.run import workdir
from lora_jax.run.metrics import read_metrics
from lora_jax.train import loop
from lora_jax.train.checkpoint import Checkpoints

train = imported("experiments.train")

MEMBERS = (
  {"adapter.rank": 2, "adapter.alpha": 4.0, "optimizer.peak_learning_rate": 5e-3, "seed": 3},
  {"adapter.rank": 8, "adapter.alpha": 12.0, "train.steps": 4},
  {"adapter.rank": 4, "optimizer.peak_learning_rate": 1e30},
)
DIVERGES = 2


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, smollm2):
  return tiny_experiment.write(
    tmp_path_factory.mktemp("tiny"),
    smollm2.tokenizer,
    data={"buckets": (16, 24)},
    evaluation={"samples": 0},
    train={"evaluate_every": 3},
    # Adam divides rounding by the size of a gradient, and some gradients are almost zero.
    optimizer={"eps": 1e-4},
  )


@pytest.fixture
def config(config_file):
  config = runpy.run_path(str(config_file))["get_config"]()
  config.sweep.members = MEMBERS
  return config


def run(program, config, folder):
  with workdir.open_workdir(folder, config.to_dict()) as opened:
    program.train(config, opened)
  return opened


@pytest.fixture(scope="module")
def done(config_file, tmp_path_factory):
  """The workdir of a sweep that has come to its end, what it told of on the way, and the threads
  that put the batches of its training on the devices."""
  config = runpy.run_path(str(config_file))["get_config"]()
  config.sweep.members = MEMBERS
  put_rows, threads = sharding.put_rows, set()

  def noted(batch, mesh, axis=0):
    if axis == 1:  # of training, where the members come before the rows
      threads.add(threading.current_thread())
    return put_rows(batch, mesh, axis)

  told = io.StringIO()
  with (
    contextlib.redirect_stderr(told),
    contextlib.redirect_stdout(told),
    pytest.MonkeyPatch.context() as patched,
  ):
    patched.setattr(sharding, "put_rows", noted)
    finished = run(train, config, tmp_path_factory.mktemp("sweep"))
  return finished, told.getvalue(), threads


@pytest.fixture(scope="module")
def finished(done):
  return done[0]


def tensors_of(run):
  return safetensors.load_file(run.adapter / "adapter_model.safetensors")


def table_of(run):
  return json.loads((run.path / "results.json").read_text())["members"]


@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_member_leaves_what_a_run_of_its_own_does(finished, config, tmp_path, n):
  mine = workdir.Workdir(finished.path / "members" / str(n))
  alone_config = sweep_config.member_configs(config, sweep_config.list_members(config))[n]
  assert workdir.read_config(mine.path) == json.loads(json.dumps(alone_config.to_dict()))
  alone = run(train, alone_config, tmp_path / "alone")
  theirs = {path.name for path in alone.path.iterdir()}
  left_out = {"checkpoints", "lock"}
  assert {path.name for path in mine.path.iterdir()} == theirs - left_out
  for each in (mine, alone):
    assert json.loads((each.adapter / "adapter_config.json").read_text())["r"] == (2, 8)[n]
  found, wanted = (tensors_of(each) for each in (mine, alone))
  assert found.keys() == wanted.keys()
  for name in wanted:
    assert found[name].shape == wanted[name].shape
    np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, err_msg=name)
  lines, alone_lines = read_metrics(mine.metrics), read_metrics(alone.metrics)
  assert [list(line) for line in lines] == [list(line) for line in alone_lines]
  assert [line["step"] for line in lines if "validation/loss" in line] == ([3, 6], [3])[n]
  for mine_too, line in zip(lines, alone_lines, strict=True):
    for name in line.keys() - {"tokens_per_second"}:
      assert mine_too[name] == pytest.approx(line[name], rel=1e-4), name
  scores, alone_scores = (json.loads(each.evaluation.read_text()) for each in (mine, alone))
  for when in ("before", "after"):
    assert scores[when] == pytest.approx(alone_scores[when], rel=1e-4)


def test_the_table_has_a_row_for_each_member_and_says_which_diverged(finished):
  rows = table_of(finished)
  assert [row["member"] for row in rows] == [0, 1, 2]
  for fields, row in zip(MEMBERS, rows, strict=True):
    assert fields.items() <= row.items()
  assert [(row["seed"], row["train.steps"]) for row in rows] == [(3, 6), (0, 4), (0, 6)]
  assert [row["updates"] for row in rows[:DIVERGES]] == [6, 4]
  step = rows[DIVERGES]["updates"] + 1
  assert rows[DIVERGES]["outcome"] == f"diverged at step {step}"
  assert "loss" not in rows[DIVERGES]
  scores = json.loads((finished.path / "members" / "1" / "eval.json").read_text())
  assert rows[1]["loss"] == scores["after"]["loss"]
  page = (finished.path / "results.md").read_text()
  lines = [line for line in page.splitlines() if line.startswith("| ")]
  assert re.match(
    r"\| member \| rank \| alpha \| peak_learning_rate \| seed \| steps \| updates \| outcome \|",
    lines[0],
  )
  assert len(lines) == 2 + len(MEMBERS)
  best = min(rows[:DIVERGES], key=lambda row: row["loss"])["member"]
  assert f"The lowest loss is that of `members/{best}`" in page
  assert finished.plot.read_bytes().startswith(b"\x89PNG")
  assert {path.name for path in (finished.path / "members").iterdir()} == {"0", "1"}


def test_batches_are_put_on_the_devices_ahead_by_another_thread(done):
  *_, threads = done
  assert threads and threading.main_thread() not in threads


def test_all_that_takes_long_is_told_of_member_by_member(done):
  finished, told, _ = done
  stages = ["read the data", "make the examples", "start the adapters", "answer"]
  stages += [f"{stage} member {n}" for stage in ("answer as", "save") for n in range(DIVERGES)]
  bars = ["load: ", "evaluate: ", "train: "]
  bars += [f"{stage} member {n}: " for stage in ("evaluate", "validate") for n in range(DIVERGES)]
  for words in [f"{stage} ... " for stage in stages] + bars:
    assert words in told, words
  assert told.splitlines()[-1].startswith(f"everything is in {finished.path}: results.md")


def test_the_log_has_every_member_as_long_as_it_trains(finished):
  lines = read_metrics(finished.metrics)
  steps = {n: [x["step"] for x in lines if f"loss/{n}" in x] for n in range(len(MEMBERS))}
  assert steps[0] == [1, 2, 3, 4, 5, 6]
  assert steps[1] == [1, 2, 3, 4]
  assert steps[DIVERGES] == list(range(1, table_of(finished)[DIVERGES]["updates"] + 1))


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_bit_for_bit(finished, config, tmp_path, monkeypatch):
  save = Checkpoints.save

  def save_and_be_stopped(self, state, data_state):
    save(self, state, data_state)
    if int(state.step) == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(Checkpoints, "save", save_and_be_stopped)
  with pytest.raises(loop.Interrupted, match="stopped by SIGTERM at step 3 of 6"):
    run(train, config, tmp_path / "sweep")
  again = run(train, config, tmp_path / "sweep")
  assert table_of(again) == table_of(finished)
  for n in range(DIVERGES):
    file = f"members/{n}/adapter/adapter_model.safetensors"
    assert (again.path / file).read_bytes() == (finished.path / file).read_bytes()


@pytest.mark.slow
def test_the_command_on_four_devices_trains_the_same_members(finished, config_file, tmp_path):
  command = [
    *(sys.executable, "-m", "experiments.train", f"--config={config_file}"),
    *(f"--workdir={tmp_path / 'sweep'}", f"--config.sweep.members={MEMBERS}"),
    *("--config.mesh.data=2", "--config.mesh.tensor=2"),
  ]
  done = subprocess.run(
    command,
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=900,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
  )
  assert done.returncode == 0, done.stderr
  assert "mesh: data 2, fsdp 1, tensor 2" in done.stdout
  told = (tmp_path / "sweep/members/0/README.md").read_text()
  assert told.count("--config.sweep.members=") == told.count("--config.sweep.members=()") == 1
  for n in range(DIVERGES):
    place = pathlib.Path("members", str(n))
    found, wanted = (
      tensors_of(workdir.Workdir(path / place)) for path in (tmp_path / "sweep", finished.path)
    )
    for name in wanted:
      np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_sweep_of_which_no_member_is_left_ends_with_the_reason(config, tmp_path):
  config.sweep.members = (
    {"optimizer.peak_learning_rate": 1e30},
    {"optimizer.peak_learning_rate": 1e31},
  )
  words = r"step \d: the loss or the gradient of the last member that was left is not finite"
  with pytest.raises(FloatingPointError, match=words):
    run(train, config, tmp_path / "run")


def test_the_programs_for_one_run_say_what_to_do_with_a_sweep(finished, config):
  with pytest.raises(ValueError, match=r"holds a sweep.*members/0"):
    parts.open_run(str(finished.path))
  opened, member = parts.open_run(str(finished.path / "members" / "1"))
  assert opened.adapter.exists() and member.adapter.rank == 8


def test_a_plan_is_of_the_largest_member_as_often_as_there_are_members(config, config_file):
  largest, count = planning.largest_member(config)
  assert (largest.adapter.rank, count) == (8, len(MEMBERS)) and not sweep_config.is_sweep(largest)
  alone = runpy.run_path(str(config_file))["get_config"]()
  assert planning.largest_member(alone) == (alone, 1)


def test_every_member_is_trained_with_every_point_of_the_grid(config):
  config.sweep.members = ({"seed": 0}, {"seed": 1, "adapter.alpha": 2.0})
  config.sweep.grid = (("adapter.rank", (2, 4)), ("optimizer.peak_learning_rate", [1e-3]))
  fields = sweep_config.list_members(config)
  assert fields == [
    {"seed": 0, "adapter.rank": 2, "optimizer.peak_learning_rate": 1e-3},
    {"seed": 0, "adapter.rank": 4, "optimizer.peak_learning_rate": 1e-3},
    {"seed": 1, "adapter.alpha": 2.0, "adapter.rank": 2, "optimizer.peak_learning_rate": 1e-3},
    {"seed": 1, "adapter.alpha": 2.0, "adapter.rank": 4, "optimizer.peak_learning_rate": 1e-3},
  ]
  configs = sweep_config.member_configs(config, fields)
  assert [each.adapter.rank for each in configs] == [2, 4, 2, 4]
  assert [each.adapter.alpha for each in configs] == [8.0, 8.0, 2.0, 2.0]
  assert not any(map(sweep_config.is_sweep, configs)) and sweep_config.is_sweep(config)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"sweep.grid": (("seed", ()),)}, "sweep.grid 'seed' has no values"),
    ({"sweep.grid": (("seed", (1, 1)),)}, "'seed' is there twice, or has one value twice"),
    ({"sweep.grid": (("seed", (1, 2)),)}, "sweep.members and sweep.grid both set seed"),
    ({"sweep.members": ({"seed": 1}, {"seed": 1})}, "two members have the same fields"),
    ({"sweep.members": ({"adapter.ranks": 1},)}, "cannot differ in 'adapter.ranks'.*adapter.rank,"),
    ({"sweep.members": ({"model.dtype": "bfloat16"},)}, "cannot differ in 'model.dtype'"),
    ({"sweep.members": ({"adapter.rank": "4"},)}, "member 0, .*rank"),
    ({"sweep.members": ({"adapter.rank": 0},)}, "adapter.rank is 0; it must be 1 or more"),
    ({"sweep.members": ({"adapter.rank": 64},)}, "rank 64 exceeds min.*use rank <= 16"),
    (
      {"sweep.members": ({"optimizer.peak_learning_rate": -1.0},)},
      "optimizer.peak_learning_rate is -1.0; it must be above 0",
    ),
    ({"sweep.members": ({"train.steps": 1},)}, "warm-up"),
  ],
)
def test_a_bad_sweep_is_refused_with_its_reason_before_anything_is_computed(
  config, tmp_path, fields, words
):
  config.update_from_flattened_dict(fields)
  with workdir.open_workdir(tmp_path / "run", config.to_dict()) as opened:
    with pytest.raises(ValueError, match=f"(?s){words}"):
      train.train(config, opened)
    assert not opened.metrics.exists() and not opened.evaluation.exists()


@pytest.mark.parametrize(
  ("method", "fields", "words"),
  [
    ("pissa", {"seed": 1}, "a base of its own"),
    ("loftq", {"seed": 1}, "LoftQ makes a base of its own"),
    ("dora", {"adapter.rank": 2}, "only LoRA can be masked"),
    ("vera", {"adapter.alpha": 2.0}, "vera has no setting alpha"),
    ("adalora", {"train.steps": 4}, "AdaLoRA's budget of ranks follows train.steps"),
  ],
)
def test_a_method_that_cannot_be_in_a_sweep_is_refused_with_the_reason(
  config_file, tmp_path, method, fields, words
):
  config = runpy.run_path(str(config_file))["get_config"](f"method={method}")
  config.sweep.members = ({"seed": 0}, fields)
  with workdir.open_workdir(tmp_path / "run", config.to_dict()) as opened:
    with pytest.raises(ValueError, match=f"(?s){words}"):
      train.train(config, opened)
    assert not opened.metrics.exists()
