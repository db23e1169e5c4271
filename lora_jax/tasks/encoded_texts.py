"""The base of tasks with whole texts for an encoder, single or in pairs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self, Unpack

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import families
from lora_jax.checks import shown
from lora_jax.data import batches, encoded, records, templates
from lora_jax.data.batches import Shard, Watch
from lora_jax.data.encoded import Encoded, EncodedExample
from lora_jax.data.token_texts import TokenText, token_texts
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import questions, tables
from lora_jax.tasks.texts import check_positions
from lora_jax.train.distillation import Reading
from lora_jax.train.step import Batch

PyTree = Any
Answer = questions.Answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedTexts(tables.OfTables):
  """A task whose examples are whole texts; see `lora_jax.tasks.Task` for its methods.

  text: the template of a text, see `lora_jax.data.templates`.
  pair: the template of a second text that is read with it; "" for none.
  label: the template of the target.
  max_length: tokens of a text, or of a pair that is encoded as one, special ones included.
  buckets: increasing lengths that batches are padded to; a step compiles once for each.
  model: the model without its weights; None until `of_model`.
  """

  NAME: ClassVar[str]
  TRAINS: ClassVar[tuple[str, ...]] = ()
  TARGET: ClassVar[Any] = jnp.float32
  """The dtype of what is wanted."""
  APART: ClassVar[bool] = False
  """Whether the texts of a pair are encoded apart."""

  text: str
  pair: str
  label: str
  max_length: int
  buckets: tuple[int, ...]
  model: Pretrained | None = None

  # ---- records

  def read(self, rows: Sequence[records.Record]) -> tuple[list[records.Record], str]:
    for name, template in self._templates().items():
      records.check_values(rows, templates.fields(template), f"{name} template {template!r:.200}")
    return list(rows), ""

  def check(self, rows: Sequence[records.Record]) -> None:
    for name, template in self._templates().items():
      templates.check(template, rows, name)
    texts = {name: x for name, x in self._templates().items() if name != "label"}
    for number, row in enumerate(rows):
      self.target(row, f"record {number}")
      if blank := [name for name, x in texts.items() if not templates.fill(x, row).strip()]:
        raise ValueError(
          f"record {number}: its {blank[0]} is empty; add some text, or leave the record out"
        )

  def target(self, row: records.Record, where: str) -> int | float:
    """Returns the target of a record; raises ValueError for an invalid label."""
    raise NotImplementedError

  def _templates(self) -> dict[str, str]:
    found = {"text": self.text, "pair": self.pair, "label": self.label}
    return {name: template for name, template in found.items() if template}

  # ---- the model

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    del key
    return found

  def of_model(self, found: Pretrained) -> Self:
    if found.family.kind != families.ENCODER:
      raise ValueError(
        f"task.name {self.NAME!r} is for encoders, as those of model_type 'bert', and "
        f"{found.source} is a {found.config.family!r}"
      )
    positions = found.config.max_length
    check_positions(found.config, self.max_length, f"data.max_length {self.max_length}", positions)
    return dataclasses.replace(self, model=dataclasses.replace(found, params={}))

  def forward(self, model: nn.Module) -> Callable:
    return model.apply

  # ---- examples and batches

  def examples(self, rows: Sequence[records.Record]) -> list[EncodedExample]:
    return [
      self._example(row, f"record {number}", self.target(row, f"record {number}"))
      for number, row in enumerate(rows)
    ]

  def _example(self, row: records.Record, where: str, target: int | float) -> EncodedExample:
    texts = [templates.fill(x, row) for x in (self.text, self.pair) if x]
    found, encode = [], self.tokenizer.encode_whole
    try:
      for each in [[text] for text in texts] if self.APART else [texts]:
        found.append(encode(*each, max_length=self.max_length))
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
    return EncodedExample(
      texts=tuple(
        Encoded(ids=tuple(x.ids), types=tuple(x.types), spans=tuple(x.spans)) for x in found
      ),
      target=target,
      cut=sum(x.cut for x in found),
    )

  @property
  def _how(self) -> dict[str, Any]:
    return {
      "buckets": self.buckets,
      "pad_id": self.tokenizer.pad_id,
      "with_types": self._has_types,
    }

  @property
  def _has_types(self) -> bool:
    return self.known_model.config.token_types > 1

  def train_batches(
    self, found: Sequence[EncodedExample], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return encoded.train_batches(found, batch_size, seed=seed, **self._how, **rows)

  def eval_batches(
    self, found: Sequence[EncodedExample], batch_size: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return encoded.eval_batches(found, batch_size, **self._how, **rows)

  def describe(self, **found: Sequence[EncodedExample]) -> dict[str, Any]:
    return {
      "max_length": self.max_length,
      "positions": self.known_model.config.max_length,
      "splits": {name: encoded.describe(each) for name, each in found.items()},
    }

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    _check_described(described)
    return [
      f"{name}: {split['cut']:,} of {split['examples']:,} texts cut to max_length "
      f"{described['max_length']:,}; the longest has {split['longest']:,} tokens, the model "
      f"{described['positions']:,} positions"
      for name, split in described["splits"].items()
    ]

  def tokens(self, example: EncodedExample) -> list[TokenText]:
    """Returns the tokens of the texts, and their target as the learned one."""
    tokenizer = self.tokenizer
    found = [x for text in example.texts for x in token_texts(tokenizer, text.ids, learnt=())]
    return [*found, TokenText(self.words(example.target), 1, special=False, learnt=True)]

  def shape_of(self, batch: Batch) -> tuple[int, int]:
    *rows, length = batch["tokens"].shape
    return int(np.prod(rows)), length

  def summary(self, found: Sequence[EncodedExample], batch_size: int) -> dict[str, Any]:
    return batches.summary(found, batch_size, self.buckets)

  def batch_of(self, shape: tuple[int, int], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    length, _ = shape
    sizes = (rows, 2, length) if self.APART else (rows, length)
    tokens = jax.ShapeDtypeStruct(sizes, jnp.int32)
    targets = jax.ShapeDtypeStruct((rows, 1), self.TARGET)
    weights = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    types = {"types": tokens} if self._has_types else {}
    mask = jax.ShapeDtypeStruct(sizes, jnp.bool_)
    return {"tokens": tokens, "mask": mask, **types, "targets": targets, "weights": weights}

  def words_of(self, shape: tuple[int, int]) -> str:
    return f"{shape[0]} tokens{', two texts each' if self.APART else ''}"

  # ---- training and evaluation

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], Any]:
    return lambda weights, batch: apply({"params": weights}, *_inputs(batch), **_options(batch))

  def hidden(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """Returns `(weights, batch) -> the vector of each token`, [texts, T, D]."""
    return lambda weights, batch: apply(
      {"params": weights}, *_inputs(batch), method="hidden", **_options(batch)
    )

  def mask(self, batch: Batch) -> jax.Array:
    return _flat(batch["mask"])

  def reading(self, apply: Callable, hidden: bool) -> Callable[[PyTree, Batch], Reading]:
    """The logits of a classification [B, 1, classes] and the first token's vector [B, 1, D]."""
    run, run_hidden = self.run(apply), self.hidden(apply)

    def read(weights: PyTree, batch: Batch) -> Reading:
      if not hidden:
        return run(weights, batch)[:, None]
      hidden_BTD = run_hidden(weights, batch)
      logits_BC = apply({"params": weights}, hidden_BTD, method="logits")
      return logits_BC[:, None], hidden_BTD[:, :1]

    return read

  def answers(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return batch["targets"], batch["weights"]

  # ---- what people are shown

  def given(self, found: Sequence[EncodedExample]) -> list[dict[str, str]]:
    return [
      {"prompt": "\n".join(self._texts(each)), "wanted": self.words(each.target)} for each in found
    ]

  def words(self, target: int | float) -> str:
    """Describes a target in words."""
    raise NotImplementedError

  def _texts(self, example: EncodedExample) -> list[str]:
    """The texts of an example as tokenized and truncated, without special tokens."""
    decode = self.tokenizer.decode
    return [decode(text.ids[start:end]) for text in example.texts for start, end in text.spans]

  def make_show(
    self, apply: Callable, found: Sequence[EncodedExample], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    rows = -(-len(found) // share) * share
    answer = self._answers(apply)
    [batch] = self._in_one_batch(found, rows)

    def show(weights: PyTree) -> list[str]:
      outputs = np.asarray(put(answer(weights, batch)))
      by_example = dict(zip(batch["index"].tolist(), outputs, strict=True))
      return [self.said(by_example[n]) for n in range(len(found))]

    return show

  def _in_one_batch(self, found: Sequence[EncodedExample], rows: int) -> grain.MapDataset:
    how: dict[str, Any] = self._how | {"buckets": (max(len(each.inputs) for each in found),)}
    return encoded.eval_batches(found, rows, **how)

  def _answers(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """The jitted step `(weights, batch) -> an answer for each row`, the input of `said`."""
    raise NotImplementedError

  def said(self, output: np.ndarray) -> str:
    """Describes an answer in words."""
    raise NotImplementedError

  def prompts(self, *unused: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts; leave --beams out")

  def write(self, *unused: Any, **how: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts")

  def check_room(self, *unused: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts")

  @property
  def chat_format(self) -> NoReturn:
    return self.longest_choice()

  def longest_choice(self) -> NoReturn:
    raise ValueError(
      f"the task {self.NAME} writes no texts; use experiments.predict or experiments.evaluate"
    )

  # ---- answers for texts of one's own

  def asked(self, given: str) -> list[EncodedExample]:
    rows = questions.records_of(given, [x for x in (self.text, self.pair) if x])
    return [self._example(row, f"{given[:200]}: record {n}", 0.0) for n, row in enumerate(rows)]

  def predict(
    self,
    apply: Callable,
    weights: PyTree,
    found: Sequence[EncodedExample],
    *,
    batch_size: int,
    watch: Watch = iter,
  ) -> list[Answer]:
    """Returns an answer for each example, in order.

    apply: the adapted function of `forward`.
    found: the result of `asked`.
    batch_size: rows per step.
    watch: wraps the iterator of batches, e.g. with a progress bar.
    """
    step = self._predictions(apply)
    return questions.answers(
      lambda batch: step(weights, batch), watch(self.eval_batches(found, batch_size)), self.answer
    )

  def _predictions(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """The jitted step `(weights, batch) -> an answer for each row`, the input of `answer`."""
    return self._answers(apply)

  def answer(self, output: np.ndarray) -> Answer:
    """Returns an answer as a JSON value."""
    raise NotImplementedError


def _inputs(batch: Batch) -> tuple[jax.Array]:
  return (_flat(batch["tokens"]),)


def _options(batch: Batch) -> dict[str, jax.Array]:
  """The arguments of an encoder in addition to the tokens."""
  types = {"types_BT": _flat(batch["types"])} if "types" in batch else {}
  return {"mask_BT": _flat(batch["mask"])} | types


def _flat(x: jax.Array) -> jax.Array:
  """Reshapes (B, S, T) to (B S, T); returns (B, T) unchanged."""
  return x.reshape(-1, x.shape[-1])


def _check_described(described: Mapping[str, Any]) -> None:
  splits = described.get("splits")
  if not isinstance(splits, dict) or not all(isinstance(x, dict) for x in splits.values()):
    raise ValueError(f"data splits is {shown(splits)}")
  values = {f"data {name}": described.get(name) for name in ("max_length", "positions")}
  for split in splits.values():
    values |= {f"data {name}": split.get(name) for name in ("cut", "examples", "longest")}
    for name, value in values.items():
      if type(value) is not int:
        raise ValueError(f"{name} is {shown(value)}")
