"""Real runs of `experiments.train`, killed at random moments, end as one that never was.

A run waits where `tests/paced_run.py` is told to, and so is alive whenever it is killed, however
slow the machine is.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest
import tiny_encoder
import tiny_experiment
import tiny_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_jax.io import pretrained
from lora_jax.run.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 36
AHEAD = 2  # steps that a run may make while it is watched
# In the place of arguments: a classification of pairs by a BERT, one of pictures, and boxes.
ENCODER, IMAGES, BOXES = "encoder", "images", "boxes"
ENDLESS = 2e9  # a limit that lets a run come to its end


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A function that starts, or starts again, the run of a workdir and returns its process."""
  folder = tmp_path_factory.mktemp("tiny")
  config = tiny_experiment.write(
    folder,
    pretrained.inspect(pretrained.DEFAULT).tokenizer,
    data={"buckets": (24,)},
    train={"steps": STEPS, "checkpoint_every": 3, "evaluate_every": 12},
  )
  for name in (ENCODER, IMAGES, BOXES):
    (folder / name).mkdir()
  tiny_encoder.write(folder / "encoder")
  train = {"steps": STEPS, "log_every": 1, "checkpoint_every": 3, "evaluate_every": 12}
  train = {f"train.{name}": x for name, x in train.items()}
  files = {
    ENCODER: tiny_encoder.write_config(folder / "encoder", "classification", train),
    IMAGES: tiny_pictures.write_classes(folder / IMAGES, train),
    BOXES: tiny_pictures.write_boxes(folder / BOXES, train),
  }
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }

  def start(workdir, arguments, limit=ENDLESS):
    limits(workdir).write_text(str(limit))
    file = str(files.get(arguments, f"{config}:{arguments}"))
    with open(workdir.with_suffix(".log"), "a") as log:
      return subprocess.Popen(
        [
          *(sys.executable, "tests/paced_run.py", str(limits(workdir))),
          *(f"--config={file}", f"--workdir={workdir}"),
        ],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
      )

  return start


def limits(workdir):
  """The file that says how far a run may go."""
  return workdir.with_suffix(".limit")


def finish(process, workdir):
  assert process.wait(timeout=600) == 0, workdir.with_suffix(".log").read_text()
  return outcome(workdir)


def outcome(workdir):
  """All that a run comes to: what must not depend on whether it was killed."""
  lines = read_metrics(workdir / "metrics.jsonl")
  steps = sorted(path.name for path in (workdir / "checkpoints").iterdir())
  latest = workdir / "checkpoints" / str(STEPS)
  record = json.loads((latest / "record" / "metadata").read_text())
  arrays = ocp.StandardCheckpointer().restore(latest / "state")
  events = EventAccumulator(str(workdir / "tensorboard"))
  events.Reload()
  adapter = workdir / "adapter"
  return {
    "files": sorted(path.name for path in workdir.iterdir()),
    "losses": [{k: x for k, x in line.items() if k != "tokens_per_second"} for line in lines],
    "checkpoints": steps,  # no half one is left, and none was found damaged
    "position of the data": record["data_state"],
    "state": {path: array.tobytes() for path, array in arrays.items()},
    "events": [(event.step, event.value) for event in events.Scalars("loss")],
    "adapter": {path.name: path.read_bytes() for path in sorted(adapter.iterdir())},
    "results": (workdir / "eval.json").read_bytes(),
  }


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
  """`arguments -> the outcome of a run that nobody kills`, each once."""
  found = {}

  def uninterrupted(arguments):
    if arguments not in found:
      workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
      found[arguments] = finish(start(workdir, arguments), workdir)
    return found[arguments]

  return uninterrupted


class Watch:
  """What can be seen of a running process from outside."""

  def __init__(self, process, workdir):
    self.process, self.workdir = process, workdir
    self.log = workdir / "metrics.jsonl"
    self.before = self.file()
    self.behind = self.logged() if self.before else 0

  def go_on(self, steps):
    """Lets the run make so many steps more than those that are logged."""
    limits(self.workdir).write_text(str(min(self.behind + steps, STEPS)))

  def file(self):
    return self.log.stat().st_ino if self.log.exists() else None

  def until(self, seen):
    deadline = time.monotonic() + 300
    while not seen():
      assert self.process.poll() is None, "the run ended before it could be killed"
      assert time.monotonic() < deadline
      time.sleep(0.001)

  def logged(self):
    return self.log.read_bytes().count(b"\n")

  def until_steps(self, count):
    """Until so many steps are logged that this process made."""
    self.go_on(count + AHEAD)
    self.until(lambda: self.file() not in (None, self.before))  # a run begins by cutting its log
    begin = self.logged()
    self.until(lambda: self.logged() >= min(begin + count, self.behind + count + AHEAD, STEPS))


# The moments to be killed at: each waits for something to be seen, and a random while longer.


def while_loading(watch, random):
  time.sleep(random.uniform(0.5, 4.0))


def in_a_step(watch, random):
  """Or while the data of a later one are made: that goes on all the time."""
  watch.until_steps(random.randint(1, 3))
  time.sleep(random.uniform(0, 0.1))


def in_a_save(watch, random):
  """Or soon after it: on a slow machine a save may go by unseen, and then a later one is met."""
  count = random.randint(1, 3)
  watch.until_steps(count)

  def seen():
    nonlocal count
    if watch.logged() >= min(watch.behind + count + AHEAD, STEPS):
      count += 1
      watch.go_on(count + AHEAD)
    saving = list((watch.workdir / "checkpoints").glob("*-tmp"))
    return saving or watch.logged() >= STEPS

  watch.until(seen)
  time.sleep(random.uniform(0, 0.05))


def after_the_last_step(watch, random):
  """While the adapter is written, or it is evaluated, or all of it is done."""
  limits(watch.workdir).write_text(str(STEPS + 1))
  watch.until(lambda: watch.log.exists() and watch.logged() >= STEPS)
  time.sleep(random.uniform(0, 0.2))


def live(start, workdir, arguments, moment, random, number=signal.SIGKILL):
  """One life of a run: it is started, and a signal sent to it at a moment."""
  process = start(workdir, arguments, limit=0)
  try:
    moment(Watch(process, workdir), random)
  finally:
    process.send_signal(number)
    limits(workdir).write_text(str(ENDLESS))  # or it would wait, and not stop at its step
    code = process.wait(timeout=300)
  assert code == (0 if number == signal.SIGTERM else -number)


@pytest.mark.slow
def test_a_run_killed_in_a_step_in_a_save_and_at_its_end_is_the_same_to_the_last_bit(
  start, uninterrupted, tmp_path
):
  whole, workdir = uninterrupted(""), tmp_path / "run"
  for moment in (in_a_save, in_a_step, after_the_last_step):
    live(start, workdir, "", moment, random.Random())
  assert finish(start(workdir, ""), workdir) == whole


MOMENTS = (while_loading, in_a_step, in_a_save, in_a_step, in_a_save, after_the_last_step)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arguments", ["", "method=adalora,rank=12", ENCODER, IMAGES, BOXES])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_many_times_is_the_same_to_the_last_bit(
  start, uninterrupted, tmp_path, arguments, seed
):
  """6 kills and a SIGTERM in each of the 10 cases."""
  whole, workdir = uninterrupted(arguments), tmp_path / "run"
  for moment in MOMENTS:
    live(start, workdir, arguments, moment, random.Random(seed))
    if moment is while_loading:
      live(start, workdir, arguments, in_a_step, random.Random(seed), signal.SIGTERM)
      assert "stopped by SIGTERM at step" in workdir.with_suffix(".log").read_text()
  assert finish(start(workdir, arguments), workdir) == whole
