"""A disk that is full, a limit on files, a folder that nobody may write to: real ones all."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from tiny_run import assert_same_run, log_lines

from lora_jax.run.metrics import MetricsWriter, read_metrics
from lora_jax.run.workdir import write_json
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.step import State

ROOM = r"If the disk is full make room; the same command then goes on from the last (whole )?check"


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 200 KB, and a function that gives it more room."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]
  if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("needs a user who may mount a tmpfs, as root may")
  yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
  subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def files_of_at_most(size):
  """No file of this process can grow beyond so many bytes, as under a quota."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("uninterrupted")
  state, _ = tiny_run.run(folder)
  return state, log_lines(folder)


def test_a_run_that_fills_the_disk_says_so_and_with_more_room_ends_as_if_it_never_had(
  small_disk, uninterrupted
):
  disk, enlarge = small_disk
  with pytest.raises(OSError, match=rf"{disk}/run/.* cannot be written \(.*No space left.*{ROOM}"):
    tiny_run.run(disk / "run")
  lines = read_metrics(disk / "run" / "metrics.jsonl")
  assert 5 <= len(lines) < 40  # it had come past a checkpoint
  enlarge()
  state, _ = tiny_run.run(disk / "run")
  assert_same_run(state, disk / "run", uninterrupted)


def noise(step):
  return State(jnp.int32(step), {"a": jax.random.normal(jax.random.key(step), (64, 64))}, ())


def test_a_checkpoint_that_does_not_fit_is_named_and_the_one_before_it_stays(tmp_path):
  words = rf"{tmp_path}: the checkpoint of step 2 cannot be written \(.*File too large.*/1 is whole"
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    checkpoints.save(noise(1), {})
    checkpoints.wait()
    with files_of_at_most(8_000), pytest.raises(OSError, match=f"{words}. {ROOM}"):
      checkpoints.save(noise(2), {})
      checkpoints.wait()
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    assert int(checkpoints.restore(noise(0)).state.step) == 1
    checkpoints.save(noise(2), {})
    checkpoints.wait()
    assert int(checkpoints.restore(noise(0)).state.step) == 2


def test_the_words_of_a_full_disk_stay_where_the_message_is_long(tmp_path, monkeypatch):
  """As the array format writes them: words in the middle, the number of the error at the end."""
  details = "No space left on device [" + "spec " * 200 + "] [os_error_code='28']"
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    manager = "orbax.checkpoint.CheckpointManager.save"
    monkeypatch.setattr(manager, mock.Mock(side_effect=ValueError(f"{'path/' * 40} {details}")))
    with pytest.raises(OSError, match=rf"cannot be written \(No space left on device: .*{ROOM}"):
      checkpoints.save(noise(1), {})


def test_the_loop_stops_at_the_first_step_after_a_checkpoint_that_failed(tmp_path):
  """And not only when the next one is due, with all the work in between lost."""
  folder = tmp_path / "run"
  with files_of_at_most(1_500), pytest.raises(OSError, match="the checkpoint of step 2 cannot be"):
    tiny_run.run(folder, seconds=0.1, checkpoint_every=2, evaluate_every=0)
  assert len(read_metrics(folder / "metrics.jsonl")) < 10


def test_a_log_that_cannot_grow_is_named_and_keeps_what_it_has(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with (
    pytest.raises(OSError, match=rf"{path}: cannot be written \(File too large\). {ROOM}"),
    files_of_at_most(1_000),
    MetricsWriter(path, tmp_path / "tensorboard", step=0) as writer,
  ):
    for step in range(1, 100):
      writer.write(step, {"loss": 1 / step, "grad_norm": 1 / 3, "learning_rate": 1 / 7})
  steps = [line["step"] for line in read_metrics(path)]
  assert len(steps) > 5 and steps == list(range(1, len(steps) + 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_event_file_that_cannot_grow_is_named(tmp_path):
  with (
    pytest.raises(OSError, match=rf"tensorboard: cannot be written \(File too large\). {ROOM}"),
    files_of_at_most(1_000),
    MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0) as writer,
  ):
    for step in range(1, 100):
      writer.write(step, {"loss": 1})


def test_a_json_file_that_does_not_fit_leaves_the_one_before_it_and_nothing_else(tmp_path):
  write_json(tmp_path / "eval.json", {"loss": 1})
  before = (tmp_path / "eval.json").read_bytes()
  words = rf"eval\.json: cannot be written \(File too large\). {ROOM}"
  with files_of_at_most(100), pytest.raises(OSError, match=words):
    write_json(tmp_path / "eval.json", list(range(100)))
  assert (tmp_path / "eval.json").read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


OPEN = """
import sys
from lora_jax.run.workdir import open_workdir
try:
  with open_workdir(sys.argv[1], {}):
    print("open")
except OSError as error:
  print(error)
"""


@pytest.mark.parametrize("run", ["", "run"])
def test_a_folder_that_may_not_be_written_to_is_refused_with_its_name(tmp_path, run):
  command = [sys.executable, "-c", OPEN, str(tmp_path / run)]
  if os.geteuid() == 0:  # who may write everywhere, unless this is taken away
    if shutil.which("setpriv") is None:
      pytest.skip("root may write everywhere, and there is no setpriv to change that")
    command = ["setpriv", "--bounding-set=-dac_override", *command]
  tmp_path.chmod(0o555)
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  finally:
    tmp_path.chmod(0o755)
  wanted = f"{tmp_path / run}: cannot write here (Permission denied); choose another workdir\n"
  assert done.stdout == wanted, done.stderr
  assert not list(tmp_path.iterdir())
