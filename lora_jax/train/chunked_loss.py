"""The loss of a language model without materializing all of its logits.

    objective = chunked_completion_objective(lora_jax.adapt(model.apply), chunk=64)

A vocabulary is about fifty times as wide as a small model. The logits of a batch, their float32
copies and their gradient are then most of a step's memory. Here the head is applied to `chunk`
positions of every row at a time, forward and backward, so that at most rows x chunk x vocabulary
logits are in memory. The backward pass recomputes them, which costs another forward pass of the
head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.train.step import Batch, Objective, completion_loss, model_options

PyTree = Any


def chunked_completion_objective(apply: Callable, chunk: int) -> Objective:
  """Makes the objective of `completion_objective`, up to rounding, in chunks of positions.

  The head may be tied to the embedding, adapted, or trained in full. Chunks are cut along the
  positions and not along the rows, so rows that are sharded over devices stay in place.
  Args:
    apply: the adapted `model.apply` of a module with two methods, `hidden(tokens_BT, at_BC=...) ->
      hidden_BCD` and `logits(hidden_BCD) -> logits_BCV`, as `lora_jax.models.llama.Llama` has.
    chunk: the positions of a row whose logits are in memory at a time, at least 1; from C on it is
      the plain loss.

  Returns:
    The objective, for the same batches as `completion_objective`.

  Raises:
    ValueError: if `chunk` is less than 1.
  """
  if chunk < 1:
    raise ValueError(f"chunk is {chunk}; it must be at least 1 position")

  def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    hidden_BCD = apply(
      {"params": weights}, batch["tokens"], method="hidden", **model_options(batch)
    )
    return chunked_loss(apply, weights, hidden_BCD, batch, chunk)

  return objective


def chunked_loss(
  apply: Callable, weights: PyTree, hidden_BCD: jax.Array, batch: Batch, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Returns (loss, tokens) as `completion_loss` does, from the inputs of the head.

  Args:
    apply: as in `chunked_completion_objective`.
    weights: the whole tree.
    hidden_BCD: the last hidden states at the positions of the targets.
    batch: the batch, of which the targets and their weights are used.
    chunk: as in `chunked_completion_objective`.
  """

  def loss_of(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    hidden_BKD, targets_BK, weights_BK = part
    logits_BKV = apply({"params": weights}, hidden_BKD, method="logits")
    return completion_loss(logits_BKV, targets_BK, weights_BK)

  whole = hidden_BCD, batch["targets"], batch["weights"]
  if hidden_BCD.shape[1] <= chunk:
    return loss_of(whole)

  @jax.checkpoint
  def add(sums, part):
    loss, tokens = loss_of(part)
    return (sums[0] + tokens * loss, sums[1] + tokens), None

  parts = jax.tree.map(lambda x_BC: _cut(x_BC, chunk), whole)
  (loss_sum, tokens), _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), parts)
  return loss_sum / jnp.where(tokens > 0, tokens, 1), tokens


def _cut(x_BC: jax.Array, chunk: int) -> jax.Array:
  """Cuts [B, C, ...] to [parts, B, chunk, ...], padded with zeros."""
  missing = -x_BC.shape[1] % chunk
  filled = jnp.pad(x_BC, ((0, 0), (0, missing)) + ((0, 0),) * (x_BC.ndim - 2))
  return jnp.moveaxis(filled.reshape(len(x_BC), -1, chunk, *x_BC.shape[2:]), 1, 0)
