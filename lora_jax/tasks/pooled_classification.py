"""Classification of texts or pairs by an encoder: a pooler and a head at the first token.

The pooler is a dense layer and its activation. BERT's is loaded if the files have it; RoBERTa's and
DistilBERT's is new. Pooler and head train in full. In PEFT they are the `modules_to_save` of a
`SEQ_CLS`: `classifier`, and for BERT and DistilBERT the pooler under its own name.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checks import shown
from lora_jax.data import records, templates
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import heads, scores
from lora_jax.tasks.encoded_texts import Answer, EncodedTexts
from lora_jax.train.step import Batch, Objective, completion_loss

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledClassification(EncodedTexts):
  """See the module; its other fields are those of `EncodedTexts`.

  labels: the names of the classes.
  """

  NAME: ClassVar[str] = "classification"
  TARGET: ClassVar[Any] = jnp.int32
  TRAINS: ClassVar[tuple[str, ...]] = ("(head|pooler)/.*",)

  labels: tuple[str, ...]

  def target(self, row: records.Record, where: str) -> int:
    if (found := templates.fill(self.label, row)) not in self.labels:
      raise ValueError(
        f"{where}: its label {shown(found)} is not one of task.labels {shown(self.labels)}"
      )
    return self.labels.index(found)

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    return heads.add(found, key, self.labels)

  def of_model(self, found: Pretrained) -> Self:
    bound = super().of_model(found)
    if found.config.classes != self.labels:
      raise ValueError(
        f"task.labels {shown(self.labels)}: {found.source} has "
        f"{f'the classes {shown(found.config.classes)}' if found.config.classes else 'no head'}"
      )
    return bound

  def objective(self, apply: Callable) -> Objective:
    run = self.run(apply)

    def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
      return _loss(run(weights, batch), batch)

    return objective

  def make_eval_step(self, apply: Callable) -> Callable:
    run, classes = self.run(apply), len(self.labels)

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      logits_BC = run(weights, batch)
      loss, rows = _loss(logits_BC, batch)
      wanted_BC = jax.nn.one_hot(batch["targets"][:, 0], classes)
      said_BC = jax.nn.one_hot(jnp.argmax(logits_BC, axis=-1), classes)
      confusion = jnp.einsum("b,bi,bj->ij", batch["weights"][:, 0], wanted_BC, said_BC)
      return {"loss": loss * rows, "rows": rows, "confusion": confusion}

    return step

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = scores.added(outputs)
    figures = scores.of_confusion(np.rint(total["confusion"]).astype(int))
    return {"loss": float(total["loss"] / total["rows"]), **figures, "rows": int(total["rows"])}

  def line(self, metrics: Mapping[str, float]) -> str:
    return (
      f"accuracy {metrics['accuracy']:.1%}, F1 {metrics['f1']:.3f}, Matthews "
      f"{metrics['matthews']:.3f}, loss {metrics['loss']:.3f} on {metrics['rows']} examples"
    )

  def words(self, target: int) -> str:
    return self.labels[target]

  def _answers(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    run = self.run(apply)
    return jax.jit(
      lambda weights, batch: jax.nn.softmax(run(weights, batch).astype(jnp.float32), axis=-1)
    )

  def said(self, output: np.ndarray) -> str:
    return self.labels[int(np.argmax(output))]

  def answer(self, output: np.ndarray) -> Answer:
    shares = dict(zip(self.labels, output.tolist(), strict=True))
    return {"label": self.said(output), "probabilities": shares}


def _loss(logits_BC: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """The mean cross-entropy of the rows with weight, in nats, and their number."""
  return completion_loss(logits_BC[:, None], batch["targets"], batch["weights"])
