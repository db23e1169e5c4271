"""The data that a compression calibrates and measures by: running text, or the batches of a task.

    data = compression_data.of(config, shapes)     # before the weights are loaded
    model = STEPS[step](config[step], model, data.calibration)
    data.figures(model, weights), data.runs(model, weights), data.flops(model, weights)

config.text.source = "" chooses the task: of texts for an encoder, of images. Otherwise a decoder is
calibrated by running text, and its perplexity and the accuracy of its task are measured.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import compression, model_options, parts
from experiments.compression import Model
from lora_jax import cost, tasks
from lora_jax.compress import make_windows, onnx_program, perplexity, report
from lora_jax.data import records
from lora_jax.io import outputs
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.tasks import texts
from lora_jax.train import evaluation

PyTree = Any


class Data(Protocol):
  """See the module."""

  UNIT: ClassVar[str]
  """Of `flops`."""
  calibration: compression.Calibration

  def figures(self, model: Model, weights: PyTree) -> dict[str, float]:
    """The figures of a model on what is held out."""

  def runs(self, model: Model, weights: PyTree) -> report.Runs:
    """The calls of a model that are timed."""

  def flops(self, model: Model, weights: PyTree) -> int:
    """The floating-point operations of its products, per unit."""

  def write_rest(self, folder: pathlib.Path) -> None:
    """Writes what was used for nothing, for healing, if no other file has it."""


def of(config: ConfigDict, found: Pretrained) -> Data:
  """The data of a config.

  Args:
    config: of the compression.
    found: the model; shapes are enough.

  Raises:
    ValueError: when they do not fit the model, or there are too few.
  """
  return RunningText.of(config, found) if config.text.source else TaskData.of(config, found)


def make_task(config: ConfigDict) -> tasks.Task:
  """The task of a config, without a model."""
  section = {"name": config.task.name} | dict(config.task.fields)
  return tasks.make(section, config.task.data, loss_chunk=0)


def _held_out(config: ConfigDict, task: tasks.Task, found: Mapping[str, list]):
  rows = parts.pick(found, config.task.split, "task.split")
  examples = task.examples(rows)[: config.task.examples or None]
  return task.eval_batches(examples, config.task.batch_size), examples


@dataclasses.dataclass(frozen=True)
class RunningText:
  """Windows of text, and a task whose accuracy is reported.

  Attributes:
    calibration: the windows that steps calibrate by.
    held_out_NT, rest_NT: those to measure by, and the others.
    tokenizer: of the model.
    config: of the compression.
    task, batches: the task and its held-out batches; None if the config asks for no task.
  """

  UNIT: ClassVar[str] = "token"

  calibration: compression.Windows
  held_out_NT: np.ndarray
  rest_NT: np.ndarray
  tokenizer: Tokenizer
  config: ConfigDict
  task: tasks.Task | None
  batches: Any

  @classmethod
  def of(cls, config: ConfigDict, found: Pretrained) -> "RunningText":
    parts.check_writes(
      found,
      "a decoder is measured by the text that it goes on with; set text.source to '' to calibrate "
      "and measure by the batches of a task",
    )
    most, prompt, length = found.config.max_length, config.report.prompt, config.text.length
    texts.check_positions(found.config, length, f"text.length {length}", most)
    texts.check_positions(
      found.config, prompt + 1, f"report.prompt {prompt} and a token after it", most - 1
    )
    calibration_NT, held_out_NT, rest_NT = read_windows(config.text, found.tokenizer)
    task, batches = None, None
    if config.task.examples:
      task = make_task(config).of_model(found)
      batches, _ = _held_out(config, task, parts.load_records(config.task.data, task))
    windows = compression.Windows(calibration_NT, config.text.batch_size)
    return cls(windows, held_out_NT, rest_NT, found.tokenizer, config, task, batches)

  def figures(self, model: Model, weights: PyTree) -> dict[str, float]:
    size = self.config.text.batch_size
    found = {"perplexity": perplexity(model.apply, weights, self.held_out_NT, batch_size=size)}
    if self.task is not None:
      step = self.task.make_eval_step(model.apply)
      metrics = evaluation.evaluate(step, weights, self.batches, self.task.metrics)
      found["accuracy"] = metrics["accuracy"]
    return found

  def runs(self, model: Model, weights: PyTree) -> report.Runs:
    section, found = self.config.report, {}
    for rows in section.batches:
      found |= report.decoding(model.apply, weights, model.config, rows=rows, length=section.prompt)
    return found

  def flops(self, model: Model, weights: PyTree) -> int:
    return report.flops_per_token(model.apply, weights, self.config.report.prompt)

  def write_rest(self, folder: pathlib.Path) -> None:
    write_rest(folder / "rest.jsonl", self.rest_NT, self.tokenizer)


@dataclasses.dataclass(frozen=True)
class TaskData:
  """The examples of a task: of its training split for calibration, of another one to measure by.

  Attributes:
    calibration: the batches that steps calibrate by.
    held_out: batches to measure by.
    largest: the shape of the largest of these, as in `Task.summary`, at which models are timed.
    batches: the batch sizes that models are timed at.
    onnx: whether they are also timed as ONNX programs.
  """

  UNIT: ClassVar[str] = "input"

  calibration: compression.TaskBatches
  held_out: Any
  largest: Any
  batches: Sequence[int]
  onnx: bool

  @classmethod
  def of(cls, config: ConfigDict, found: Pretrained) -> "TaskData":
    section = config.task
    task = make_task(config).of_model(found)
    read = parts.load_records(section.data, task)
    rows = parts.pick(read, "train", "task.data.train")[: section.calibration]
    whole = len(rows) // section.batch_size * section.batch_size
    if whole < section.calibration:
      raise ValueError(
        f"task.calibration {section.calibration}: there are {len(rows)} records to train on, "
        f"{whole} in batches of {section.batch_size}; use a multiple of task.batch_size that is "
        "at most that"
      )
    batches = list(task.eval_batches(task.examples(rows), section.batch_size))
    held_out, examples = _held_out(config, task, read)
    largest = max(task.summary(examples, section.batch_size)["shapes"])
    return cls(
      compression.TaskBatches(task, batches),
      held_out,
      largest,
      config.report.batches,
      config.report.onnx,
    )

  @property
  def task(self) -> tasks.Task:
    return self.calibration.task

  def figures(self, model: Model, weights: PyTree) -> dict[str, float]:
    step = self.task.make_eval_step(self.calibration.forward(model))
    metrics = evaluation.evaluate(step, weights, self.held_out, self.task.metrics)
    return {
      name: float(x) for name, x in metrics.items() if name != "rows" and isinstance(x, int | float)
    }

  def runs(self, model: Model, weights: PyTree) -> report.Runs:
    run = self._run(model)
    jitted = jax.jit(run)
    shapes = {rows: self.task.batch_of(self.largest, rows) for rows in self.batches}
    made = {n: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), x) for n, x in shapes.items()}
    timed: dict[tuple[str, int], Callable[[], Any]] = {
      ("latency", n): functools.partial(jitted, weights, batch) for n, batch in made.items()
    }
    if self.onnx:  # as it is exported
      config = model_options.for_export(model.config)
      exported = self._run(model._replace(config=config))
      timed |= {("ONNX Runtime", n): in_onnx(exported, weights, x) for n, x in made.items()}
    return timed

  def flops(self, model: Model, weights: PyTree) -> int:
    shapes = jax.eval_shape(lambda: weights), self.task.batch_of(self.largest, 1)
    return cost.flops(jax.make_jaxpr(self._run(model))(*shapes))

  def _run(self, model: Model) -> Callable:
    return self.task.run(self.calibration.forward(model))

  def write_rest(self, folder: pathlib.Path) -> None:
    """Writes nothing: a run heals on the task's own training split."""


def in_onnx(run: Callable, weights: PyTree, batch: Any) -> Callable[[], Any]:
  """A call of `run(weights, batch)` in ONNX Runtime."""
  leaves, structure = jax.tree.flatten(batch)
  shapes = {f"input_{n}": jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in enumerate(leaves)}

  def forward(*arrays):
    made = run(weights, jax.tree.unflatten(structure, arrays))
    return tuple(jax.tree.leaves(made))

  session = onnx_program.convert(forward, shapes).session()
  return functools.partial(session, *map(np.asarray, leaves))


# ---- running text


def read_windows(text: ConfigDict, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
  """The windows for calibration, those to measure by, and the rest.

  Raises:
    ValueError: when there are too few.
  """
  rows = []
  for source in parts.addresses(text.source):
    found = parts.read_file(text, source)
    records.require(found, [text.column], f"{source}: config.text.column")
    records.check_values(found, [text.column], f"{source}: config.text.column")
    rows += found
  windows_NT = make_windows(
    " ".join(str(row[text.column]) for row in rows),
    functools.partial(tokenizer.encode, special_tokens=text.special_tokens),
    text.length,
  )
  needed = text.calibration + text.held_out
  if len(windows_NT) < needed:
    raise ValueError(
      f"the text has {len(windows_NT)} windows of {text.length} tokens, and config.text asks for "
      f"{text.calibration} for calibration and {text.held_out} to measure by; give more text"
    )
  return tuple(np.split(windows_NT, [text.calibration, needed]))


def write_rest(path: pathlib.Path, rest_NT: np.ndarray, tokenizer: Tokenizer):
  """The windows that are left as records: the first token's text, and what follows it."""
  lines = [
    json.dumps(
      {"first": tokenizer.decode(ids[:1]), "rest": tokenizer.decode(ids[1:], after=ids[:1])}
    )
    for ids in rest_NT.tolist()
  ]
  outputs.write_text(path, "".join(f"{line}\n" for line in lines))
