"""Where a run's numbers go: metrics.jsonl and TensorBoard event files (no TensorFlow needed).

with MetricsWriter(workdir.metrics, workdir.tensorboard, step=restored_step) as writer:
  writer.write(10, {"loss": 0.7})
read_metrics(workdir.metrics)      # [{"step": 10, "loss": 0.7}]
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lora_jax.train.workdir import write_text, writing


class MetricsWriter:
  """Writes one line and one event a logged step; a context manager.

  Args:
    path: metrics.jsonl. Lines past `step` are cut off, so that steps stay unique and increasing.
    tensorboard: the folder of the event files; what it holds past `step` is marked as void.
    step: the step that the run starts from, 0 for a new one.

  Raises:
    ValueError: when a line of metrics.jsonl, other than an unfinished last one, is not JSON.
    OSError: when one of them cannot be written, here as in every method.
  """

  def __init__(self, path: pathlib.Path, tensorboard: pathlib.Path, *, step: int):
    _cut(path, step)
    self._path, self._tensorboard, self._step = path, tensorboard, step
    with writing(path):
      self._lines = open(path, "a")  # noqa: SIM115, closed by close()
    with writing(tensorboard):
      self._events = EventFileWriter(str(tensorboard))
      # To TensorBoard a start voids what earlier files hold from that step on.
      self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of a step, on disk when this returns.

    Raises:
      ValueError: when the step is not past the last one.
    """
    if step <= self._step:
      raise ValueError(f"step {step} is logged after step {self._step}; steps must increase")
    self._step = step
    with writing(self._path):
      self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
      self._lines.flush()
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
    with writing(self._tensorboard):
      self._event(step, summary=Summary(value=values))
      self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    with writing(self._path):
      self._lines.close()
    with writing(self._tensorboard):
      self._events.close()

  def _event(self, step: int, **content: Any) -> None:
    self._events.add_event(Event(wall_time=time.time(), step=step, **content))


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
  """The objects of a metrics.jsonl, in order; a last line that a killed run left half is dropped.

  Raises:
    ValueError: when any other line is not JSON.
  """
  records = []
  *lines, _ = path.read_text().split("\n")
  for number, line in enumerate(lines, start=1):
    try:
      records.append(json.loads(line))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: not valid JSON ({error}); delete the line") from error
  return records


def _cut(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  kept = [record for record in read_metrics(path) if record["step"] <= step]
  write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
