"""Packs several short examples into one row; no example attends to another.

  batches = iter(packed_batches(examples, batch_size=4, length=256, seed=0, pad_id=0))
  batch = next(batches)

A row of length 8 with examples of 3, 2 and 2 input tokens, and one padding token:

  tokens    a0 a1 a2 b0 b1 c0 c1 __
  segments   1  1  1  2  2  3  3  0

The arrays are those of `lora_jax.data.batches`, and `segments` (B, T) int32: the number of the
example that a token belongs to, 0 for padding. With segments a token attends only to earlier tokens
of its own segment, and positions start from 0 in each segment. So an example has the same loss and
gradient as in a row of its own. All batches have the same shape: a step compiles once.

A batch is a pure function of the examples, the arguments and the step: `packed_batches(...)[step]`.

Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", arXiv
2107.02027, for the masks and for packing by length.
"""

import bisect
import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from lora_jax.data.batches import Batch, check_shards, permutation
from lora_jax.data.examples import Example

Row = list[int]
"""The numbers of the examples in a row, in their order there."""


def packed_batches(
  examples: Sequence[Example],
  batch_size: int,
  length: int,
  seed: int,
  pad_id: int,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless dataset of packed training batches; element `step` is that step's batch.

  Every epoch takes each example once and shuffles the rows. Rows are packed by length; examples of
  the same length are shuffled in each epoch.

  Args:
    examples: from `lora_jax.data.examples.encode`.
    batch_size: rows of a batch, over all shards; the last batch of an epoch is padded with empty
      rows of weight 0.
    length: tokens of a row, at least those of the longest example's input. The cost of attention is
      quadratic in it; a few times the mean length packs well.
    seed: an integer of 0 or more; determines the batch together with the step.
    pad_id: the token that pads a row; any token of the vocabulary suffices.
    shard_index, shard_count: as in `lora_jax.data.batches.train_batches`.

  Raises:
    ValueError: for no examples, an example longer than a row, a batch size that the shards do not
      divide, or a negative seed.
  """
  if seed < 0:
    raise ValueError(f"seed {seed} must be 0 or more")
  check_shards(batch_size, shard_index, shard_count)
  _check(examples, length)
  first = pack(examples, np.arange(len(examples)), length)
  width = _width(examples, first)
  batches_per_epoch = -(-len(first) // batch_size)

  # The iterator prefetches, so two epochs can be in use at once.
  @functools.lru_cache(maxsize=2)
  def plan(epoch: int) -> list[Row]:
    rows = pack(examples, permutation(len(examples), seed, epoch, 0), length)
    rows += [[]] * (batches_per_epoch * batch_size - len(rows))
    return [rows[i] for i in permutation(len(rows), seed, epoch, 1)]

  def batch(step: int) -> Batch:
    epoch, number = divmod(step, batches_per_epoch)
    share = batch_size // shard_count
    start = number * batch_size + shard_index * share
    return _assemble(examples, plan(epoch)[start : start + share], length, width, pad_id)

  return grain.MapDataset.range(sys.maxsize).map(batch)


def summary(examples: Sequence[Example], batch_size: int, length: int) -> dict[str, Any]:
  """Returns the size of a pass over the packed examples.

  Args:
    examples, batch_size, length: as in `packed_batches`.

  Returns:
    {"examples": number of them, "cut": number of those with a shortened prompt,
    "batches": batches of a pass, "shapes": {(T, C): number of batches}, one entry,
    "padding": fraction of all token slots that are padding, from 0 to 1}, as in
    `lora_jax.data.batches`.

  Raises:
    ValueError: as `packed_batches`.
  """
  _check(examples, length)
  rows = pack(examples, np.arange(len(examples)), length)
  batches = -(-len(rows) // batch_size)
  tokens = sum(len(example.inputs) for example in examples)
  return {
    "examples": len(examples),
    "cut": sum(example.cut > 0 for example in examples),
    "batches": batches,
    "shapes": {(length, _width(examples, rows)): batches},
    "padding": 1 - tokens / (batches * batch_size * length),
  }


def pack(examples: Sequence[Example], order: np.ndarray, length: int) -> list[Row]:
  """Returns rows of examples that fit in `length` tokens: best fit, the longest first.

  Examples with the same numbers of inputs and targets are interchangeable. The number of rows, and
  the inputs and targets of each, are therefore the same for every `order`.

  Args:
    examples: none longer than a row.
    order: the indices of the examples; it decides between interchangeable ones.
    length: tokens of a row.
  """
  sizes = [(len(example.inputs), len(example.targets)) for example in examples]
  rows: list[Row] = []
  open_rows: dict[int, list[Row]] = defaultdict(list)  # by their free space
  rooms: list[int] = []  # the keys of `open_rows`, increasing
  for number in sorted(order, key=lambda i: sizes[i], reverse=True):
    needed, _ = sizes[number]
    best = bisect.bisect_left(rooms, needed)
    if best == len(rooms):
      row, room = [], length
      rows.append(row)
    else:
      room = rooms[best]
      row = open_rows[room].pop()
      if not open_rows[room]:
        rooms.pop(best)
    row.append(int(number))
    left = room - needed
    if not open_rows[left]:
      bisect.insort(rooms, left)
    open_rows[left].append(row)
  return rows


def _check(examples: Sequence[Example], length: int) -> None:
  if not examples:
    raise ValueError("no examples to make batches of")
  longest = max(range(len(examples)), key=lambda i: len(examples[i].inputs))
  needed = len(examples[longest].inputs)
  if needed > length:
    raise ValueError(
      f"example {longest} has {needed} input tokens, more than a row of {length}; make rows of at "
      f"least {needed} or encode with max_length <= {length + 1}"
    )


def _width(examples: Sequence[Example], rows: Sequence[Row]) -> int:
  """The most targets of a row."""
  return max(sum(len(examples[i].targets) for i in row) for row in rows)


def _assemble(
  examples: Sequence[Example], rows: Sequence[Row], length: int, width: int, pad_id: int
) -> Batch:
  shape = (len(rows), width)
  tokens = np.full((len(rows), length), pad_id, np.int32)
  segments = np.zeros((len(rows), length), np.int32)
  at, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights = np.zeros(shape, np.float32)
  for n, row in enumerate(rows):
    start = count = 0
    for segment, example in enumerate((examples[i] for i in row), 1):
      end, total = start + len(example.inputs), count + len(example.targets)
      tokens[n, start:end] = example.inputs
      segments[n, start:end] = segment
      at[n, count:total] = np.add(example.positions, start)
      targets[n, count:total] = example.targets
      weights[n, count:total] = 1
      start, count = end, total
  return {
    "tokens": tokens,
    "segments": segments,
    "at": at,
    "targets": targets,
    "weights": weights,
  }
