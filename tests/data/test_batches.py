import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.batches import (
  eval_batches,
  group,
  permutation,
  stacked,
  summary,
  target_widths,
  train_batches,
)
from lora_jax.data.examples import Example, encode
from lora_jax.data.labels import sign_label
from lora_jax.data.records import read
from lora_jax.data.splits import split

BUCKETS = (4, 8, 16)
PAD = 0


def make_example(number, prompt_length, target_count):
  """An example whose tokens are all its own: 100 * number + 1, + 2, ..."""
  count = prompt_length + target_count
  tokens = tuple(100 * number + 1 + i for i in range(count))
  return Example(tokens=tokens, prompt_length=prompt_length, cut=0)


def make_examples(sizes):
  return [make_example(number, *size) for number, size in enumerate(sizes)]


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=40)
SOME = make_examples([(1 + i % 9, 1 + i * i % 8) for i in range(23)])


def numbers(batch):
  """The numbers of the examples in a batch, told by their tokens, filler rows left out."""
  return [
    int(row[0]) // 100 for row, real in zip(batch["tokens"], real_rows(batch), strict=True) if real
  ]


def real_rows(batch):
  return batch["weights"].sum(axis=1) > 0


def same(left, right):
  return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


@given(sizes=SIZES, batch_size=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_every_epoch_takes_every_example_once(sizes, batch_size, seed):
  examples = make_examples(sizes)
  batches = train_batches(examples, batch_size, BUCKETS, seed, PAD)
  per_epoch = -(-len(examples) // batch_size)
  for epoch in range(3):
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    seen = [number for step in steps for number in numbers(batches[step])]
    assert sorted(seen) == list(range(len(examples)))


@given(sizes=SIZES, batch_size=st.integers(1, 7))
def test_an_evaluation_takes_every_example_once_and_says_which(sizes, batch_size):
  examples = make_examples(sizes)
  batches = list(eval_batches(examples, batch_size, BUCKETS, PAD))
  assert len(batches) == -(-len(examples) // batch_size)
  index = np.concatenate([batch["index"] for batch in batches])
  assert sorted(index[index >= 0]) == list(range(len(examples)))
  for batch in batches:
    assert batch["index"].dtype == np.int32
    assert numbers(batch) == [i for i in batch["index"] if i >= 0]
    np.testing.assert_array_equal(real_rows(batch), batch["index"] >= 0)


@given(sizes=SIZES, batch_size=st.integers(1, 7))
def test_a_row_holds_its_example_and_nothing_of_padding_has_weight(sizes, batch_size):
  examples = make_examples(sizes)
  for batch in eval_batches(examples, batch_size, BUCKETS, PAD):
    assert batch["tokens"].shape[0] == batch_size
    assert batch["tokens"].shape[1] in BUCKETS
    assert {k: v.dtype for k, v in batch.items() if k != "index"} == {
      "tokens": np.int32,
      "at": np.int32,
      "targets": np.int32,
      "weights": np.float32,
    }
    for row, index in enumerate(batch["index"]):
      if index < 0:
        assert not batch["weights"][row].any() and (batch["tokens"][row] == PAD).all()
        continue
      example = examples[index]
      length, count = len(example.tokens) - 1, len(example.tokens) - example.prompt_length
      assert tuple(batch["tokens"][row, :length]) == example.tokens[:-1]
      assert (batch["tokens"][row, length:] == PAD).all()
      np.testing.assert_array_equal(batch["weights"][row], np.arange(len(batch["at"][row])) < count)
      at, targets = batch["at"][row, :count], batch["targets"][row, :count]
      assert tuple(targets) == example.tokens[example.prompt_length :]
      assert tuple(at) == tuple(range(example.prompt_length - 1, length))
      # The token after a position is its target; only the last target is not fed any more.
      np.testing.assert_array_equal(batch["tokens"][row, at[:-1] + 1], targets[:-1])
      assert at[-1] == length - 1


@given(sizes=SIZES, batch_size=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_bucket_has_one_shape_and_no_batch_could_be_shorter(sizes, batch_size, seed):
  examples = make_examples(sizes)
  widths = target_widths(examples, BUCKETS)
  batches = train_batches(examples, batch_size, BUCKETS, seed, PAD)
  for step in range(2 * -(-len(examples) // batch_size)):
    batch = batches[step]
    rows, length = batch["tokens"].shape
    assert rows == batch_size
    assert {v.shape for k, v in batch.items() if k != "tokens"} == {(batch_size, widths[length])}
    longest = max(len(examples[number].inputs) for number in numbers(batch))
    assert length == min(bucket for bucket in BUCKETS if bucket >= longest)


@given(
  lengths=st.lists(st.integers(1, 16), min_size=1, max_size=50),
  batch_size=st.integers(1, 7),
  seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_all_batches_but_the_last_are_full_and_all_as_long_in_every_order(
  lengths, batch_size, seeds
):
  lengths = np.array(lengths)
  plans = [group(lengths, permutation(len(lengths), seed), batch_size, BUCKETS) for seed in seeds]
  assert all(len(rows.indices) == batch_size for plan in plans for rows in plan[:-1])
  assert [rows.length for rows in plans[0]] == [rows.length for rows in plans[1]]


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 30), seed=st.integers(0, 99), batch_size=st.integers(1, 6))
def test_a_restored_iterator_goes_on_with_the_same_batches(cut, seed, batch_size):
  def start():
    return iter(train_batches(SOME, batch_size, BUCKETS, seed, PAD))

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


def test_an_iterator_can_go_back_to_any_of_its_states():
  iterator = iter(train_batches(SOME, 4, BUCKETS, 3, PAD))
  states, batches = [], []
  for _ in range(20):  # over three epochs of six batches
    states.append(iterator.get_state())
    batches.append(next(iterator))
  for number in (13, 0, 19, 5, 6):
    iterator.set_state(states[number])
    assert same(next(iterator), batches[number])


def test_reading_ahead_does_not_change_the_state():
  dataset = train_batches(SOME, 4, BUCKETS, 3, PAD)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  eager, slow = iter(dataset), iter(dataset.to_iter_dataset(options))
  for _ in range(9):
    assert same(next(eager), next(slow))
    assert eager.get_state() == slow.get_state()


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_an_interrupted_evaluation_goes_on_to_its_end(cut):
  dataset = eval_batches(SOME, 4, BUCKETS, PAD)
  iterator = iter(dataset)
  for _ in range(cut):
    next(iterator)
  state = iterator.get_state()
  resumed = iter(eval_batches(SOME, 4, BUCKETS, PAD))
  resumed.set_state(state)
  rest = list(resumed)
  assert len(rest) == len(dataset) - cut
  assert all(same(left, dataset[cut + i]) for i, left in enumerate(rest))


def test_a_batch_depends_on_seed_and_step_alone():
  first, again = (train_batches(SOME, 4, BUCKETS, 7, PAD) for _ in range(2))
  steps = [17, 2, 0, 11, 2]
  assert all(same(first[step], again[step]) for step in sorted(steps))
  assert all(same(first[step], again[step]) for step in steps)


def test_epochs_and_seeds_differ_in_their_order():
  def order(seed, epoch):
    batches = train_batches(SOME, 4, BUCKETS, seed, PAD)
    return tuple(n for i in range(6) for n in numbers(batches[6 * epoch + i]))

  orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
  assert len(set(orders)) == 4


def test_the_batches_of_a_step_have_the_same_shape_for_every_seed():
  datasets = [train_batches(SOME, 4, BUCKETS, seed, PAD) for seed in (0, 7)]
  both = stacked(datasets)
  for step in range(12):
    found = both[step]
    for n, dataset in enumerate(datasets):
      assert same({name: x[n] for name, x in found.items()}, dataset[step])
  assert len({both[step]["tokens"].shape for step in range(12)}) > 1


def test_the_batches_of_an_epoch_are_not_sorted_by_length():
  batches = train_batches(SOME, 2, BUCKETS, 0, PAD)
  lengths = [batches[step]["tokens"].shape[1] for step in range(12)]
  assert lengths != sorted(lengths)


def test_the_shuffle_is_the_same_in_every_release():
  np.testing.assert_array_equal(permutation(8, 1, 2, 0), [5, 6, 3, 2, 1, 0, 4, 7])


@given(sizes=SIZES, rows=st.integers(1, 3), shards=st.integers(1, 4), step=st.integers(0, 40))
def test_the_shards_side_by_side_are_the_whole_batch(sizes, rows, shards, step):
  examples = make_examples(sizes)
  size = rows * shards
  whole = train_batches(examples, size, BUCKETS, 5, PAD)[step]
  parts = [train_batches(examples, size, BUCKETS, 5, PAD, i, shards)[step] for i in range(shards)]
  assert {part["tokens"].shape[0] for part in parts} == {rows}
  assert same({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)

  datasets = [eval_batches(examples, size, BUCKETS, PAD, i, shards) for i in range(shards)]
  for batches in zip(eval_batches(examples, size, BUCKETS, PAD), *datasets, strict=True):
    whole, parts = batches[0], batches[1:]
    assert same({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"examples": []}, "no examples"),
    ({"buckets": ()}, "must be positive lengths that rise"),
    ({"buckets": (8, 4, 16)}, "must be positive lengths that rise"),
    ({"buckets": (0, 16)}, "must be positive lengths that rise"),
    ({"buckets": (4, 8)}, r"example \d+ has 1\d input tokens.* bucket, 8; .*max_length <= 9"),
    ({"batch_size": 0}, "batch_size 0 must be positive"),
    ({"shard_count": 3}, "batch_size 4 must be positive and a multiple of shard_count 3"),
    ({"shard_count": 2, "shard_index": 2}, "shard_index 2 is not below shard_count 2"),
  ],
)
def test_bad_arguments_are_refused_before_the_first_batch(changes, message):
  arguments = {"examples": SOME, "batch_size": 4, "buckets": BUCKETS, "pad_id": PAD} | changes
  with pytest.raises(ValueError, match=message):
    eval_batches(**arguments)
  with pytest.raises(ValueError, match=message):
    train_batches(**arguments, seed=0)


def test_a_negative_seed_is_refused():
  with pytest.raises(ValueError, match="seed -1 must be 0 or more"):
    train_batches(SOME, 4, BUCKETS, -1, PAD)


def test_the_summary_counts_what_the_batches_hold():
  examples = [*SOME, Example(tokens=(1, 2, 3), prompt_length=2, cut=5)]
  batches = list(eval_batches(examples, 4, BUCKETS, PAD))
  shapes = [(b["tokens"].shape[1], b["at"].shape[1]) for b in batches]
  slots = sum(b["tokens"].size for b in batches)
  assert summary(examples, 4, BUCKETS) == {
    "examples": 24,
    "cut": 1,
    "batches": len(batches),
    "shapes": {shape: shapes.count(shape) for shape in shapes},
    "padding": 1 - sum(len(e.inputs) for e in examples) / slots,
  }


def test_the_movie_reviews_waste_little_in_few_shapes(smollm2, ratings_file):
  path = ratings_file("movieReviewSnippets")
  records = sign_label(read(path, format="tsv", columns=("id", "rating", "text")), "rating")
  train = split(records, "text", {"train": 0.9, "validation": 0.05, "test": 0.05})["train"]
  examples = encode(
    train, smollm2.tokenizer, "Review: {text}\nSentiment:", " {label}", 128, append_eos=False
  )
  report = summary(examples, 16, (32, 48, 64, 96, 128))
  assert report["examples"] == 9_034 and report["batches"] == 565
  assert len(report["shapes"]) <= 5 and all(width == 1 for _, width in report["shapes"])
  assert report["padding"] < 0.25
