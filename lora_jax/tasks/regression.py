"""Regression on texts or pairs by an encoder: one output at the first token, mean squared error.

task.name = "regression"
task.text, task.pair = "{s1}", "{s2}"    # templates; a pair of "" for none
task.label = "{score}"                   # a template for a number

The model is transformers' `...ForSequenceClassification` with one label; pooler and head are as in
`lora_jax.tasks.pooled_classification`. The metrics are Pearson's and Spearman's correlations.
"""

import dataclasses
import math
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
from lora_jax.train.step import Batch, Objective

PyTree = Any

OUTPUT = "score"
"""The name of the head's output, `id2label` of a config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(EncodedTexts):
  """See the module; its fields are those of `EncodedTexts`."""

  NAME: ClassVar[str] = "regression"
  FIELDS: ClassVar[tuple[str, ...]] = ("text", "pair", "label")
  TRAINS: ClassVar[tuple[str, ...]] = ("(head|pooler)/.*",)

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    check_loss_chunk(loss_chunk)
    return cls(
      text=task["text"],
      pair=task["pair"],
      label=task["label"],
      max_length=data["max_length"],
      buckets=tuple(data["buckets"]),
    )

  def target(self, row: records.Record, where: str) -> float:
    return number(templates.fill(self.label, row), where)

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    return heads.add(found, key, (OUTPUT,))

  def objective(self, apply: Callable) -> Objective:
    run = self.run(apply)

    def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
      rows = jnp.sum(batch["weights"])
      total = jnp.sum(_squares(run(weights, batch), batch) * batch["weights"])
      return total / jnp.where(rows > 0, rows, 1), rows

    return objective

  def make_eval_step(self, apply: Callable) -> Callable:
    run = self.run(apply)

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      said_B1 = run(weights, batch)
      kept = {name: batch[name] for name in ("targets", "weights")}
      return kept | {"said": said_B1, "square": _squares(said_B1, batch)}

    return step

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    said, wanted, squares = scores.rows_of(outputs, "said", "targets", "square")
    return {
      "loss": float(np.mean(squares, dtype=np.float64)),
      **scores.correlations(said, wanted),
      "rows": len(said),
    }

  def line(self, metrics: Mapping[str, float]) -> str:
    return (
      f"Pearson {metrics['pearson']:.3f}, Spearman {metrics['spearman']:.3f}, squared error "
      f"{metrics['loss']:.3f} on {metrics['rows']} examples"
    )

  def words(self, target: float) -> str:
    return f"{target:g}"

  def _answers(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    run = self.run(apply)
    return jax.jit(lambda weights, batch: run(weights, batch)[:, 0].astype(jnp.float32))

  def said(self, output: np.ndarray) -> str:
    return f"{output:.3f}"

  def answer(self, output: np.ndarray) -> Answer:
    return {"score": float(output)}

  def reading(self, apply: Callable, hidden: bool) -> Any:
    raise ValueError("the task regression has no logits to learn from a teacher; set it to none")


def number(text: str, where: str) -> float:
  """Returns a label as a finite number; raises ValueError for any other text."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not math.isfinite(value):
    raise ValueError(f"{where}: its label {shown(text)} is not a finite number")
  return value


def check_loss_chunk(loss_chunk: int) -> None:
  """Raises ValueError for a loss in chunks, since an encoder has one output per row."""
  if loss_chunk:
    raise ValueError(
      f"train.loss_chunk {loss_chunk}: is for logits of many tokens, and a text is read as a "
      "whole; set it to 0"
    )


def _squares(said_B1: jax.Array, batch: Batch) -> jax.Array:
  return jnp.square(said_B1.astype(jnp.float32) - batch["targets"])
