import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import assert_same_run, log_lines

from lora_jax.run.metrics import read_metrics
from lora_jax.train.loop import Interrupted, interruptible
from lora_jax.tree import flatten

SCRIPT = pathlib.Path(tiny_run.__file__)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """A whole run: (its state, the lines of its log without what depends on the clock)."""
  folder = tmp_path_factory.mktemp("uninterrupted")
  state, _ = tiny_run.run(folder)
  return state, log_lines(folder)


class BatchesThatAct(tiny_run.CountingBatches):
  """Calls `act(batch)` on the batch of one position."""

  def __init__(self, position, act):
    super().__init__(tiny_run.CONFIG["seed"])
    self.when, self.act = position, act

  def __next__(self):
    batch = super().__next__()
    if self.position == self.when:
      self.act(batch)
    return batch


def poison(batch):
  batch["weights"][0, 0] = np.nan


def test_a_run_logs_each_step_once_with_the_rate_the_optimiser_used(uninterrupted):
  state, lines = uninterrupted
  assert int(state.step) == 40
  assert [line["step"] for line in lines] == list(range(1, 41))
  assert list(lines[0]) == ["step", "loss", "grad_norm", "learning_rate", "loss_tokens"]
  rate = tiny_run.schedule(**tiny_run.RATES)
  np.testing.assert_allclose([line["learning_rate"] for line in lines], rate(jnp.arange(40)))
  assert [line["step"] for line in lines if "validation/loss" in line] == [10, 20, 30, 40]


def test_lines_are_logged_every_so_often_and_at_the_end(tmp_path):
  tiny_run.run(tmp_path, steps=11, log_every=4, evaluate_every=0)
  assert [line["step"] for line in log_lines(tmp_path)] == [4, 8, 11]


def test_the_base_keeps_its_bits(tmp_path):
  _, frozen = tiny_run.run(tmp_path, steps=3)
  start = flatten(tiny_run.make_weights())
  for path, leaf in flatten(frozen).items():
    assert np.asarray(leaf).tobytes() == np.asarray(start[path]).tobytes(), path


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path, uninterrupted):
  tiny_run.run(tmp_path)
  state, _ = tiny_run.run(tmp_path)
  assert_same_run(state, tmp_path, uninterrupted)


def test_a_run_stopped_by_an_error_between_checkpoints_resumes_bit_for_bit(tmp_path, uninterrupted):
  def fail(batch):
    raise RuntimeError("the disk with the data is gone")

  with pytest.raises(RuntimeError, match="disk"):
    tiny_run.run(tmp_path, batches=BatchesThatAct(18, fail))
  assert [line["step"] for line in log_lines(tmp_path)][-1] > 15  # past the checkpoint
  state, _ = tiny_run.run(tmp_path)
  assert_same_run(state, tmp_path, uninterrupted)


def kill_at_random_and_finish(folder, uninterrupted):
  process = subprocess.Popen([sys.executable, SCRIPT, folder, "0.02"], stderr=subprocess.DEVNULL)
  try:
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
      time.sleep(0.01)
    time.sleep(random.uniform(0.0, 1.0))
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  state, _ = tiny_run.run(folder)
  assert_same_run(state, folder, uninterrupted)


def test_a_run_that_is_killed_resumes_bit_for_bit(tmp_path, uninterrupted):
  kill_at_random_and_finish(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(12))
def test_a_run_that_is_killed_at_many_times_resumes_bit_for_bit(tmp_path, uninterrupted, attempt):
  kill_at_random_and_finish(tmp_path / "run", uninterrupted)


def test_a_run_whose_latest_checkpoint_is_damaged_resumes_from_the_one_before(
  tmp_path, uninterrupted
):
  tiny_run.run(tmp_path, steps=20)
  (tmp_path / "checkpoints" / "20" / "record" / "metadata").write_text("{")
  state, _ = tiny_run.run(tmp_path)
  assert_same_run(state, tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_then_leaves_and_the_run_resumes(tmp_path, uninterrupted, number):
  handler = signal.getsignal(number)
  interrupt = BatchesThatAct(13, lambda batch: os.kill(os.getpid(), number))
  words = rf"stopped by {number.name} at step 13 of 40; saved in .*checkpoints/13"
  with pytest.raises(Interrupted, match=words):
    tiny_run.run(tmp_path, batches=interrupt)
  assert signal.getsignal(number) == handler
  assert log_lines(tmp_path)[-1]["step"] == 13
  state, _ = tiny_run.run(tmp_path)
  assert_same_run(state, tmp_path, uninterrupted)


def test_a_second_ctrl_c_is_not_held_back(tmp_path):
  def interrupt_twice(batch):
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.1)  # signals that are pending together are heard once

  with pytest.raises(KeyboardInterrupt):
    tiny_run.run(tmp_path, batches=BatchesThatAct(3, interrupt_twice))


def test_a_loop_outside_the_main_thread_runs_too(tmp_path):
  thread = threading.Thread(target=tiny_run.run, args=(tmp_path,), kwargs={"steps": 3})
  thread.start()
  thread.join()
  assert log_lines(tmp_path)[-1]["step"] == 3


@pytest.mark.parametrize("step", [13, 15])  # between two checkpoints, and where one is due
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, step):
  words = rf"step {step}: the loss is nan .* the last good checkpoint is .*checkpoints/10; "
  with pytest.raises(FloatingPointError, match=words):
    tiny_run.run(tmp_path, batches=BatchesThatAct(step, poison))
  assert log_lines(tmp_path)[-1]["step"] == step - 1
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "5"]


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_says_so(tmp_path):
  with pytest.raises(FloatingPointError, match="no checkpoint was saved before it"):
    tiny_run.run(tmp_path, batches=BatchesThatAct(2, poison))


def test_data_that_end_too_early_are_named(tmp_path):
  def end(batch):
    raise StopIteration

  with pytest.raises(ValueError, match="the data ended before step 7 of 40"):
    tiny_run.run(tmp_path, batches=BatchesThatAct(7, end))


@pytest.mark.parametrize("option", ["log_every", "checkpoint_every"])
def test_an_interval_of_no_steps_is_refused(tmp_path, option):
  with pytest.raises(ValueError, match=f"{option} is|{option} 0"):
    tiny_run.run(tmp_path, **{option: 0})


def test_the_meter_counts_neither_evaluation_nor_saving(tmp_path, monkeypatch):
  slow = tiny_run.evaluate

  def evaluate(*args):
    time.sleep(0.8)
    return slow(*args)

  monkeypatch.setattr(tiny_run, "evaluate", evaluate)
  tiny_run.run(tmp_path, seconds=0.02, steps=6, evaluate_every=2)
  rates = [line["tokens_per_second"] for line in read_metrics(tmp_path / "metrics.jsonl")[2:]]
  tokens = tiny_run.BATCH * tiny_run.LENGTH
  assert min(rates) > tokens / 0.7  # less than the pause, more than a step of 0.02 s


def test_a_signal_inside_of_a_function_in_c_ends_a_run_as_any_other():
  with pytest.raises(Interrupted, match="stopped at once"), interruptible():
    raise SystemError("returned a result with an exception set") from KeyboardInterrupt()
  with pytest.raises(SystemError, match="of its own"), interruptible():
    raise SystemError("of its own")
