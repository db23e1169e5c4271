"""The metrics of a run: metrics.jsonl and TensorBoard event files (TensorFlow is not needed).

with MetricsWriter(workdir.metrics, workdir.tensorboard, step=restored_step) as writer:
  writer.write(10, {"loss": 0.7})
read_metrics(workdir.metrics)      # [{"step": 10, "loss": 0.7}]
"""

import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

# protobuf makes these classes when the modules are imported.
from tensorboard.compat.proto.event_pb2 import (
  Event,  # pyright: ignore[reportAttributeAccessIssue]
  SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
  Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lora_jax.checks import shown
from lora_jax.io import files, json_files, outputs
from lora_jax.run.workdir import write_text, writing

_LONGEST = 1 << 20  # bytes of a line


class MetricsWriter:
  """Writes one line and one event per logged step; a context manager.

  Args:
    path: metrics.jsonl. Lines after `step` are cut off, so that steps stay unique and increasing.
    tensorboard: the folder of the event files; events after `step` are marked as void.
    step: the step that the run starts from, 0 for a new one.

  Raises:
    ValueError: if a line of metrics.jsonl, other than an incomplete last one, is damaged.
    OSError: if one of them cannot be written, here as in every method.
  """

  def __init__(self, path: pathlib.Path, tensorboard: pathlib.Path, *, step: int):
    _cut(path, step)
    self._path, self._tensorboard, self._step = path, tensorboard, step
    with writing(path):
      # It was just written, so it is the run's own file and not a link to another.
      self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
    with writing(tensorboard):
      self._events = EventFileWriter(str(tensorboard))
      # For TensorBoard, a start event voids the events of earlier files from that step on.
      self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of a step; they are on disk when this returns.

    Raises:
      ValueError: if the step is not after the last one.
    """
    if step <= self._step:
      raise ValueError(f"step {step} is logged after step {self._step}; steps must increase")
    self._step = step
    with writing(self._path):
      self._lines.write(_line({"step": step, **metrics}))
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
  """Returns the objects of a metrics.jsonl, in order, without an incomplete last line.

  Values that were not finite are null in the file and NaN here.

  Raises:
    FileNotFoundError: if there is no such file.
    PermissionError: if it cannot be read.
    ValueError: if another line is damaged: if it is not a JSON object, has no `step` after that of
      the line before it, or has a value that is not a number.
  """
  records = []
  step = 0
  for number, line in enumerate(_lines_of(path), start=1):
    try:
      record = json_files.parse(line)
      step = _check_line(record, step)
    except ValueError as error:
      raise ValueError(f"{path}:{number}: not valid JSON ({error}); delete the line") from None
    records.append({name: math.nan if x is None else x for name, x in record.items()})
  return records


def _lines_of(path: pathlib.Path) -> Iterator[bytes]:
  with files.open_regular(path) as file:
    while line := file.readline(_LONGEST):
      if line.endswith(b"\n"):
        yield line
      elif len(line) == _LONGEST:
        raise ValueError(f"{path}: a line is longer than {_LONGEST:,} bytes; delete it")


def _check_line(record: Mapping[str, Any], before: int) -> int:
  """Returns the step of a line."""
  step = record.get("step")
  if not isinstance(step, int) or isinstance(step, bool) or step <= before:
    raise ValueError(f"its step is {shown(step)}, and the line before has {before}")
  for name, value in record.items():
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
      raise ValueError(f"{name[:80]} is {shown(value)} and not a number")
  return step


def _cut(path: pathlib.Path, step: int) -> None:
  there = read_metrics(path) if path.exists() else []
  write_text(path, "".join(_line(record) for record in there if record["step"] <= step))


def _line(record: Mapping[str, float]) -> str:
  return outputs.as_json(record) + "\n"
