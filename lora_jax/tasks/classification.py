"""Text classification: a classification head at one token of a text.

task.name = "classification"
task.text = "{sentence}"                       # a template, see lora_jax.data.templates
task.pair = ""                                 # for a second text, for encoders; "" for none
task.label = "{label}"                         # a template for the name of the class
task.labels = ("negative", "positive")         # the names, in the order of the head's outputs

The head is new. It is initialized from the run's seed, trains in full and is saved with the
adapter, as in PEFT's `SEQ_CLS`. The model is transformers' `...ForSequenceClassification`. A
decoder has a kernel [width, classes], called `score` there, at the last token before the padding.
An encoder has a dense layer and a kernel at the first token; see
`lora_jax.tasks.pooled_classification`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp

from lora_jax import families
from lora_jax.data import batches, records, templates
from lora_jax.data.batches import Watch
from lora_jax.data.examples import Example
from lora_jax.data.token_texts import TokenText, token_texts
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import heads, questions
from lora_jax.tasks.pooled_classification import PooledClassification
from lora_jax.tasks.texts import Texts
from lora_jax.train.step import Batch

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Texts):
  """See the module; its other fields are those of `Texts`. Long texts are truncated at the end.

  text, label: templates of a text and of the name of its class.
  pair: template of a second text, for encoders only; "" for none.
  labels: the names of the classes.
  """

  FIELDS: ClassVar[tuple[str, ...]] = ("text", "pair", "label", "labels")
  TRAINS: ClassVar[tuple[str, ...]] = PooledClassification.TRAINS

  text: str
  pair: str
  label: str
  labels: tuple[str, ...]

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    labels = heads.labels_of(task)
    if loss_chunk:
      raise ValueError(
        f"train.loss_chunk {loss_chunk}: is for logits of many tokens, and a class is read from "
        "one; set it to 0"
      )
    return cls(
      text=task["text"],
      pair=task["pair"],
      label=task["label"],
      labels=labels,
      max_length=data["max_length"],
      buckets=tuple(data["buckets"]),
      packed_length=0,
      loss_chunk=0,
    )

  def _of_encoders(self) -> PooledClassification:
    return PooledClassification(
      text=self.text,
      pair=self.pair,
      label=self.label,
      labels=self.labels,
      max_length=self.max_length,
      buckets=self.buckets,
    )

  def read(self, rows: Sequence[records.Record]) -> tuple[list[records.Record], str]:
    return self._of_encoders().read(rows)

  def check(self, rows: Sequence[records.Record]) -> None:
    self._of_encoders().check(rows)

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    return heads.add(found, key, self.labels)

  def of_model(self, found: Pretrained) -> Self | PooledClassification:
    """Returns this task for a decoder, or the task of encoders for an encoder."""
    if found.family.kind == families.ENCODER:
      return self._of_encoders().of_model(found)
    if self.pair:
      raise ValueError(
        f"task.pair {self.pair!r:.80}: {found.source} is a {found.config.family!r}, which reads "
        "one text; write both texts into task.text"
      )
    return super().of_model(found)

  def examples(self, rows: Sequence[records.Record]) -> list[Example]:
    """Returns the tokens of each text, followed by the index of its class, its only target."""
    return [
      self._example(row, f"record {n}", self.labels.index(templates.fill(self.label, row)))
      for n, row in enumerate(rows)
    ]

  def _example(self, row: records.Record, where: str, label: int) -> Example:
    ids = self.tokenizer.encode(templates.fill(self.text, row))
    if not ids:
      raise ValueError(f"{where}: the text has no tokens; add some")
    kept = ids[: self.max_length - 1]
    return Example(tokens=(*kept, label), prompt_length=len(kept), cut=len(ids) - len(kept))

  def choice_ids(self) -> list[int]:
    return list(range(len(self.labels)))

  def tokens(self, example: Example) -> list[TokenText]:
    """Returns the tokens of the text, and the name of its class as the learned one."""
    found = token_texts(self.tokenizer, example.inputs, learnt=())
    return [*found, TokenText(self.labels[example.targets[0]], 1, special=False, learnt=True)]

  def given(self, encoded: Sequence[Example]) -> list[dict[str, str]]:
    decode = self.tokenizer.decode
    return [
      {"prompt": decode(example.inputs), "wanted": self.labels[example.targets[0]]}
      for example in encoded
    ]

  def make_show(
    self, apply: Callable, encoded: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """Returns `weights -> the predicted class of each example`."""
    rows = -(-len(encoded) // share) * share
    [batch] = batches.eval_batches(
      encoded,
      rows,
      buckets=(max(len(each.inputs) for each in encoded),),
      pad_id=self.tokenizer.pad_id,
    )
    probabilities = self._probabilities(apply)

    def show(weights: PyTree) -> list[str]:
      found = questions.answers(
        lambda batch: put(probabilities(weights, batch)), [batch], self._of_encoders().answer
      )
      return [each["label"] for each in found]

    return show

  def _probabilities(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """The jitted step `(weights, batch) -> the probability of each class`, [rows, classes]."""

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> jax.Array:
      logits_B1K = apply({"params": weights}, batch["tokens"], at_BC=batch["at"])
      return jax.nn.softmax(logits_B1K[:, 0].astype(jnp.float32), axis=-1)

    return step

  # ---- answers for texts of one's own

  def asked(self, given: str) -> list[Example]:
    rows = questions.records_of(given, [self.text])
    return [self._example(row, f"{given[:200]}: record {n}", 0) for n, row in enumerate(rows)]

  def predict(
    self,
    apply: Callable,
    weights: PyTree,
    encoded: Sequence[Example],
    *,
    batch_size: int,
    watch: Watch = iter,
  ) -> list[questions.Answer]:
    """As `EncodedTexts.predict`."""
    step = self._probabilities(apply)
    data = watch(self.eval_batches(encoded, batch_size))
    return questions.answers(lambda batch: step(weights, batch), data, self._of_encoders().answer)

  def prompts(self, *unused: Any) -> NoReturn:
    raise ValueError("the task classification writes no texts; leave --beams out")

  def check_room(self, *unused: Any) -> NoReturn:
    raise ValueError("the task classification writes no texts")

  def write(self, *unused: Any, **how: Any) -> NoReturn:
    raise ValueError("the task classification writes no texts")

  def longest_choice(self) -> NoReturn:
    raise ValueError("the task classification writes no texts; use experiments.evaluate")

  @property
  def chat_format(self) -> NoReturn:
    raise ValueError("the task classification writes no texts; use experiments.evaluate")
