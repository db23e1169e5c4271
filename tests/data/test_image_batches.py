"""Batches of pictures: crops and flips by seed and step, on every shard and after a stop."""

import json

import numpy as np
import pytest
from PIL import Image

from lora_jax.data import image_batches
from lora_jax.data.image_batches import Example

RNG = np.random.default_rng(0)
EXAMPLES = [
  Example(RNG.integers(0, 256, (20 + n, 30, 3), np.uint8), n % 3, f"{n}") for n in range(10)
]
HOW = {"size": 16, "crop_area": 0.4, "flip": 0.5}


def train(**changes):
  return image_batches.train_batches(EXAMPLES, 4, **HOW | {"seed": 0} | changes)


def same(one, other):
  return one.keys() == other.keys() and all(np.array_equal(one[x], other[x]) for x in one)


def test_a_batch_is_decided_by_seed_and_step_and_each_epoch_takes_each_picture_once():
  data = train()
  batches = [data[step] for step in range(6)]
  assert all(same(batches[step], train()[step]) for step in range(6))
  assert not same(batches[0], train(seed=1)[0])
  for epoch in (batches[:3], batches[3:]):
    assert [float(batch["weights"].sum()) for batch in epoch] == [4, 4, 2]
    labels = np.concatenate([batch["labels"][batch["weights"] > 0] for batch in epoch])
    assert sorted(labels) == sorted(example.label for example in EXAMPLES)
  batch = batches[0]
  assert batch["images"].shape == (4, 16, 16, 3) and batch["images"].dtype == np.uint8
  assert batches[2]["images"][2:].max() == 0


def test_an_iterator_goes_on_where_its_state_says():
  iterator = iter(train().to_iter_dataset())
  for _ in range(4):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(3)]
  again = iter(train().to_iter_dataset())
  again.set_state(state)
  assert all(same(next(again), batch) for batch in expected)


def test_shards_are_the_rows_of_the_whole_batch():
  for step in (0, 2):
    parts = [train(shard_index=n, shard_count=2)[step] for n in (0, 1)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert same(whole, train()[step])
  with pytest.raises(ValueError, match="multiple of shard_count 3"):
    train(shard_index=0, shard_count=3)


def test_crops_are_squares_of_the_picture_and_flips_turn_left_to_right():
  # A ramp in each direction: where a pixel lies can be read from its value.
  rows, columns = np.mgrid[:64, :96]
  picture = np.stack([rows * 2, columns * 2, 0 * rows], axis=-1).astype(np.uint8)
  example = [Example(picture, 0, "ramp")]
  sides, flips = [], []
  for step in range(200):
    data = image_batches.train_batches(example, 1, size=8, crop_area=0.25, flip=0.5, seed=0)
    found = data[step]["images"][0].astype(float) / 2
    height = found[-1, 0, 0] - found[0, 0, 0]
    width = found[0, -1, 1] - found[0, 0, 1]
    assert abs(abs(width) - height) < 1.5  # square, so one scale in both directions
    assert found[..., 0].min() > -1 and found[..., 0].max() < 64
    assert found[..., 1].min() > -1 and found[..., 1].max() < 96
    sides.append(height * 8 / 7)
    flips.append(width < 0)
  areas = (np.array(sides) / 64) ** 2
  assert 0.2 < areas.min() < 0.3 and areas.max() > 0.95 and 0.55 < areas.mean() < 0.7
  assert 70 < sum(flips) < 130


def test_nothing_is_cut_or_flipped_where_that_is_asked_for():
  picture = EXAMPLES[0].picture[:20, :20]
  data = image_batches.train_batches(
    [Example(picture, 0, "a")], 2, size=20, crop_area=1.0, flip=0.0, seed=3
  )
  np.testing.assert_array_equal(data[5]["images"][0], picture)
  turned = image_batches.train_batches(
    [Example(picture, 0, "a")], 2, size=20, crop_area=1.0, flip=1.0, seed=3
  )
  np.testing.assert_array_equal(turned[5]["images"][0], picture[:, ::-1])


def test_evaluation_takes_each_once_in_order_and_the_square_in_the_middle():
  batches = list(image_batches.eval_batches(EXAMPLES, 4, size=16))
  index = np.concatenate([batch["index"] for batch in batches])
  assert index.tolist() == [*range(10), -1, -1]
  assert np.concatenate([batch["weights"] for batch in batches]).tolist() == [1] * 10 + [0] * 2
  picture = EXAMPLES[4].picture  # 24 high, 30 wide
  box = (3, 0, 27, 24)
  middle = Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC, box=box)
  np.testing.assert_array_equal(batches[1]["images"][0], np.asarray(middle))
  shards = [
    list(image_batches.eval_batches(EXAMPLES, 4, size=16, shard_index=n, shard_count=2))
    for n in (0, 1)
  ]
  joined = np.concatenate([shards[0][2]["labels"], shards[1][2]["labels"]])
  np.testing.assert_array_equal(joined, batches[2]["labels"])


def test_what_cannot_be_batches_is_refused():
  with pytest.raises(ValueError, match="no examples"):
    image_batches.eval_batches([], 4, size=16)
  with pytest.raises(ValueError, match="seed -1 must be 0 or more"):
    train(seed=-1)
