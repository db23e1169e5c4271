"""Tasks: the objective, data and metrics of a run. One file per task, and one dict of them.

    task = tasks.make(config.task, config.data, loss_chunk=0)   # checks the config
    records = task.open(path, config.data, held_out=False)      # of the data file
    records, words = task.read(records)
    task.check(records)                                         # before a model is loaded
    found = task.extend(found, key)                             # the loaded model
    task = task.of_model(found)
    examples = task.examples(records)
    batches = task.train_batches(examples, 16, seed=0)
    objective = task.objective(lora_jax.adapt(task.forward(model)))

The loop, the step, checkpoints, sweeps and the main programs use only these methods. To add a task,
write a class with them and extend the dict.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, Unpack

import flax.linen as nn
import grain
import jax

from lora_jax.checks import shown
from lora_jax.data.batches import Shard, Watch
from lora_jax.data.records import Record
from lora_jax.data.token_texts import TokenText
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks.chat import Chat
from lora_jax.tasks.classification import Classification
from lora_jax.tasks.completion import Completion
from lora_jax.tasks.ctc import Ctc
from lora_jax.tasks.detection import Detection
from lora_jax.tasks.embedding import Embedding
from lora_jax.tasks.images import Images
from lora_jax.tasks.regression import Regression
from lora_jax.tasks.transcription import Transcription
from lora_jax.tasks.writing import ChatFormat
from lora_jax.train.step import Batch, Objective

PyTree = Any
Example = Any
Metrics = dict[str, float]


class Task(Protocol):
  """The interface of a task.

  A batch is a dict of arrays whose first axis is the row. Methods that take batches expect those of
  the task's own datasets.
  """

  TRAINS: ClassVar[tuple[str, ...]]
  """Patterns of the leaves that the task adds. They train in full with every adapter."""
  UNIT: ClassVar[str]
  """The unit of the loss in messages, in the singular: "token", "image"."""

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[Record]:
    """Returns the records of a file or folder, read as `data` in the config specifies.

    held_out: whether the path is that of `data.test_source`.

    Raises ValueError with the path if it cannot be read.
    """
    ...

  def read(self, records: Sequence[Record], /) -> tuple[list[Record], str]:
    """Returns the records in the form of the task, and a message on how they were read, or "".

    Raises ValueError for a column that the task cannot read.
    """
    ...

  def derive(self, records: Sequence[Record], data: Mapping[str, Any], /) -> list[Record]:
    """Returns the records with the columns that `data` derives from others."""
    ...

  def check(self, records: Sequence[Record], /) -> None:
    """Raises ValueError for records without a column that the task needs."""
    ...

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    """Returns the model with the initialized leaves of the task; shapes if `found` has shapes."""
    ...

  def of_model(self, found: Pretrained, /) -> "Task":
    """Returns the task for an extended model; raises ValueError for an unsuitable model."""
    ...

  def examples(self, records: Sequence[Record], /) -> list[Example]:
    """Returns the examples of records, on the host, in order."""
    ...

  def train_batches(
    self, examples: Sequence[Example], batch_size: int, /, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    """Returns the endless dataset of training batches, each a pure function of its step.

    rows: `shard_index` and `shard_count`, which select the rows of each batch.
    """
    ...

  def eval_batches(
    self, examples: Sequence[Example], batch_size: int, /, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    """Returns the dataset of one pass over the examples."""
    ...

  def describe(self, **examples: Sequence[Example]) -> dict[str, Any]:
    """Returns a description of the examples for eval.json, by the name of the split, `training`
    first; raises ValueError for inconsistent splits."""
    ...

  def lines(self, described: Mapping[str, Any], /) -> list[str]:
    """Returns the result of `describe` as readable lines; raises ValueError if it is damaged."""
    ...

  def tokens(self, example: Example, /) -> list[TokenText]:
    """Returns the tokens of an example as texts; raises ValueError for a task without text."""
    ...

  def shape_of(self, batch: Batch) -> tuple[int, ...]:
    """Returns the rows of a batch and, for rows of several units, the units of a row; a step
    compiles once per shape."""
    ...

  def summary(self, examples: Sequence[Example], batch_size: int, /) -> dict[str, Any]:
    """Returns the size of a pass: `examples`, `batches`, `padding` (0 to 1) and `shapes`, {key:
    number of batches}, where the greatest key is the largest batch."""
    ...

  def batch_of(self, shape: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract training batch of a shape from `summary`, with this many rows."""
    ...

  def words_of(self, shape: Any) -> str:
    """Describes a row of a shape from `summary` in words."""
    ...

  def forward(self, model: nn.Module) -> Callable:
    """Returns the function to adapt: `(variables, *inputs) -> outputs`."""
    ...

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], Any]:
    """Returns `(weights, batch) -> outputs`, which calibration runs."""
    ...

  def mask(self, batch: Batch) -> jax.Array | None:
    """Returns True for each token of a batch that is not padding, [rows, tokens]; None: all."""
    ...

  def objective(self, apply: Callable) -> Objective:
    """Returns `(weights, batch) -> (mean loss, count)`."""
    ...

  def reading(self, apply: Callable, hidden: bool) -> Callable[[PyTree, Batch], Any]:
    """Returns `(weights, batch) -> logits`, or with `hidden` `(logits, hidden states)`, for
    distillation; raises ValueError for a task without logits."""
    ...

  def answers(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the targets of the logits of `reading` and their weights, both [rows, positions]."""
    ...

  def make_eval_step(self, apply: Callable) -> Callable[[PyTree, Batch], PyTree]:
    """Returns the jitted step `(weights, batch) -> outputs`, the input of `metrics`."""
    ...

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> Metrics:
    """Returns the metrics of a pass, with `loss` and `rows`, from the outputs of its batches."""
    ...

  def line(self, metrics: Metrics, /) -> str:
    """Returns the metrics as one readable line."""
    ...

  def given(self, examples: Sequence[Example], /) -> list[dict[str, str]]:
    """Returns the readable parts of examples: `prompt`, the model's input, and `wanted`."""
    ...

  def prompts(
    self, records: Sequence[Record], examples: Sequence[Example], limit: int | None, /
  ) -> list[dict[str, Any]]:
    """Returns the distinct prompts of records for `write`; raises ValueError for a task that does
    not generate."""
    ...

  def check_room(self, asked: Sequence[dict[str, Any]], max_tokens: int, /) -> None:
    """Raises ValueError if prompts and completions exceed the model's positions."""
    ...

  def write(
    self,
    apply: Callable,
    weights: PyTree,
    asked: Sequence[dict[str, Any]],
    /,
    *,
    batch_size: int,
    max_tokens: int,
    beams: int,
    length_penalty: float,
    watch: Watch = iter,
  ) -> list[dict[str, Any]]:
    """Returns `prompt`, `text` and `references` of each prompt; see `Writing.write`."""
    ...

  def longest_choice(self) -> int | None:
    """Returns the number of tokens of the longest choice; None if answers are free."""
    ...

  @property
  def chat_format(self) -> ChatFormat:
    """The format of conversations with the model; raises ValueError for a task that does not
    generate."""
    ...

  def asked(self, given: str, /) -> list[Example]:
    """Returns the examples of a file or a text for `predict`; raises ValueError if the task cannot
    read them, and for a task without predictions."""
    ...

  def predict(
    self,
    apply: Callable,
    weights: PyTree,
    examples: Sequence[Example],
    /,
    *,
    batch_size: int,
    watch: Watch = iter,
  ) -> list[dict[str, Any]]:
    """Returns an answer for each example, as JSON values; see `EncodedTexts.predict`."""
    ...

  def mark(self, example: Example, /) -> Callable[[Any, Any], None] | None:
    """Returns a function `(answer of predict, PNG file)` that draws an answer into a copy of the
    example's picture, or None for a task that draws none."""
    ...

  def make_show(
    self, apply: Callable, examples: Sequence[Example], put: Callable, share: int, /
  ) -> Callable[[PyTree], list[str]]:
    """Returns `weights -> the model's answer to each example`, as text.

    put: gathers the outputs of a step on every process.
    share: the rows of the batch are a multiple of it.
    """
    ...

  def draw(
    self, examples: Sequence[Example], samples: Sequence[Mapping[str, str]], /
  ) -> Callable[[Any], None] | None:
    """Returns a function that draws examples and answers into a PNG file, or None for a task
    without pictures.

    samples: for each example the fields of `given`, and the answers `before` and `after`.
    """
    ...


class NamedTask(Task, Protocol):
  """A task that a config names."""

  FIELDS: ClassVar[tuple[str, ...]]
  """The names of its fields in the config's `task`, in addition to `name`."""

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    """Returns the task of a config.

    task: the section, with `name` and every field in `FIELDS`.
    data: the section that describes the records.
    loss_chunk: positions of a row whose logits are in memory at a time; 0 for all.

    Raises ValueError for inconsistent values.
    """
    ...


TASKS: Mapping[str, type[NamedTask]] = {
  "completion": Completion,
  "classification": Classification,
  "chat": Chat,
  "regression": Regression,
  "embedding": Embedding,
  "images": Images,
  "transcribe": Transcription,
  "ctc": Ctc,
  "detection": Detection,
}
"""The tasks by `task.name` of a config."""

# Values of fields that the configs of earlier runs lack.
_BEFORE_THE_FIELD = {"classification": {"pair": ""}}


def make(
  task: Mapping[str, Any],
  data: Mapping[str, Any],
  *,
  loss_chunk: int,
  known: Mapping[str, type[NamedTask]] = TASKS,
) -> Task:
  """Returns the task of a config.

  Raises:
    ValueError: for an unknown name, an unknown or missing field, and as the task's `of` does.
  """
  name = task["name"]
  if name not in known:
    raise ValueError(f"task.name {shown(name)} is unknown; use one of {', '.join(known)}")
  kind = known[name]
  task = _BEFORE_THE_FIELD.get(name, {}) | dict(task)
  if unknown := sorted(set(task) - {"name", *kind.FIELDS}):
    has = ", ".join(kind.FIELDS) or "none of its own"
    raise ValueError(f"task.{unknown[0]}: the task {name} has no such field; its fields are {has}")
  if missing := [field for field in kind.FIELDS if field not in task]:
    raise ValueError(f"task.{missing[0]} is missing; the task {name} needs it")
  return kind.of(task, data, loss_chunk)
