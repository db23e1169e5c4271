"""Loss and accuracy over a whole split.

    eval_step = make_eval_step(lora_jax.adapt(model.apply), choices=[positive_id, negative_id])
    evaluate(eval_step, weights, batches)
    # {"loss": 0.41, "accuracy": 0.87, "tokens": 800, "rows": 400}

The shapes' letters are those of `lora_jax.train.step`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import sharding
from lora_jax.train.chunked_loss import chunked_loss
from lora_jax.train.step import Batch, completion_loss

PyTree = Any


def make_eval_step(apply: Callable, choices: Sequence[int], chunk: int = 0) -> Callable:
  """Makes the jitted step `(weights, batch) -> sums` of one batch.

  A row's answer is the choice with the highest logit at the row's first completion position. It is
  correct if it is the row's first target. Answers of several tokens are thus compared by their
  first token.

  Args:
    apply: `apply({"params": weights}, tokens_BT, at_BC=positions) -> logits_BCV`.
    choices: the token ids of the possible answers; empty if the task has no fixed answers.
    chunk: the positions of a row whose logits are in memory at a time, as in `chunked_loss`, for an
      `apply` with its methods; 0 for all of them at once.

  Returns:
    The step. Its sums are `loss` (nats), `tokens`, `rows` and, with choices, `correct`. Rows of
    weight zero are padding and are not counted.

  Raises:
    ValueError: if two choices have the same id.
  """
  if len(set(choices)) != len(choices):
    raise ValueError(
      f"choices {list(choices)} hold one id twice: answers that begin with the same token cannot "
      "be told apart by it; change the completions so that their first tokens differ"
    )

  def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
    if chunk:
      variables = {"params": weights}
      hidden_BCD = apply(variables, batch["tokens"], at_BC=batch["at"], method="hidden")
      loss, tokens = chunked_loss(apply, weights, hidden_BCD, batch, chunk)
      first_BV = apply(variables, hidden_BCD[:, :1], method="logits")[:, 0]
    else:
      logits_BCV = apply({"params": weights}, batch["tokens"], at_BC=batch["at"])
      loss, tokens = completion_loss(logits_BCV, batch["targets"], batch["weights"])
      first_BV = logits_BCV[:, 0]
    real_B = batch["weights"][:, 0] > 0
    sums = {"loss": loss * tokens, "tokens": tokens, "rows": jnp.sum(real_B)}
    if choices:
      ids = jnp.asarray(choices)
      answers_B = ids[jnp.argmax(first_BV[:, ids], axis=-1)]
      sums["correct"] = jnp.sum(real_B & (answers_B == batch["targets"][:, 0]))
    return sums

  return jax.jit(step)


def figures(outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the figures of a pass, from the sums that `make_eval_step`'s step returned per batch.

  Returns:
    `loss` (nats per token), `tokens`, `rows` and, with choices, `accuracy` (0..1).

  Raises:
    ValueError: if the batches hold no row.
  """
  total = {key: math.fsum(part[key] for part in outputs) for key in (outputs[0] if outputs else ())}
  if not total or total["rows"] == 0:
    raise ValueError("there is no row to evaluate on: the split is empty")
  result = {"loss": total["loss"] / total["tokens"]}
  if "correct" in total:
    result["accuracy"] = total["correct"] / total["rows"]
  return result | {"tokens": int(total["tokens"]), "rows": int(total["rows"])}


def evaluate(
  eval_step: Callable,
  weights: PyTree,
  batches: Iterable[Batch],
  metrics: Callable[[Sequence[Any]], dict[str, float]] = figures,
) -> dict[str, float]:
  """Evaluates a whole split: `metrics` of the step's outputs.

  Args:
    eval_step: `(weights, batch) -> outputs`, as `make_eval_step` returns it.
    weights: the whole tree, trainable and frozen part joined.
    batches: the split, once.
    metrics: maps the outputs of all batches, as numpy arrays, to figures; may raise ValueError.
  """
  # A batch is read while the next one is computed, so the device never waits for an output, and a
  # counter of batches (such as a progress bar) shows the device's progress.
  outputs, late = [], None
  for batch in batches:
    running = eval_step(weights, batch)
    if late is not None:
      outputs.append(sharding.gather(late))
    late = running
  if late is not None:
    outputs.append(sharding.gather(late))
  return metrics(outputs)
