"""Batches of pictures with boxes, cropped and flipped with a seed, as `grain` datasets.

  batches = iter(train_batches(examples, 8, size=256, crop_area=0.5, flip=0.5, seed=0))
  batch = next(batches)

  images  (B, S, S, 3) uint8
  boxes   (B, M, 4) float32     left, top, right, bottom, as fractions of the image; 0 for padding
  labels  (B, M) int32          the class of each, -1 for padding
  weights (B,) float32          1 for an example, 0 for a padding row
  sizes   (B, 2) int32          evaluation only: width and height of the original picture
  index   (B,) int32            evaluation only: the example's index, -1 for a padding row

M is the largest number of boxes of an example. Batches are as in `lora_jax.data.image_batches`, but
a picture is resized to a square as it is (bicubic, with antialiasing), as SSD does, and a random
crop has the picture's proportions. A box belongs to a crop if its center is in it, and is clipped
to it (Liu et al. 2016, "SSD", section 2.2, "Data augmentation").
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import grain
import numpy as np
from PIL import Image

from lora_jax.data import image_batches
from lora_jax.data.batches import Shard
from lora_jax.data.image_batches import Batch, Draw


class Example(NamedTuple):
  """A picture with boxes.

  Attributes:
    picture: [height, width, 3] of uint8.
    boxes: [n, 4] of float32, as in the module.
    labels: [n] of int32, the indices of the classes.
    size: the width and height of the picture in its file.
    name: of the picture.
  """

  picture: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  size: tuple[int, int]
  name: str


def train_batches(
  examples: Sequence[Example],
  batch_size: int,
  *,
  size: int,
  crop_area: float,
  flip: float,
  seed: int,
  **rows: Unpack[Shard],
) -> grain.MapDataset:
  """Returns the endless dataset of training batches; element `step` is the batch of that step.

  Args:
    examples: the pictures.
    batch_size, size, flip, seed: as in `image_batches.train_batches`.
    crop_area: the smallest area of a crop, as a fraction of the picture, above 0; 1: no crop.
    rows: `shard_index` and `shard_count`, as there.

  Raises:
    ValueError: as `image_batches.train_batches` does.
  """
  most = most_boxes(examples)

  def batch(own: np.ndarray, draw: Draw) -> Batch:
    made = _empty(len(own), size, most)
    for row, index in enumerate(own):
      if index >= 0:
        area, across, down, flipped = draw(row)
        side = (crop_area + (1 - crop_area) * area) ** 0.5
        window = ((1 - side) * across, (1 - side) * down, side)
        _fill(made, row, examples[index], size, window, flipped < flip)
    return made

  return image_batches.shuffled(len(examples), batch_size, batch, seed=seed, **rows)


def eval_batches(
  examples: Sequence[Example], batch_size: int, *, size: int, **rows: Unpack[Shard]
) -> grain.MapDataset:
  """Returns the dataset of one pass over whole pictures, in order, the last batch padded."""
  most = most_boxes(examples)

  def batch(own: np.ndarray) -> Batch:
    made = _empty(len(own), size, most)
    sizes = np.ones((len(own), 2), np.int32)
    for row, index in enumerate(own):
      if index >= 0:
        _fill(made, row, examples[index], size, (0.0, 0.0, 1.0), False)
        sizes[row] = examples[index].size
    return made | {"sizes": sizes}

  return image_batches.in_order(len(examples), batch_size, batch, **rows)


def most_boxes(examples: Sequence[Example]) -> int:
  """The largest number of boxes of an example, at least 1."""
  return max([1, *(len(example.boxes) for example in examples)])


def summary(examples: Sequence[Example], batch_size: int, size: int) -> dict[str, Any]:
  """Returns the size of a pass over the examples, as described in `lora_jax.tasks.Task.summary`; a
  shape is (S, S, M)."""
  found = image_batches.summary(examples, batch_size, size)
  return found | {"shapes": {(size, size, most_boxes(examples)): found["batches"]}}


def _empty(rows: int, size: int, most: int) -> Batch:
  return {
    "images": np.zeros((rows, size, size, 3), np.uint8),
    "boxes": np.zeros((rows, most, 4), np.float32),
    "labels": np.full((rows, most), -1, np.int32),
    "weights": np.zeros(rows, np.float32),
  }


def _fill(
  batch: Batch,
  row: int,
  example: Example,
  size: int,
  window: tuple[float, float, float],
  flips: bool,
) -> None:
  """Writes an example into a row: what is in a window (left, top, side, as fractions), flipped or
  not."""
  left, top, side = window
  image = resized(example.picture, size, window)
  low = np.array([left, top, left, top], np.float32)
  boxes = (example.boxes - low) / np.float32(side)
  centers = (boxes[:, :2] + boxes[:, 2:]) / 2
  is_in = ((centers >= 0) & (centers < 1)).all(axis=1)
  boxes, labels = np.clip(boxes[is_in], 0, 1), example.labels[is_in]
  if flips:
    image, boxes = (
      image[:, ::-1],
      np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1),
    )
  batch["images"][row], batch["weights"][row] = image, 1
  batch["boxes"][row, : len(boxes)], batch["labels"][row, : len(labels)] = boxes, labels


def resized(
  picture: np.ndarray, size: int, window: tuple[float, float, float] = (0.0, 0.0, 1.0)
) -> np.ndarray:
  """Returns a window of a picture as a square of `size` pixels per side."""
  height, width = picture.shape[:2]
  left, top, side = window
  box = (left * width, top * height, min(left + side, 1) * width, min(top + side, 1) * height)
  image = Image.fromarray(np.ascontiguousarray(picture))
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
