"""Batches of pictures with boxes: the boxes move with the picture, by seed and step."""

import numpy as np
import pytest

from lora_jax.data import box_batches


def example(n, boxes=1):
  """A dark picture with white rectangles, one for each box."""
  rng = np.random.default_rng(n)
  picture = np.zeros((60, 80, 3), np.uint8)
  corners = []
  for k in range(boxes):
    x, y = rng.integers(0, 20, 2) + (40 * (k % 2), 30 * (k // 2))
    picture[y : y + 10, x : x + 20] = 255
    corners.append((x / 80, y / 60, (x + 20) / 80, (y + 10) / 60))
  labels = np.arange(boxes, dtype=np.int32) % 2
  found = np.array(corners, np.float32).reshape(-1, 4)
  return box_batches.Example(picture, found, labels, (80, 60), f"{n}.png")


def white(image):
  """The corners of what is white in an image, as fractions."""
  rows, columns = np.nonzero(image[..., 0] > 127)
  size = len(image)
  return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / size


def batches(examples, size=80, area=0.3, flip=0.5, seed=0, **rows):
  return box_batches.train_batches(
    examples, rows.pop("batch_size", 4), size=size, crop_area=area, flip=flip, seed=seed, **rows
  )


def test_boxes_are_where_the_objects_are_after_every_crop_and_flip():
  data, seen, flips = batches([example(n) for n in range(6)]), 0, set()
  for step in range(30):
    batch = data[step]
    for row in range(4):
      if batch["weights"][row] and batch["labels"][row, 0] >= 0:
        np.testing.assert_allclose(batch["boxes"][row, 0], white(batch["images"][row]), atol=0.03)
        seen += 1
        flips.add(batch["boxes"][row, 0, 0] < 0.5)
  assert seen > 40 and len(flips) == 2


def test_a_box_belongs_to_a_crop_that_has_its_center():
  made = box_batches._empty(1, 40, 2)
  whole = example(0)._replace(
    boxes=np.array([[0.4, 0.4, 0.7, 0.7], [0.0, 0.0, 0.45, 0.5]], np.float32),
    labels=np.array([0, 1], np.int32),
  )
  box_batches._fill(made, 0, whole, 40, (0.5, 0.5, 0.5), False)
  # The first one's center is inside; it is clipped on the left and above. The second one is gone.
  np.testing.assert_allclose(made["boxes"][0], [[0, 0, 0.4, 0.4], [0, 0, 0, 0]], atol=1e-6)
  assert made["labels"][0].tolist() == [0, -1]


def test_a_flip_turns_boxes_around():
  made = box_batches._empty(1, 40, 1)
  whole = example(0)._replace(boxes=np.array([[0.1, 0.2, 0.4, 0.9]], np.float32))
  box_batches._fill(made, 0, whole, 40, (0.0, 0.0, 1.0), True)
  np.testing.assert_allclose(made["boxes"][0], [[0.6, 0.2, 0.9, 0.9]], atol=1e-6)


def test_a_batch_depends_on_the_seed_and_the_step_alone():
  examples = [example(n, boxes=n % 4) for n in range(7)]
  one, other = batches(examples), batches(examples)
  for step in (5, 0, 3):
    for name, values in one[step].items():
      np.testing.assert_array_equal(values, other[step][name])
  assert not np.array_equal(one[0]["images"], batches(examples, seed=1)[0]["images"])
  assert one[0]["boxes"].shape == (4, 3, 4)  # the most boxes of an example
  seen = [name for step in (0, 1) for name in np.flatnonzero(one[step]["weights"])]
  assert len(seen) == 7  # an epoch has each once


def test_an_iterator_goes_on_from_its_state():
  data = batches([example(n) for n in range(5)])
  first = iter(data.to_iter_dataset())
  for _ in range(3):
    next(first)
  state, wanted = first.get_state(), next(first)
  second = iter(data.to_iter_dataset())
  second.set_state(state)
  for name, values in next(second).items():
    np.testing.assert_array_equal(values, wanted[name])


def test_shards_are_parts_of_the_batch():
  examples = [example(n) for n in range(6)]
  whole = batches(examples)[1]
  parts = [batches(examples, shard_index=n, shard_count=2)[1] for n in range(2)]
  for name, values in whole.items():
    np.testing.assert_array_equal(np.concatenate([x[name] for x in parts]), values)


def test_evaluation_has_whole_pictures_in_order_with_their_sizes():
  examples = [example(n, boxes=2) for n in range(5)]
  data = box_batches.eval_batches(examples, 4, size=80)
  found = [data[n] for n in range(len(data))]
  assert np.concatenate([x["index"] for x in found]).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
  assert found[1]["weights"].tolist() == [1, 0, 0, 0]
  np.testing.assert_array_equal(found[0]["boxes"][2], examples[2].boxes)
  assert found[0]["sizes"].tolist() == [[80, 60]] * 4
  summary = box_batches.summary(examples, 4, 80)
  assert summary["shapes"] == {(80, 80, 2): 2} and summary["padding"] == pytest.approx(3 / 8)


def test_pictures_without_any_box_make_a_batch():
  batch = batches([example(0, boxes=0)], batch_size=2)[0]
  assert batch["boxes"].shape == (2, 1, 4) and (batch["labels"] == -1).all()
  with pytest.raises(ValueError, match="no examples"):
    batches([])
