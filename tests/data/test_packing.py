import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.batches import permutation
from lora_jax.data.examples import Example
from lora_jax.data.packing import pack, packed_batches, summary

LENGTH = 16
PAD = 0


def make_examples(sizes):
  """Examples whose tokens are all their own: 100 * number + 1, + 2, ..."""
  return [
    Example(
      tokens=tuple(100 * number + 1 + i for i in range(prompt + targets)),
      prompt_length=prompt,
      cut=0,
    )
    for number, (prompt, targets) in enumerate(sizes)
  ]


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=40)
SOME = make_examples([(1 + i % 9, 1 + i * i % 8) for i in range(23)])


def same(left, right):
  return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def unpacked(batch):
  """`[(inputs, positions, targets)]` of the examples in a batch, told by their segments."""
  found = []
  for tokens, segments, at, targets, weights in zip(
    *(batch[name] for name in ("tokens", "segments", "at", "targets", "weights")), strict=True
  ):
    at, targets = at[weights > 0], targets[weights > 0]
    for segment in range(1, segments.max() + 1):
      (places,) = np.nonzero(segments == segment)
      here = segments[at] == segment
      found.append((tokens[places], at[here] - places[0], targets[here]))
  return found


@settings(deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_every_epoch_takes_every_example_once_and_whole(sizes, batch_size, seed):
  examples = make_examples(sizes)
  batches = packed_batches(examples, batch_size, LENGTH, seed, PAD)
  per_epoch = summary(examples, batch_size, LENGTH)["batches"]
  for epoch in range(2):
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    parts = [part for step in steps for part in unpacked(batches[step])]
    assert sorted(int(inputs[0]) // 100 for inputs, _, _ in parts) == list(range(len(examples)))
    for inputs, positions, targets in parts:
      example = examples[int(inputs[0]) // 100]
      assert tuple(inputs) == example.inputs
      assert tuple(positions) == tuple(example.positions)
      assert tuple(targets) == example.targets


@settings(deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 4), step=st.integers(0, 50))
def test_all_batches_have_one_shape_and_padding_counts_for_nothing(sizes, batch_size, step):
  examples = make_examples(sizes)
  batch = packed_batches(examples, batch_size, LENGTH, 3, PAD)[step]
  ((shape, _),) = summary(examples, batch_size, LENGTH)["shapes"].items()
  assert batch["tokens"].shape == batch["segments"].shape == (batch_size, shape[0])
  assert {batch[k].shape for k in ("at", "targets", "weights")} == {(batch_size, shape[1])}
  assert {k: v.dtype for k, v in batch.items()} == {
    "tokens": np.int32,
    "segments": np.int32,
    "at": np.int32,
    "targets": np.int32,
    "weights": np.float32,
  }
  padding = batch["segments"] == 0
  assert (batch["tokens"][padding] == PAD).all()
  for row, empty in zip(batch["segments"], padding, strict=True):
    assert (np.diff(row[~empty]) >= 0).all()
    assert not empty[: np.count_nonzero(~empty)].any()  # at the end of the row


@settings(deadline=None)
@given(sizes=SIZES, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_the_rows_have_the_same_sizes_in_every_order(sizes, seeds):
  examples = make_examples(sizes)

  def sizes_of(seed):
    rows = pack(examples, permutation(len(examples), seed), LENGTH)
    return [[(len(examples[i].inputs), len(examples[i].targets)) for i in row] for row in rows]

  assert sizes_of(seeds[0]) == sizes_of(seeds[1])


@settings(deadline=None)
@given(sizes=SIZES)
def test_no_two_rows_could_be_one(sizes):
  examples = make_examples(sizes)
  rows = pack(examples, np.arange(len(examples)), LENGTH)
  filled = [sum(len(examples[i].inputs) for i in row) for row in rows]
  assert max(filled) <= LENGTH
  assert len(rows) == 1 or min(x + y for i, x in enumerate(filled) for y in filled[:i]) > LENGTH


def test_short_examples_are_in_hardly_more_rows_than_there_must_be():
  sizes = np.random.default_rng(0).integers(5, 60, 500)
  rows = pack(make_examples([(int(size), 1) for size in sizes]), np.arange(500), 256)
  assert len(rows) <= -(-sizes.sum() // 256) + 1


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 30), seed=st.integers(0, 99), batch_size=st.integers(1, 4))
def test_a_restored_iterator_goes_on_with_the_same_batches(cut, seed, batch_size):
  def start():
    return iter(packed_batches(SOME, batch_size, LENGTH, seed, PAD))

  whole = start()
  expected = [next(whole) for _ in range(cut + 6)][cut:]
  stopped = start()
  for _ in range(cut):
    next(stopped)
  state = json.loads(json.dumps(stopped.get_state()))
  resumed = start()
  resumed.set_state(state)
  assert all(same(next(resumed), batch) for batch in expected)
  assert resumed.get_state() == whole.get_state()


def test_reading_ahead_does_not_change_the_state():
  dataset = packed_batches(SOME, 2, LENGTH, 3, PAD)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  eager, slow = iter(dataset), iter(dataset.to_iter_dataset(options))
  for _ in range(9):
    assert same(next(eager), next(slow))
    assert eager.get_state() == slow.get_state()


def test_a_batch_depends_on_seed_and_step_alone():
  first, again = (packed_batches(SOME, 2, LENGTH, 7, PAD) for _ in range(2))
  steps = [17, 2, 0, 11, 2]
  assert all(same(first[step], again[step]) for step in sorted(steps))
  assert all(same(first[step], again[step]) for step in steps)


def test_epochs_and_seeds_differ_in_their_order():
  per_epoch = summary(SOME, 2, LENGTH)["batches"]

  def order(seed, epoch):
    batches = packed_batches(SOME, 2, LENGTH, seed, PAD)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return tuple(int(x[0]) for step in steps for x, _, _ in unpacked(batches[step]))

  assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


@settings(deadline=None)
@given(sizes=SIZES, rows=st.integers(1, 3), shards=st.integers(1, 4), step=st.integers(0, 40))
def test_the_shards_side_by_side_are_the_whole_batch(sizes, rows, shards, step):
  examples = make_examples(sizes)
  size = rows * shards
  whole = packed_batches(examples, size, LENGTH, 5, PAD)[step]
  parts = [packed_batches(examples, size, LENGTH, 5, PAD, i, shards)[step] for i in range(shards)]
  assert same({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"examples": []}, "no examples"),
    ({"length": 8}, r"example \d+ has 1\d input tokens, more than a row of 8; .*max_length <= 9"),
    ({"batch_size": 0}, "batch_size 0 must be positive"),
    ({"shard_count": 3}, "batch_size 4 must be positive and a multiple of shard_count 3"),
    ({"shard_count": 2, "shard_index": 2}, "shard_index 2 is not below shard_count 2"),
    ({"seed": -1}, "seed -1 must be 0 or more"),
  ],
)
def test_bad_arguments_are_refused_before_the_first_batch(changes, message):
  arguments = {"examples": SOME, "batch_size": 4, "length": LENGTH, "seed": 0, "pad_id": PAD}
  with pytest.raises(ValueError, match=message):
    packed_batches(**arguments | changes)


def test_the_summary_counts_what_the_batches_hold():
  examples = [*SOME, Example(tokens=(1, 2, 3), prompt_length=2, cut=5)]
  report = summary(examples, 4, LENGTH)
  batches = [packed_batches(examples, 4, LENGTH, 0, PAD)[i] for i in range(report["batches"])]
  ((shape, count),) = report["shapes"].items()
  assert (report["examples"], report["cut"], count) == (24, 1, len(batches))
  assert {(b["tokens"].shape[1], b["at"].shape[1]) for b in batches} == {shape}
  padding = np.mean([b["segments"] == 0 for b in batches])
  assert report["padding"] == pytest.approx(padding, abs=1e-12)
