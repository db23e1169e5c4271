"""Tasks: what a run is about. One file a task, and one literal dict of them.

    task = tasks.make(config.task, config.data, loss_chunk=0)   # what the config says, checked
    records = task.open(path, config.data, held_out=False)      # of the data's file
    records, words = task.read(records)
    task.check(records)                                         # before a model is loaded
    found = task.extend(found, key)                             # of a model that was loaded
    task = task.of_model(found)
    examples = task.examples(records)
    batches = task.train_batches(examples, 16, seed=0)
    objective = task.objective(lora_jax.adapt(task.forward(model)))

The loop, the step, checkpoints, sweeps and the main programs know a task by these methods alone. A
task of one's own is a class with them, in a dict of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import flax.linen as nn
import grain
import jax

from lora_jax.checks import shown
from lora_jax.data.records import Record
from lora_jax.data.token_texts import TokenText
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks.chat import Chat
from lora_jax.tasks.classification import Classification
from lora_jax.tasks.completion import Completion
from lora_jax.tasks.embedding import Embedding
from lora_jax.tasks.images import Images
from lora_jax.tasks.regression import Regression
from lora_jax.tasks.writing import ChatFormat
from lora_jax.train.step import Batch, Objective

PyTree = Any
Example = Any
Metrics = dict[str, float]


class Task(Protocol):
  """What a run is about.

  A batch is a dict of arrays whose first axis is the row. What a task says of batches is meant for
  those of its own datasets.
  """

  FIELDS: ClassVar[tuple[str, ...]]
  """The names of its fields in the config's `task`, beside `name`."""
  TRAINS: ClassVar[tuple[str, ...]]
  """Patterns of the leaves that train in full whatever the adapter is: those that the task adds."""
  UNIT: ClassVar[str]
  """What is counted for people and has a loss, in the singular: "token", "image"."""

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    """The task of a config.

    task: the section, with `name` and, of the fields in `FIELDS`, every one.
    data: the section that says what the records are.
    loss_chunk: positions of a row whose logits are held at a time; 0 for all.

    Raises ValueError for values that do not go together.
    """

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[Record]:
    """The records of a file or folder, as the config's `data` says.

    held_out: whether it is that of `data.test_source`.

    Raises ValueError for what cannot be read, with the path.
    """

  def read(self, records: Sequence[Record]) -> tuple[list[Record], str]:
    """The records of a file as the task takes them, and words on how they were read, or none.

    Raises ValueError for a column that holds what the task cannot read.
    """

  def derive(self, records: Sequence[Record], data: Mapping[str, Any]) -> list[Record]:
    """The records with what `data` says to make of their columns."""

  def check(self, records: Sequence[Record]) -> None:
    """Raises ValueError for records that lack a column which the task needs."""

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    """The model with the leaves that the task adds, at their start; of shapes, their shapes."""

  def of_model(self, found: Pretrained) -> Self:
    """The task on an extended model; raises ValueError where it cannot be used for it."""

  def examples(self, records: Sequence[Record]) -> list[Example]:
    """The examples of records, on the host, in their order."""

  def train_batches(
    self, examples: Sequence[Example], batch_size: int, *, seed: int, **rows: int
  ) -> grain.MapDataset:
    """The endless dataset of training batches, each a pure function of its step.

    rows: `shard_index` and `shard_count`, which rows of each batch are read.
    """

  def eval_batches(
    self, examples: Sequence[Example], batch_size: int, **rows: int
  ) -> grain.MapDataset:
    """The dataset of one pass over the examples."""

  def check_stackable(self) -> None:
    """Raises ValueError when the batches of a step, drawn by several seeds, may differ in shape."""

  def describe(self, **examples: Sequence[Example]) -> dict[str, Any]:
    """What a run keeps in eval.json of its examples, by the name of the split, `training` first;
    raises ValueError where these do not go together."""

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    """Lines for people about what `describe` returned; raises ValueError where it is damaged."""

  def tokens(self, example: Example) -> list[TokenText]:
    """The tokens of an example as a person reads them; raises ValueError where it is no text."""

  def shape_of(self, batch: Batch) -> tuple[int, ...]:
    """The rows of a batch and, where a row has several, the units of a row; each shape is compiled
    for once."""

  def summary(self, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """What a pass comes to: `examples`, `batches`, `padding` (0 to 1) and `shapes`, {key: number of
    batches}, of which the greatest key is the largest batch."""

  def batch_of(self, shape: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch of a shape of `summary`, with so many rows."""

  def words_of(self, shape: Any) -> str:
    """A row of a shape of `summary`, for people."""

  def forward(self, model: nn.Module) -> Callable:
    """What is adapted: `(variables, *inputs) -> outputs`."""

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], Any]:
    """`(weights, batch) -> outputs`, as calibration runs the model."""

  def mask(self, batch: Batch) -> jax.Array | None:
    """True for each token of a batch that is no padding, [rows, tokens]; None where all count."""

  def objective(self, apply: Callable) -> Objective:
    """`(weights, batch) -> (mean loss, count)`."""

  def reading(self, apply: Callable, hidden: bool) -> Callable[[PyTree, Batch], Any]:
    """`(weights, batch) -> logits`, or with `hidden` `(logits, hidden states)`, for distillation;
    raises ValueError where the task has none."""

  def make_eval_step(self, apply: Callable) -> Callable[[PyTree, Batch], PyTree]:
    """The jitted step `(weights, batch) -> outputs`, of which `metrics` makes figures."""

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> Metrics:
    """The figures of a pass, `loss` and `rows` among them, from the outputs of its batches."""

  def line(self, metrics: Metrics) -> str:
    """One line of figures for people."""

  def given(self, examples: Sequence[Example]) -> list[dict[str, str]]:
    """What a person is shown of examples: `prompt`, what the model sees, and what is `wanted`."""

  def prompts(
    self, records: Sequence[Record], examples: Sequence[Example], limit: int | None
  ) -> list[dict[str, Any]]:
    """The different prompts of records, as `write` takes them; raises ValueError for a task that
    writes no texts."""

  def check_room(self, asked: Sequence[Mapping[str, Any]], max_tokens: int) -> None:
    """Raises ValueError where the model has not the positions for prompts and what follows them."""

  def write(
    self, apply: Callable, weights: PyTree, asked: Sequence[Mapping[str, Any]], **how: Any
  ) -> list[dict[str, Any]]:
    """`prompt`, `text` and `references` of each prompt; see `Writing.write`."""

  def longest_choice(self) -> int | None:
    """The tokens of the longest answer; None where the answers are not given."""

  @property
  def chat_format(self) -> ChatFormat:
    """How conversations with the model are written; raises ValueError for a task that writes no
    texts."""

  def asked(self, given: str) -> list[Example]:
    """What a person asks about, by the path of a file or as a text, as `predict` takes it; raises
    ValueError for what the task cannot read, and for a task that predicts nothing."""

  def predict(
    self, apply: Callable, weights: PyTree, examples: Sequence[Example], **how: Any
  ) -> list[dict[str, Any]]:
    """An answer for each example, as JSON has it; see `EncodedTexts.predict`."""

  def make_show(
    self, apply: Callable, examples: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """Makes `weights -> what the model makes of each example`, in text.

    put: brings what a step gives to every process.
    share: the batch's rows are a multiple of it.
    """

  def draw(
    self, examples: Sequence[Example], samples: Sequence[Mapping[str, str]]
  ) -> Callable[[Any], None] | None:
    """What draws a picture of examples and of what was made of them into a PNG file; None where
    there is nothing to be seen.

    samples: of each example what `given` says, and what was shown `before` and `after`.
    """


TASKS: Mapping[str, type[Task]] = {
  "completion": Completion,
  "classification": Classification,
  "chat": Chat,
  "regression": Regression,
  "embedding": Embedding,
  "images": Images,
}
"""By `task.name` of a config."""

# What the configs of earlier runs, which lack a field, meant without it.
_BEFORE_THE_FIELD = {"classification": {"pair": ""}}


def make(
  task: Mapping[str, Any],
  data: Mapping[str, Any],
  *,
  loss_chunk: int,
  known: Mapping[str, type[Task]] = TASKS,
) -> Task:
  """The task of a config.

  Raises:
    ValueError: for a name that is not known, a field that the task does not have, and one that it
      lacks; and as its `of` does.
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
