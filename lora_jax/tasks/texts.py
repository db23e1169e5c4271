"""The base of tasks on text: batches of tokens, the loss at chosen positions, and its metrics."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp

from lora_jax.checks import shown
from lora_jax.data import batches, examples, packing
from lora_jax.data.batches import Shard
from lora_jax.data.examples import Example
from lora_jax.data.token_texts import TokenText, token_texts
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import tables
from lora_jax.train import evaluation, step
from lora_jax.train.chunked_loss import chunked_completion_objective
from lora_jax.train.distillation import Reading
from lora_jax.train.step import Batch, Objective, model_options

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(tables.OfTables):
  """A task whose examples are tokens and targets; see `lora_jax.tasks.Task` for its methods.

  max_length: the most tokens of an example.
  buckets: increasing lengths that batches are padded to; a step compiles once for each.
  packed_length: tokens of a row of several examples; 0: one example per row.
  loss_chunk: positions of a row whose logits are in memory at a time; 0 for all.
  model: the model without its weights; None until `of_model`.
  """

  max_length: int
  buckets: tuple[int, ...]
  packed_length: int
  loss_chunk: int
  model: Pretrained | None = None

  TRAINS: ClassVar[tuple[str, ...]] = ()

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    del key
    return found

  def choice_ids(self) -> list[int]:
    """Returns the token ids of the choices, for the accuracy; empty for free answers."""
    raise NotImplementedError

  def of_model(self, found: Pretrained) -> Self:
    if found.tokenizer is None:
      raise ValueError(
        f"{found.source}: a {found.config.family!r} takes no text, and the task is on text"
      )
    positions = found.config.max_length
    check_positions(
      found.config, self.max_length - 1, f"data.max_length {self.max_length}", positions + 1
    )
    # The weights stay with the caller.
    return dataclasses.replace(self, model=dataclasses.replace(found, params={}))

  def describe(self, **encoded: Sequence[Example]) -> dict[str, Any]:
    return {
      "max_length": self.max_length,
      "positions": self.known_model.config.max_length,
      "splits": {name: examples.describe(each) for name, each in encoded.items()},
    }

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    _check_described(described)
    found = []
    for name, split in described["splits"].items():
      line = (
        f"{name}: {split['cut']:,} of {split['examples']:,} prompts cut to max_length "
        f"{described['max_length']:,}; the longest input has {split['longest']:,} tokens, the "
        f"model {described['positions']:,} positions"
      )
      if split["shared"]:
        line += (
          f"; {split['shared']:,} prompts share a token with their completion, as where the space "
          "between them is the prompt's last character"
        )
      found.append(line)
    return found

  def tokens(self, example: Example) -> list[TokenText]:
    learnt = {n + 1 for n in example.positions}
    return token_texts(self.tokenizer, example.tokens, learnt)

  # ---- batches

  def train_batches(
    self, encoded: Sequence[Example], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    pad_id = self.tokenizer.pad_id
    if self.packed_length:
      return packing.packed_batches(
        encoded, batch_size, length=self.packed_length, seed=seed, pad_id=pad_id, **rows
      )
    return batches.train_batches(
      encoded, batch_size, buckets=self.buckets, seed=seed, pad_id=pad_id, **rows
    )

  def eval_batches(
    self, encoded: Sequence[Example], batch_size: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    pad_id = self.tokenizer.pad_id
    return batches.eval_batches(encoded, batch_size, buckets=self.buckets, pad_id=pad_id, **rows)

  def shape_of(self, batch: Batch) -> tuple[int, int]:
    return batch["tokens"].shape

  def summary(self, encoded: Sequence[Example], batch_size: int) -> dict[str, Any]:
    if self.packed_length:
      return packing.summary(encoded, batch_size, self.packed_length)
    return batches.summary(encoded, batch_size, self.buckets)

  def batch_of(self, shape: tuple[int, int], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    length, targets = shape
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    at = jax.ShapeDtypeStruct((rows, targets), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, targets), jnp.float32)
    packed = {"segments": tokens} if self.packed_length else {}
    return {"tokens": tokens, "at": at, "targets": at, "weights": weights} | packed

  def words_of(self, shape: tuple[int, int]) -> str:
    length, targets = shape
    return f"{length} tokens, {targets} of them learned at most"

  # ---- training and evaluation

  def forward(self, model: nn.Module) -> Callable:
    return model.apply

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    return lambda weights, batch: apply(
      {"params": weights}, batch["tokens"], segments_BT=batch.get("segments")
    )

  def mask(self, batch: Batch) -> jax.Array:
    """Returns True [rows, tokens] up to the last position of a row whose next token is learned."""
    last_B = jnp.where(batch["weights"] > 0, batch["at"], -1).max(axis=1)
    return jnp.arange(batch["tokens"].shape[1]) <= last_B[:, None]

  def objective(self, apply: Callable) -> Objective:
    if self.loss_chunk:
      return chunked_completion_objective(apply, self.loss_chunk)
    return step.completion_objective(apply)

  def reading(self, apply: Callable, hidden: bool) -> Callable[[PyTree, Batch], Reading]:
    if self.loss_chunk:
      raise ValueError(
        f"train.loss_chunk {self.loss_chunk}: what a teacher says is compared logit by logit, all "
        "at once; set it to 0, and train.accumulate to hold fewer rows"
      )

    def read(weights: PyTree, batch: Batch) -> Reading:
      variables, options = {"params": weights}, model_options(batch)
      if not hidden:
        return apply(variables, batch["tokens"], **options)
      hidden_BCD = apply(variables, batch["tokens"], method="hidden", **options)
      return apply(variables, hidden_BCD, method="logits"), hidden_BCD

    return read

  def answers(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return batch["targets"], batch["weights"]

  def make_eval_step(self, apply: Callable) -> Callable:
    return evaluation.make_eval_step(apply, self.choice_ids(), self.loss_chunk)

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return evaluation.figures(outputs)

  def line(self, metrics: Mapping[str, float]) -> str:
    accuracy = f"accuracy {metrics['accuracy']:.1%}, " if "accuracy" in metrics else ""
    return f"{accuracy}loss {metrics['loss']:.3f} on {metrics['rows']} examples"


def check_positions(config: Any, tokens: int, field: str, most: int) -> None:
  """Raises ValueError for texts that exceed a model's positions.

  Args:
    config: of the model.
    tokens: the most tokens fed to the model.
    field: the source of that number, e.g. "data.max_length 4096".
    most: the largest value of the field.
  """
  if tokens > config.max_length:
    raise ValueError(
      f"{field}: up to {tokens:,} tokens are fed to the model, which has {config.max_length:,} "
      f"positions (max_position_embeddings); use {most:,} or less"
    )


def check_generation(prompts: Sequence[Sequence[int]], max_tokens: int, config: Any) -> None:
  """Raises ValueError if prompts and completions exceed a model's positions."""
  longest = max(map(len, prompts))
  check_positions(
    config,
    longest + max_tokens - 1,  # the last token is not fed to the model
    f"--max_tokens={max_tokens} after a prompt of {longest} tokens",
    max(config.max_length - longest + 1, 0),
  )


def _check_described(described: Mapping[str, Any]) -> None:
  splits = described.get("splits")
  if not isinstance(splits, dict) or not all(isinstance(x, dict) for x in splits.values()):
    raise ValueError(f"data splits is {shown(splits)}")
  values = {f"data {name}": described.get(name) for name in ("max_length", "positions")}
  for split in splits.values():
    values |= {f"data {name}": split.get(name) for name in ("cut", "examples", "longest", "shared")}
    for name, value in values.items():
      if type(value) is not int:
        raise ValueError(f"{name} is {shown(value)}")
