"""Text embeddings by an encoder: texts with the same meaning have similar vectors.

task.name = "embedding"
task.text, task.pair = "{s1}", "{s2}"    # templates of two texts, encoded separately
task.label = "{score}"                   # template of their similarity; "" if all pairs are similar
task.positive = 4.0                      # pairs of at least this score are trained on
task.temperature = 0.05

A text's embedding is the normalized mean of its tokens' vectors (Reimers and Gurevych 2019,
"Sentence-BERT", section 3). With a and b the embeddings of the pairs of a batch, the loss is the
cross-entropy of selecting each second text among those of the batch,

    mean_i −log( exp(a_i · b_i / temperature) / Σ_j exp(a_i · b_j / temperature) )

(Henderson et al. 2017, "Efficient Natural Language Response Suggestion", section 4.4; InfoNCE of
van den Oord et al. 2018). With `train.accumulate` the negatives come from the same microbatch. The
metrics are correlations of the cosine a_i · b_i with the scores. The model's pooler is not used and
is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checks import shown
from lora_jax.data import records, templates
from lora_jax.data.batches import Shard
from lora_jax.data.encoded import EncodedExample
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import scores
from lora_jax.tasks.encoded_texts import Answer, EncodedTexts
from lora_jax.tasks.regression import check_loss_chunk, number
from lora_jax.train.step import Batch, Objective

PyTree = Any

_SMALLEST = 1e-12  # the smallest norm to divide by, as in torch.nn.functional.normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(EncodedTexts):
  """See the module; its other fields are those of `EncodedTexts`.

  positive: the lowest score of a training pair.
  temperature: the divisor of the cosines.
  """

  NAME: ClassVar[str] = "embedding"
  FIELDS: ClassVar[tuple[str, ...]] = ("text", "pair", "label", "positive", "temperature")
  APART: ClassVar[bool] = True

  positive: float
  temperature: float

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    check_loss_chunk(loss_chunk)
    if not task["pair"]:
      raise ValueError("task.pair is empty; an embedding is learned from pairs of texts")
    return cls(
      text=task["text"],
      pair=task["pair"],
      label=task["label"],
      positive=task["positive"],
      temperature=task["temperature"],
      max_length=data["max_length"],
      buckets=tuple(data["buckets"]),
    )

  def target(self, row: records.Record, where: str) -> float:
    return number(templates.fill(self.label, row), where) if self.label else self.positive

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    if not getattr(found.config, "pooler", False):
      return found
    config = dataclasses.replace(found.config, pooler=False)
    params = {name: x for name, x in found.params.items() if name != "pooler"}
    return dataclasses.replace(found, config=config, params=params)

  # ---- batches; in training, of similar pairs only

  def _alike(self, found: Sequence[EncodedExample]) -> list[EncodedExample]:
    alike = [example for example in found if example.target >= self.positive]
    if not alike:
      raise ValueError(
        f"task.positive {self.positive:g}: no pair to train on has a score of at least that; use a "
        "lower one"
      )
    return alike

  def train_batches(
    self, found: Sequence[EncodedExample], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return super().train_batches(self._alike(found), batch_size, seed=seed, **rows)

  def summary(self, found: Sequence[EncodedExample], batch_size: int) -> dict[str, Any]:
    return super().summary(self._alike(found), batch_size)

  def describe(self, **found: Sequence[EncodedExample]) -> dict[str, Any]:
    return super().describe(**found) | {"alike": len(self._alike(found["training"]))}

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    if type(alike := described.get("alike")) is not int:
      raise ValueError(f"data alike is {shown(alike)}")
    told = f"training: {alike:,} pairs have a score of {self.positive:g} or more, and are learned"
    return [*super().lines(described), told]

  # ---- training and evaluation

  def vectors(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """Returns `(weights, batch) -> embeddings`, [texts, D] in float32, row by row."""
    run = self.hidden(apply)

    def embed(weights: PyTree, batch: Batch) -> jax.Array:
      return mean_pooled(run(weights, batch), self.mask(batch))

    return embed

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    return self.hidden(apply)

  def _pairs(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    embed = self.vectors(apply)
    return lambda weights, batch: embed(weights, batch).reshape(len(batch["weights"]), 2, -1)

  def objective(self, apply: Callable) -> Objective:
    embed = self._pairs(apply)

    def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
      losses_B1 = self._losses(embed(weights, batch), batch)
      rows = jnp.sum(batch["weights"])
      return jnp.sum(losses_B1 * batch["weights"]) / jnp.where(rows > 0, rows, 1), rows

    return objective

  def _losses(self, pairs_B2D: jax.Array, batch: Batch) -> jax.Array:
    """The cross-entropy of each row's second text among those of all rows, [B, 1]."""
    logits_BB = pairs_B2D[:, 0] @ pairs_B2D[:, 1].T / self.temperature
    # Padding rows are no candidates.
    logits_BB = jnp.where(batch["weights"][:, 0] > 0, logits_BB, jnp.finfo(jnp.float32).min)
    return (jax.nn.logsumexp(logits_BB, axis=-1) - jnp.diagonal(logits_BB))[:, None]

  def make_eval_step(self, apply: Callable) -> Callable:
    embed = self._pairs(apply)

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      pairs_B2D = embed(weights, batch)
      alike_B1 = batch["weights"] * (batch["targets"] >= self.positive)
      kept = {name: batch[name] for name in ("targets", "weights")}
      return kept | {
        "cosine": jnp.sum(pairs_B2D[:, 0] * pairs_B2D[:, 1], axis=-1, keepdims=True),
        "loss": self._losses(pairs_B2D, batch),
        "alike": alike_B1,
      }

    return step

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    cosines, wanted, losses, alike = scores.rows_of(outputs, "cosine", "targets", "loss", "alike")
    count = alike.sum()
    loss = float(losses.astype(np.float64) @ alike / count) if count else math.nan
    known = scores.correlations(cosines, wanted) if self.label else {}
    return {"loss": loss, **known, "pairs": int(count), "rows": len(cosines)}

  def line(self, metrics: Mapping[str, float]) -> str:
    known = f"Spearman of cosines {metrics['spearman']:.3f}, " if self.label else ""
    return (
      f"{known}loss {metrics['loss']:.3f} of {metrics['pairs']} pairs that are alike, "
      f"{metrics['rows']} pairs in all"
    )

  def words(self, target: float) -> str:
    return f"{target:g}"

  def _answers(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    embed = self._pairs(apply)

    def cosines(weights: PyTree, batch: Batch) -> jax.Array:
      pairs_B2D = embed(weights, batch)
      return jnp.sum(pairs_B2D[:, 0] * pairs_B2D[:, 1], axis=-1)

    return jax.jit(cosines)

  def said(self, output: np.ndarray) -> str:
    return f"cosine {output:.3f}"

  def reading(self, apply: Callable, hidden: bool) -> Any:
    raise ValueError("the task embedding has no logits to learn from a teacher; set it to none")

  # ---- answers: the embedding of each text

  def asked(self, given: str) -> list[EncodedExample]:
    return super(Embedding, self._alone).asked(given)

  def predict(
    self, apply: Callable, weights: PyTree, found: Sequence[EncodedExample], **how: Any
  ) -> list[Answer]:
    return super(Embedding, self._alone).predict(apply, weights, found, **how)

  @property
  def _alone(self) -> Self:
    """Returns the task for single texts, with the template of the first."""
    return dataclasses.replace(self, pair="")

  def _predictions(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    return jax.jit(self.vectors(apply))

  def answer(self, output: np.ndarray) -> Answer:
    return {"embedding": output.tolist()}


def mean_pooled(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """The normalized mean of the vectors of a text's tokens, [B, D] in float32.

  A row without a token is zero.
  """
  counted_BT1 = mask_BT.astype(jnp.float32)[..., None]
  counts_B1 = jnp.maximum(jnp.sum(counted_BT1, axis=1), 1)
  mean_BD = jnp.sum(hidden_BTD.astype(jnp.float32) * counted_BT1, axis=1) / counts_B1
  squares_B1 = jnp.sum(jnp.square(mean_BD), axis=-1, keepdims=True)
  # The square root is not differentiable at zero.
  return mean_BD * jax.lax.rsqrt(jnp.maximum(squares_B1, _SMALLEST**2))
