"""Gradient accumulation: the gradient of a large batch in the memory of a small one.

    value_and_grad = accumulated(loss_of, parts=4)
    (loss, tokens), grads = value_and_grad(trainable, batch)      # as from the whole batch at once

The loss of a batch is a mean over its tokens, and the parts of a batch differ in their number of
tokens. So the loss and gradient of a part are weighted by its tokens; an unweighted mean over parts
would be another loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import promotion

PyTree = Any


def accumulated(loss_of: Callable, parts: int) -> Callable:
  """Makes `(trainable, batch) -> ((loss, tokens), grads)`, over part of the rows at a time.

      loss = Σ tokens_n · loss_n / Σ tokens_n        grads = Σ tokens_n · grads_n / Σ tokens_n

  It is one `lax.scan` over the parts. A step has only one part in memory, plus one float32 array
  for each trained array. Part n has the rows n, n + parts, n + 2 · parts, …: if the rows of a batch
  are sharded over devices, each device keeps rows of its own in every part.

  Args:
    loss_of: `(trainable, batch, n) -> (mean loss, tokens)` of part n, an int32 scalar; `tokens` is
      the number of tokens in the mean.
    parts: the number of equal parts of the rows, at least 1; 1 is `jax.value_and_grad`.

  Returns:
    The function. Its gradients have the dtypes of `trainable`. It raises ValueError for a batch
    whose rows are not a multiple of `parts`. The first axis of every array of a batch is the rows.

  Raises:
    ValueError: if `parts` is less than 1.
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
  """Cuts [rows, ...] to [parts, rows / parts, ...], each part with rows from all over the batch."""
  if rows.shape[0] % parts:
    raise ValueError(
      f"a batch of {rows.shape[0]} rows has no {parts} equal parts; choose a batch size that is a "
      "multiple of them"
    )
  return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
