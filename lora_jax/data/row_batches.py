"""Batches of rows of one shape, shuffled with a seed, as `grain` datasets.

    batches = iter(train_batches(examples, 16, row=to_arrays, seed=0))
    batch = next(batches)
    state = batches.get_state()          # a small JSON dict; set_state resumes from it

`row` maps an example to a dict of arrays with the same shapes for all examples. The dict has
`weights`. A batch stacks the arrays. A row of padding is zeros, its weights too. In evaluation
`index` (B,) has the example's index, and -1 for padding. A batch is a pure function of the
examples, the arguments and the step.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lora_jax.data.batches import block, check_shards, permutation

Batch = dict[str, np.ndarray]
ToArrays = Callable[[Any], Mapping[str, np.ndarray]]


def train_batches(
  examples: Sequence[Any],
  batch_size: int,
  *,
  row: ToArrays,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless dataset of training batches; element `step` is the batch of that step.

  Every epoch takes each example once, in a new order. An incomplete batch is padded.

  Args:
    examples: of any kind.
    batch_size: rows of a batch, over all shards.
    row: the arrays of an example.
    seed: an integer of 0 or more; determines the batch together with the step.
    shard_index, shard_count: as in `lora_jax.data.batches.train_batches`.

  Raises:
    ValueError: for no examples, a batch size that the shards do not divide, or a negative seed.
  """
  if seed < 0:
    raise ValueError(f"seed {seed} must be 0 or more")
  _check(examples, batch_size, shard_index, shard_count)
  batches_per_epoch = -(-len(examples) // batch_size)

  # The iterator prefetches, so two epochs can be in use at once.
  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return permutation(len(examples), seed, epoch, 0)

  def batch(step: int) -> Batch:
    epoch, number = divmod(step, batches_per_epoch)
    rows = order(epoch)[number * batch_size : (number + 1) * batch_size]
    return _stack(examples, block(rows, batch_size, shard_index, shard_count), row)

  return grain.MapDataset.range(sys.maxsize).map(batch)


def eval_batches(
  examples: Sequence[Any],
  batch_size: int,
  *,
  row: ToArrays,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the dataset of one pass, each example once and in order, the last batch padded."""
  _check(examples, batch_size, shard_index, shard_count)

  def batch(number: int) -> Batch:
    rows = np.arange(number * batch_size, min((number + 1) * batch_size, len(examples)))
    own = block(rows, batch_size, shard_index, shard_count)
    return _stack(examples, own, row) | {"index": own.astype(np.int32)}

  return grain.MapDataset.range(-(-len(examples) // batch_size)).map(batch)


def summary(count: int, batch_size: int, shape: tuple[int, ...]) -> dict[str, Any]:
  """Returns the size of a pass, as described in `lora_jax.tasks.Task.summary`."""
  batches = -(-count // batch_size)
  return {
    "examples": count,
    "batches": batches,
    "shapes": {shape: batches},
    "padding": 1 - count / (batches * batch_size),
  }


def _check(examples: Sequence[Any], batch_size: int, shard_index: int, shard_count: int) -> None:
  if not examples:
    raise ValueError("no examples to make batches of")
  check_shards(batch_size, shard_index, shard_count)


def _stack(examples: Sequence[Any], indices: np.ndarray, row: ToArrays) -> Batch:
  rows = [row(examples[index]) if index >= 0 else None for index in indices]
  like = next((found for found in rows if found is not None), None) or row(examples[0])
  empty = {name: np.zeros_like(array) for name, array in like.items()}
  return {name: np.stack([(found or empty)[name] for found in rows]) for name in like}
