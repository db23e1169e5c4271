"""Runs of two real processes that talk over loopback, started as a user starts them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import device_processes
import numpy as np
import pytest
import tiny_experiment

from lora_jax.io import safetensors
from lora_jax.run.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
STATEMENTS = [
  "each_process_reads_its_own_rows_and_together_they_are_the_batch",
  "a_mesh_that_leaves_devices_of_some_process_unused_is_refused",
  "what_one_mesh_saved_another_restores_bit_for_bit",
  "what_one_process_finds_damaged_all_pass_over_for_the_one_before",
]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, smollm2):
  return tiny_experiment.write(
    tmp_path_factory.mktemp("tiny"),
    smollm2.tokenizer,
    data={"buckets": (24,)},
    train={"steps": 20, "checkpoint_every": 8, "evaluate_every": 10},
    evaluation={"examples": 8, "samples": 2},
  )


def command(*arguments, processes):
  """The command of a run, by itself or as several processes, and its environment."""
  several = ["experiments.launch", f"--processes={processes}", "--"] if processes > 1 else []
  # Or the compiler would take most of the time.
  flags = device_processes.xla_flags("--xla_backend_optimization_level=0")
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  return [sys.executable, "-m", *several, *map(str, arguments)], environment


def run(*arguments, processes, fails=False, **environment):
  line, env = command(*arguments, processes=processes)
  done = subprocess.run(
    line, cwd=ROOT, env=env | environment, capture_output=True, text=True, timeout=600
  )
  assert (done.returncode != 0) == fails, done.stdout + done.stderr
  return done.stdout, done.stderr


def train(config_file, workdir, *arguments, processes, **options):
  return run(
    "experiments.train",
    f"--config={config_file}",
    f"--workdir={workdir}",
    *arguments,
    processes=processes,
    **options,
  )


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
  """The workdir of a run of one process."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  train(config_file, workdir, processes=1)
  return workdir


@pytest.fixture(scope="module")
def together(config_file, tmp_path_factory):
  """The workdir of the same run as two processes, and what they printed."""
  workdir = tmp_path_factory.mktemp("together") / "run"
  return workdir, train(config_file, workdir, processes=2)


def assert_same_run(workdir, other):
  """Losses to 1e-5, and what the adapters make of the model to rounding."""
  for name in ("loss", "validation/loss", "loss_tokens"):
    left, right = (
      [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]
      for folder in (workdir, other)
    )
    assert len(left) == (2 if "/" in name else 20)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
  left, right = (json.loads((folder / "eval.json").read_text()) for folder in (workdir, other))
  for when in ("before", "after"):
    assert left[when]["rows"] == right[when]["rows"] == 8
    assert left[when]["loss"] == pytest.approx(right[when]["loss"], abs=1e-5)
  left, right = (
    safetensors.load_file(folder / "adapter" / "adapter_model.safetensors")
    for folder in (workdir, other)
  )
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_allclose(left[name], right[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(alone, together):
  workdir, _ = together
  assert_same_run(workdir, alone)


@pytest.mark.slow
def test_two_processes_leave_one_run_and_speak_with_one_voice(alone, together):
  workdir, (printed, bars) = together
  assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
  assert printed.count("before: accuracy") == printed.count("after:  accuracy") == 1
  assert "mesh: data 2, fsdp 1, tensor 1" in printed
  told = (workdir / "README.md").read_text()
  assert "python -m experiments.launch --processes=2 -- experiments.train --config=" in told
  assert "coordinator" not in told and "process_id" not in told
  assert "train: 100%" in bars and bars.count("read the data ...") == 1
  # Both wrote their part of the checkpoint.
  parts = {path.name for path in (workdir / "checkpoints" / "20" / "state").glob("ocdbt.process_*")}
  assert parts == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.slow
def test_the_same_command_again_restores_in_both_processes(config_file, together):
  workdir, _ = together
  before = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
  printed, _ = train(config_file, workdir, processes=2)
  assert "restored: step 20 of 20" in printed
  assert (workdir / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def statements(tmp_path_factory):
  folder = tmp_path_factory.mktemp("statements")
  return run(
    "processes_worker",
    folder,
    *STATEMENTS,
    processes=2,
    XLA_FLAGS=device_processes.xla_flags("--xla_force_host_platform_device_count=2"),
    PYTHONPATH=str(pathlib.Path(__file__).parent),
  )


@pytest.mark.parametrize("statement", STATEMENTS)
def test_of_two_processes(statements, statement):
  printed, errors = statements
  assert statement in printed.splitlines(), errors


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_run_with_its_message(config_file, tmp_path):
  _, errors = train(
    config_file, tmp_path / "run", "--config.train.batch_size=7", processes=2, fails=True
  )
  assert "train.batch_size 7 is no multiple of 2 devices on data and fsdp" in errors


def test_flags_that_belong_together_are_asked_for_together(config_file, tmp_path):
  _, errors = train(config_file, tmp_path / "run", "--process_id=0", processes=1, fails=True)
  assert "--coordinator, --num_processes and --process_id are given together" in errors


def test_a_cluster_that_is_not_there_is_missed_by_name(config_file, tmp_path):
  _, errors = train(config_file, tmp_path / "run", "--distributed", processes=1, fails=True)
  assert "--distributed: the environment is not that of a cluster that JAX knows" in errors


@pytest.mark.slow
def test_the_processes_of_a_slurm_job_find_each_other(tmp_path):
  name = STATEMENTS[0]
  line, env = command("processes_worker", tmp_path, name, "--distributed", processes=1)
  job = {
    # JAX makes the port of the job's number.
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "XLA_FLAGS": device_processes.xla_flags("--xla_force_host_platform_device_count=2"),
    "PYTHONPATH": str(pathlib.Path(__file__).parent),
  }
  tasks = [
    subprocess.Popen(
      line,
      cwd=ROOT,
      env=env | job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for n in range(2)
  ]
  printed = [task.communicate(timeout=300)[0] for task in tasks]
  assert [task.returncode for task in tasks] == [0, 0]
  assert name in printed[0].splitlines()
  assert name not in printed[1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 2}, {"data": 1, "tensor": 2}])
def test_a_base_that_is_cut_over_two_processes_has_the_losses_of_one(
  config_file, alone, tmp_path, mesh
):
  sizes = [f"--config.mesh.{name}={size}" for name, size in mesh.items()]
  train(config_file, tmp_path / "run", *sizes, processes=2)
  assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_processes_stop_together_save_and_go_on_to_the_same_end(config_file, tmp_path):
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  steps = "--config.train.steps=1000", "--config.train.checkpoint_every=1000"
  line, env = command(
    "experiments.train", f"--config={config_file}", f"--workdir={stopped}", *steps, processes=2
  )
  metrics = stopped / "metrics.jsonl"
  with subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
      time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
  assert process.returncode == 0
  step = int(re.search(r"stopped by SIGTERM at step (\d+) of 1000; saved in", printed)[1])
  assert (stopped / "checkpoints" / str(step)).is_dir()
  printed, _ = train(config_file, stopped, *steps, processes=2)
  assert f"restored: step {step} of 1000" in printed
  train(config_file, whole, *steps, processes=2)
  adapters = [
    (folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (stopped, whole)
  ]
  assert adapters[0] == adapters[1]


# A file for each process: what two processes print may be woven together within a line.
DEAF = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(pathlib.Path(__file__).parent / f"{os.getpid()}.deaf").touch()
time.sleep(120)
"""


@pytest.mark.slow
def test_a_second_signal_ends_processes_that_do_not_heed_the_first(tmp_path):
  (tmp_path / "deaf.py").write_text(DEAF)
  line, environment = command("deaf", processes=2)
  environment["PYTHONPATH"] = str(tmp_path)
  with subprocess.Popen(line, cwd=ROOT, env=environment) as launch:
    while launch.poll() is None and len(list(tmp_path.glob("*.deaf"))) < 2:
      time.sleep(0.1)
    launch.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert launch.poll() is None
    launch.send_signal(signal.SIGTERM)
    assert launch.wait(timeout=30) == 128 + signal.SIGKILL
