"""Gradient accumulation: the gradient of a large batch in the memory of a small one.

    value_and_grad = accumulated(loss_of, parts=4)
    (loss, tokens), grads = value_and_grad(trainable, batch)      # as from the whole batch at once

The loss of a batch is a mean over its tokens, and the parts of a batch do not have equally many. So
a part's loss and gradient count by its tokens; a mean of the parts' means would be another loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import promotion

PyTree = Any


def accumulated(loss_of: Callable, parts: int) -> Callable:
  """Makes `(trainable, batch) -> ((loss, tokens), grads)`, taken over some rows at a time.

      loss = Σ tokens_n · loss_n / Σ tokens_n        grads = Σ tokens_n · grads_n / Σ tokens_n

  One `lax.scan` over the parts, so a step has one of them in memory, and beside it one float32
  array for each that trains. Part n has the rows n, n + parts, n + 2 · parts, …: where the rows of
  a batch are sharded over devices, each device keeps rows of its own in every part.

  Args:
    loss_of: `(trainable, batch, n) -> (mean loss, tokens)` of part n, an int32 scalar; `tokens` is
      how many the loss is a mean of.
    parts: into how many equal parts the rows are cut, at least 1; 1 is `jax.value_and_grad`.

  Returns:
    The function. Its gradients have the dtypes of `trainable`. It raises ValueError for a batch
    whose rows are no multiple of `parts`; every array of a batch has its rows first.

  Raises:
    ValueError: when `parts` is less than 1.
  """
  if parts < 1:
    raise ValueError(f"parts is {parts}; a batch has at least 1 part")
  value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

  def whole(trainable: PyTree, batch: PyTree):
    return value_and_grad(trainable, batch, jnp.int32(0))

  def in_parts(trainable: PyTree, batch: PyTree):
    def add(sums, part):
      loss_sum, tokens_sum, grad_sums = sums
      (loss, tokens), grads = value_and_grad(trainable, *part)
      grad_sums = jax.tree.map(lambda s, g: s + tokens * g.astype(s.dtype), grad_sums, grads)
      return (loss_sum + tokens * loss, tokens_sum + tokens, grad_sums), None

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, promotion.at_least_float32(x.dtype)), trainable
    )
    start = jnp.float32(0), jnp.float32(0), zeros
    batches = jax.tree.map(lambda x: _cut(x, parts), batch)
    (loss_sum, tokens, grad_sums), _ = jax.lax.scan(add, start, (batches, jnp.arange(parts)))
    share = 1 / jnp.where(tokens > 0, tokens, 1)
    grads = jax.tree.map(lambda s, x: (share * s).astype(x.dtype), grad_sums, trainable)
    return (share * loss_sum, tokens), grads

  return whole if parts == 1 else in_parts


def _cut(rows: jax.Array, parts: int) -> jax.Array:
  """[parts, rows / parts, ...] of [rows, ...], every part taken from all over the rows."""
  if rows.shape[0] % parts:
    raise ValueError(
      f"a batch of {rows.shape[0]} rows has no {parts} equal parts; choose a batch size that is a "
      "multiple of them"
    )
  return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
