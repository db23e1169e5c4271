"""Classes of texts: a decoder with a head of classes at the last token of a text.

task.name = "classification"
task.text = "{sentence}"                       # a template, see lora_jax.data.templates
task.label = "{label}"                         # another, which gives the name of a class
task.labels = ("negative", "positive")         # the names, in the order of the head's outputs

The head `head/kernel` [width, classes] is new. It starts from the run's seed, trains in full and is
saved with the adapter, as PEFT's `SEQ_CLS` does of `score`. The model is transformers'
`...ForSequenceClassification`, which reads a text's last token that is no padding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checks import shown
from lora_jax.data import batches, records, templates
from lora_jax.data.examples import Example
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import heads
from lora_jax.tasks.texts import Texts

PyTree = Any

HEAD = "head/kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Texts):
  """See the module; its other fields are those of `Texts`. A longer text loses its end.

  text, label: templates of a text and of the name of its class.
  labels: the names of the classes.
  """

  FIELDS: ClassVar[tuple[str, ...]] = ("text", "label", "labels")
  TRAINS: ClassVar[tuple[str, ...]] = (HEAD,)

  text: str
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
      text=task["text"], label=task["label"], labels=labels, max_length=data["max_length"],
      buckets=tuple(data["buckets"]), packed_length=0, loss_chunk=0,
    )  # fmt: skip

  def read(self, rows: Sequence[records.Record]) -> tuple[list[records.Record], str]:
    for name, template in {"text": self.text, "label": self.label}.items():
      records.check_values(rows, templates.fields(template), f"{name} template {template!r:.200}")
    return list(rows), ""

  def check(self, rows: Sequence[records.Record]) -> None:
    templates.check(self.text, rows, "text")
    templates.check(self.label, rows, "label")
    for number, row in enumerate(rows):
      if (found := templates.fill(self.label, row)) not in self.labels:
        raise ValueError(
          f"record {number}: its label {shown(found)} is none of task.labels {shown(self.labels)}"
        )

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    return heads.with_head(found, self.labels, key)

  def examples(self, rows: Sequence[records.Record]) -> list[Example]:
    """A text's tokens, and after them the number of its class, which is its one target."""
    found = []
    for number, row in enumerate(rows):
      ids = self.model.tokenizer.encode(templates.fill(self.text, row))
      if not ids:
        raise ValueError(f"record {number}: the text has no tokens; add some")
      kept = ids[: self.max_length - 1]
      label = self.labels.index(templates.fill(self.label, row))
      found.append(
        Example(tokens=(*kept, label), prompt_length=len(kept), cut=len(ids) - len(kept))
      )
    return found

  def choice_ids(self) -> list[int]:
    return list(range(len(self.labels)))

  def given(self, encoded: Sequence[Example]) -> list[dict[str, str]]:
    decode = self.model.tokenizer.decode
    return [
      {"prompt": decode(example.inputs), "wanted": self.labels[example.targets[0]]}
      for example in encoded
    ]

  def make_show(
    self, apply: Callable, encoded: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """The class that the model gives each example."""
    rows = -(-len(encoded) // share) * share
    [batch] = batches.eval_batches(
      encoded, rows, buckets=(max(len(each.inputs) for each in encoded),),
      pad_id=self.model.tokenizer.pad_id,
    )  # fmt: skip

    @jax.jit
    def classes(weights: PyTree, tokens_BT: jax.Array, at_B1: jax.Array) -> jax.Array:
      logits_B1K = apply({"params": weights}, tokens_BT, at_BC=at_B1)
      return jnp.argmax(logits_B1K[:, 0], axis=-1)

    def show(weights: PyTree) -> list[str]:
      found = np.asarray(put(classes(weights, batch["tokens"], batch["at"])))
      by_example = dict(zip(batch["index"].tolist(), found.tolist(), strict=True))
      return [self.labels[by_example[n]] for n in range(len(encoded))]

    return show

  def prompts(self, *unused: Any) -> NoReturn:
    raise ValueError("the task classification writes no texts; leave --beams out")

  def write(self, *unused: Any, **how: Any) -> NoReturn:
    raise ValueError("the task classification writes no texts")

  def longest_choice(self) -> NoReturn:
    raise ValueError("the task classification writes no texts; use experiments.evaluate")
