"""Batches of pictures, cropped and flipped with a seed, as `grain` datasets.

  batches = iter(train_batches(examples, 32, size=96, crop_area=0.5, flip=0.5, seed=0))
  batch = next(batches)
  state = batches.get_state()          # a small JSON dict; set_state resumes from it

  images  (B, S, S, 3) uint8
  labels  (B,) int32
  weights (B,) float32      1 for an example, 0 for a padding row
  index   (B,) int32        evaluation only: the example's index, -1 for a padding row

A batch is a pure function of the examples, the arguments and the step. In training a random square
of each picture is cropped, resized (bicubic, with antialiasing) and flipped horizontally or not;
its area is a random fraction of that of the largest square. In evaluation the crop is the largest
centered square.
"""

import functools
import sys
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image

from lora_jax.data.batches import block, check_shards, permutation

Batch = dict[str, np.ndarray]
Draw = Callable[[int], np.ndarray]

_OF_CROPS = 2  # after the streams of `lora_jax.data.batches`


class Example(NamedTuple):
  """A picture, [height, width, 3] of uint8, the index of its class, and its name."""

  picture: np.ndarray
  label: int
  name: str


def train_batches(
  examples: Sequence[Example],
  batch_size: int,
  *,
  size: int,
  crop_area: float,
  flip: float,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless dataset of training batches; element `step` is the batch of that step.

  Every epoch takes each example once, in a new order. An incomplete batch is padded with rows of
  weight 0.

  Args:
    examples: the pictures.
    batch_size: rows of a batch, over all shards.
    size: S, pixels per side.
    crop_area: the smallest area of a crop, as a fraction of the largest square, above 0; 1: no
      random crop size.
    flip: the probability that a picture is flipped, from 0 to 1.
    seed: an integer of 0 or more; determines the batch together with the step.
    shard_index, shard_count: as in `lora_jax.data.batches.train_batches`.

  Raises:
    ValueError: for no examples, a batch size that the shards do not divide, or a negative seed.
  """

  def batch(own: np.ndarray, draw: Draw) -> Batch:
    def cut(row: int, picture: np.ndarray) -> np.ndarray:
      area, across, down, flipped = draw(row)
      found = crop(picture, size, crop_area + (1 - crop_area) * area, across, down)
      return found[:, ::-1] if flipped < flip else found

    return _assemble(examples, own, size, cut)

  return shuffled(
    len(examples), batch_size, batch, seed=seed, shard_index=shard_index, shard_count=shard_count
  )


def shuffled(
  count: int,
  batch_size: int,
  make: Callable[[np.ndarray, Draw], Batch],
  *,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless dataset of training batches of examples by their indices.

  Args:
    count: the number of examples.
    batch_size, seed, shard_index, shard_count: as in `train_batches`.
    make: makes a batch from the examples' indices, -1 for a padding row, and a function from a row
      to four values in [0, 1), determined by the seed, the step and the row.

  Raises:
    ValueError: as `train_batches` does.
  """
  if seed < 0:
    raise ValueError(f"seed {seed} must be 0 or more")
  _check(count, batch_size, shard_index, shard_count)
  batches_per_epoch = -(-count // batch_size)

  # The iterator prefetches, so two epochs can be in use at once.
  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return permutation(count, seed, epoch, 0)

  def batch(step: int) -> Batch:
    epoch, number = divmod(step, batches_per_epoch)
    rows = order(epoch)[number * batch_size : (number + 1) * batch_size]
    own = block(rows, batch_size, shard_index, shard_count)
    first = shard_index * len(own)
    return make(own, lambda row: _uniform(4, seed, step, _OF_CROPS, first + row))

  return grain.MapDataset.range(sys.maxsize).map(batch)


def eval_batches(
  examples: Sequence[Example],
  batch_size: int,
  *,
  size: int,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the dataset of one pass, each example once and in order, the last batch padded."""
  cut = functools.partial(crop, size=size, area=1.0, across=0.5, down=0.5)

  def batch(own: np.ndarray) -> Batch:
    return _assemble(examples, own, size, lambda row, picture: cut(picture))

  return in_order(len(examples), batch_size, batch, shard_index, shard_count)


def in_order(
  count: int,
  batch_size: int,
  make: Callable[[np.ndarray], Batch],
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.MapDataset:
  """Returns the dataset of one pass over examples by their indices, which are in `index`; arguments
  and errors as in `shuffled`."""
  _check(count, batch_size, shard_index, shard_count)

  def batch(number: int) -> Batch:
    rows = np.arange(number * batch_size, min((number + 1) * batch_size, count))
    own = block(rows, batch_size, shard_index, shard_count)
    return make(own) | {"index": own.astype(np.int32)}

  return grain.MapDataset.range(-(-count // batch_size)).map(batch)


def crop(picture: np.ndarray, size: int, area: float, across: float, down: float) -> np.ndarray:
  """Returns a square of a picture, [size, size, 3].

  Args:
    picture: [height, width, 3] of uint8.
    size: pixels per side of the result.
    area: the area of the square, as a fraction of the largest one.
    across, down: its position, from 0, left or top, to 1.
  """
  height, width = picture.shape[:2]
  side = min(height, width) * area**0.5
  left, top = (width - side) * across, (height - side) * down
  box = (left, top, min(left + side, width), min(top + side, height))
  image = Image.fromarray(np.ascontiguousarray(picture))
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def summary(examples: Sized, batch_size: int, size: int) -> dict[str, Any]:
  """Returns the size of a pass over the examples, as described in `lora_jax.tasks.Task.summary`."""
  batches = -(-len(examples) // batch_size)
  return {
    "examples": len(examples),
    "batches": batches,
    "shapes": {(size, size): batches},
    "padding": 1 - len(examples) / (batches * batch_size),
  }


def _check(count: int, batch_size: int, shard_index: int, shard_count: int) -> None:
  if not count:
    raise ValueError("no examples to make batches of")
  check_shards(batch_size, shard_index, shard_count)


def _uniform(count: int, *seeds: int) -> np.ndarray:
  """Uniform values in [0, 1), determined by the seeds; see `lora_jax.data.batches.permutation`."""
  bits = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
  return (bits >> np.uint64(11)) * 2.0**-53


def _assemble(examples: Sequence[Example], indices: np.ndarray, size: int, cut) -> Batch:
  images = np.zeros((len(indices), size, size, 3), np.uint8)
  labels, weights = np.zeros(len(indices), np.int32), np.zeros(len(indices), np.float32)
  for row, index in enumerate(indices):
    if index >= 0:
      images[row] = cut(row, examples[index].picture)
      labels[row], weights[row] = examples[index].label, 1
  return {"images": images, "labels": labels, "weights": weights}
