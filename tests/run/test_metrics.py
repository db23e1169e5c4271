import json
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_jax.run.metrics import MetricsWriter, read_metrics


def write(folder, start, steps, offset=0.0):
  with MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", step=start) as writer:
    for step in steps:
      writer.write(step, {"loss": step + offset})


def scalars(folder):
  events = EventAccumulator(str(folder / "tensorboard"))
  events.Reload()
  return [(event.step, event.value) for event in events.Scalars("loss")]


def test_a_logged_step_is_one_object_on_a_line_and_one_tensorboard_event(tmp_path):
  write(tmp_path, 0, [10, 20])
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"step": 10, "loss": 10.0},
    {"step": 20, "loss": 20.0},
  ]
  assert scalars(tmp_path) == [(10, 10.0), (20, 20.0)]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step=0) as writer:
    writer.write(1, {"loss": 0.1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}]
    assert scalars(tmp_path) == [(1, pytest.approx(0.1))]


def test_on_resume_what_is_past_the_restored_step_is_cut_off_in_both(tmp_path):
  write(tmp_path, 0, [1, 2, 3, 4])
  write(tmp_path, 2, [3, 4, 5], offset=0.5)
  records = read_metrics(tmp_path / "metrics.jsonl")
  wanted = [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
  assert [(record["step"], record["loss"]) for record in records] == wanted
  assert scalars(tmp_path) == wanted


def test_a_last_line_that_a_killed_run_left_half_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  write(tmp_path, 1, [2])
  assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_cut(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not valid JSON"):
    write(tmp_path, 1, [2])
  assert path.read_bytes() == before


def test_steps_must_increase(tmp_path):
  with pytest.raises(ValueError, match="step 5 is logged after step 5"):
    write(tmp_path, 0, [5, 5])


def test_no_tensorflow_is_imported():
  code = "import sys, lora_jax.run.metrics; sys.exit('tensorflow' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
