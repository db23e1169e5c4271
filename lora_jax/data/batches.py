"""Batches of examples in a few shapes, shuffled with a seed, as `grain` datasets.

  batches = iter(train_batches(examples, batch_size=16, buckets=(32, 64, 128), seed=0, pad_id=0))
  batch = next(batches)
  state = batches.get_state()          # a small JSON dict; set_state resumes from it

Letters: B rows of a batch, T input tokens, C targets of a row.

  tokens  (B, T) int32    inputs, padded on the right (a causal model needs no mask for that)
  at      (B, C) int32    positions in 0..T-1 whose next token belongs to the completion
  targets (B, C) int32    those next tokens; the last one is not in `tokens`
  weights (B, C) float32  1 for a target, 0 for padding
  index   (B,)   int32    evaluation only: the example's index, -1 for a padding row

T is the first bucket that holds the batch's longest row, and each bucket has one C, so a step
compiles once per bucket. A batch is a pure function of the examples, the arguments and the step:
`train_batches(...)[step]`. The state of an iterator is its position.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar

import grain
import numpy as np

from lora_jax.data.examples import Example

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Batch = dict[str, np.ndarray]


class Tokens(Protocol):
  """An example, as far as batches use it: its tokens, its targets, and how many were cut."""

  @property
  def inputs(self) -> Sequence[int]: ...

  @property
  def targets(self) -> Sequence[float]: ...

  @property
  def cut(self) -> int: ...


class Shard(TypedDict, total=False):
  """The block of rows that a process reads of every batch; see `train_batches`."""

  shard_index: int
  shard_count: int


class Pass(Protocol[T_co]):
  """The batches of one pass over the examples: a dataset or a list."""

  def __len__(self) -> int: ...

  def __iter__(self) -> Iterator[T_co]: ...


class Watch(Protocol):
  """Wraps the batches of a pass, e.g. with a progress bar."""

  def __call__(self, batches: Pass[T], /) -> Iterable[T]: ...


Assemble = Callable[[Sequence[Any], np.ndarray, int, int, int], Batch]
"""From examples, the numbers of those that are the rows (-1 for none), T, C and the token of
padding to the arrays of a batch."""


class Rows(NamedTuple):
  """The examples of a batch, and the bucket length that they are padded to."""

  length: int
  indices: np.ndarray


def train_batches(
  examples: Sequence[Tokens],
  batch_size: int,
  buckets: Sequence[int],
  seed: int,
  pad_id: int,
  shard_index: int = 0,
  shard_count: int = 1,
  assemble: Assemble | None = None,
) -> grain.MapDataset:
  """Returns the endless dataset of training batches; element `step` is the batch of that step.

  Every epoch takes each example once, in a new order, in ceil(examples / batch_size) batches. An
  incomplete batch is padded with rows of weight 0.

  Args:
    examples: from `lora_jax.data.examples.encode`.
    batch_size: rows of a batch, over all shards.
    buckets: the possible input lengths, in tokens, increasing.
    seed: an integer of 0 or more; determines the examples of a batch together with the step. The
      length of a step's batch is the same for all seeds.
    pad_id: the token that pads `tokens`; any token of the vocabulary suffices.
    shard_index: the block of rows to return, e.g. `jax.process_index()`.
    shard_count: the number of equal blocks of rows, e.g. `jax.process_count()`. All shards have
      the same shapes at the same step, and their rows in order are the whole batch.
    assemble: makes the arrays from other kinds of examples, which also have `inputs`, `targets` and
      `cut`; None makes the arrays described above.

  Raises:
    ValueError: no examples, one longer than the last bucket, buckets that do not rise, a batch
      size that the shards cannot share, or a negative seed.
  """
  if seed < 0:
    raise ValueError(f"seed {seed} must be 0 or more")
  lengths = _lengths(examples, batch_size, buckets, shard_index, shard_count)
  widths = target_widths(examples, buckets)
  make = _assemble if assemble is None else assemble
  batches_per_epoch = -(-len(examples) // batch_size)

  # The iterator prefetches, so two epochs can be in use at once.
  @functools.lru_cache(maxsize=2)
  def plan(epoch: int) -> list[Rows]:
    order = permutation(len(examples), seed, epoch, 0)
    rows = group(lengths, order, batch_size, buckets)
    # Members of a sweep, of different seeds, stack their batches of a step: its length is the same
    # for all seeds.
    return [rows[i] for i in permutation(len(rows), 0, epoch, 1)]

  def batch(step: int) -> Batch:
    epoch, number = divmod(step, batches_per_epoch)
    rows = plan(epoch)[number]
    own = block(rows.indices, batch_size, shard_index, shard_count)
    return make(examples, own, rows.length, widths[rows.length], pad_id)

  # `repeat` would pass the map a step within the epoch. Grain's own sharding would assign whole
  # batches to shards, which would then differ in shape at the same step.
  return grain.MapDataset.range(sys.maxsize).map(batch)


def eval_batches(
  examples: Sequence[Tokens],
  batch_size: int,
  buckets: Sequence[int],
  pad_id: int,
  shard_index: int = 0,
  shard_count: int = 1,
  assemble: Assemble | None = None,
) -> grain.MapDataset:
  """Returns the dataset of one pass, each example once, from the shortest bucket to the longest.

  An incomplete batch comes last. Within a bucket the examples keep their order; `batch["index"]`
  has their indices, so that results per example can be put back in order.

  Args and Raises: those of `train_batches`.
  """
  lengths = _lengths(examples, batch_size, buckets, shard_index, shard_count)
  widths = target_widths(examples, buckets)
  make = _assemble if assemble is None else assemble
  plan = group(lengths, np.arange(len(examples)), batch_size, buckets)

  def batch(number: int) -> Batch:
    rows = plan[number]
    own = block(rows.indices, batch_size, shard_index, shard_count)
    arrays = make(examples, own, rows.length, widths[rows.length], pad_id)
    return arrays | {"index": own.astype(np.int32)}

  return grain.MapDataset.range(len(plan)).map(batch)


def stacked(datasets: Sequence[grain.MapDataset]) -> grain.MapDataset:
  """Returns the dataset whose element `step` stacks those of all datasets on a new first axis.

  The batches of a step must have the same shape. Those of `train_batches` have, if only their seeds
  differ.
  """

  def of(dataset: grain.MapDataset, step: int) -> Batch:
    batch = dataset[step]
    assert batch is not None  # no filter leaves a gap
    return batch

  def batch(step: int) -> Batch:
    each = [of(dataset, step) for dataset in datasets]
    return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

  return grain.MapDataset.range(min(map(len, datasets))).map(batch)


def summary(examples: Sequence[Tokens], batch_size: int, buckets: Sequence[int]) -> dict[str, Any]:
  """Returns the size of a pass over the examples.

  Args:
    examples, batch_size, buckets: as for `train_batches`.

  Returns:
    {"examples": number of them, "cut": number of those with a shortened prompt,
    "batches": batches of a pass, "shapes": {(T, C): number of batches},
    "padding": fraction of all token slots that are padding, from 0 to 1}.

  Raises:
    ValueError: as `train_batches`.
  """
  lengths = _lengths(examples, batch_size, buckets)
  widths = target_widths(examples, buckets)
  plan = group(lengths, np.arange(len(examples)), batch_size, buckets)
  shapes = {}
  for rows in plan:
    shape = (rows.length, widths[rows.length])
    shapes[shape] = shapes.get(shape, 0) + 1
  slots = sum(rows.length * batch_size for rows in plan)
  return {
    "examples": len(examples),
    "cut": sum(example.cut > 0 for example in examples),
    "batches": len(plan),
    "shapes": shapes,
    "padding": 1 - int(lengths.sum()) / slots,
  }


def permutation(count: int, *seeds: int) -> np.ndarray:
  """Returns the integers below `count` in an order determined by the seeds (integers >= 0).

  numpy guarantees the bits of its generators between releases, but not the results of
  `Generator.permutation`. A run must resume with the same batches after an update, so the order
  comes from sorting the bits.
  """
  bits = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
  return np.argsort(bits, kind="stable")


def group(
  lengths: np.ndarray, order: np.ndarray, batch_size: int, buckets: Sequence[int]
) -> list[Rows]:
  """Returns batches of examples of similar length; only the last may be incomplete.

  The remainder of a bucket goes before the examples of the next one. The lengths of the batches are
  therefore the same for every `order`.

  Args:
    lengths: the input length of each example, in tokens.
    order: the indices of the examples, in their order within a bucket.
    batch_size: rows of a full batch.
    buckets: the possible input lengths, increasing; the last is at least the longest length.
  """
  bucket_of = np.searchsorted(buckets, lengths)
  batches = []
  left = order[:0]
  for bucket, length in enumerate(buckets):
    members = np.concatenate([left, order[bucket_of[order] == bucket]])
    full = len(members) - len(members) % batch_size
    batches += [Rows(length, part) for part in members[:full].reshape(-1, batch_size)]
    left = members[full:]
  if len(left):
    batches.append(Rows(buckets[bucket_of[left].max()], left))
  return batches


def target_widths(examples: Sequence[Tokens], buckets: Sequence[int]) -> dict[int, int]:
  """Returns {bucket: C of its batches}, the most targets of an example that may be in a bucket.

  An example can be in a longer bucket than its own (see `group`), so C never falls from one
  bucket to the next.
  """
  return {
    bucket: max((len(e.targets) for e in examples if len(e.inputs) <= bucket), default=0)
    for bucket in buckets
  }


def check_shards(batch_size: int, shard_index: int, shard_count: int) -> None:
  """Raises ValueError for a batch that cannot be split evenly, or a shard out of range."""
  if batch_size < 1 or shard_count < 1 or batch_size % shard_count:
    raise ValueError(
      f"batch_size {batch_size} must be positive and a multiple of shard_count {shard_count}"
    )
  if not 0 <= shard_index < shard_count:
    raise ValueError(f"shard_index {shard_index} is not below shard_count {shard_count}")


def _lengths(
  examples: Sequence[Tokens],
  batch_size: int,
  buckets: Sequence[int],
  shard_index: int = 0,
  shard_count: int = 1,
) -> np.ndarray:
  """Checks the arguments of a dataset and returns the examples' input lengths."""
  if not examples:
    raise ValueError("no examples to make batches of")
  if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
    raise ValueError(f"buckets {tuple(buckets)} must be positive lengths that rise")
  check_shards(batch_size, shard_index, shard_count)
  lengths = np.array([len(example.inputs) for example in examples])
  if lengths.max() > buckets[-1]:
    raise ValueError(
      f"example {lengths.argmax()} has {lengths.max()} input tokens, more than the last bucket, "
      f"{buckets[-1]}; add a bucket or encode with max_length <= {buckets[-1] + 1}"
    )
  return lengths


def block(indices: np.ndarray, batch_size: int, shard_index: int, shard_count: int) -> np.ndarray:
  """Fills rows up to a batch with -1, and returns one shard's block of them."""
  filled = np.full(batch_size, -1)
  filled[: len(indices)] = indices
  return filled.reshape(shard_count, -1)[shard_index]


def _assemble(
  examples: Sequence[Any], indices: np.ndarray, length: int, width: int, pad_id: int
) -> Batch:
  shape = (len(indices), width)
  tokens = np.full((len(indices), length), pad_id, np.int32)
  at, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights = np.zeros(shape, np.float32)
  for row, index in enumerate(indices):
    if index < 0:
      continue
    example: Example = examples[index]
    count = len(example.targets)
    tokens[row, : len(example.inputs)] = example.inputs
    at[row, :count] = example.positions
    targets[row, :count] = example.targets
    weights[row, :count] = 1
  return {"tokens": tokens, "at": at, "targets": targets, "weights": weights}
