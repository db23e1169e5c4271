"""Boxes in images: overlaps, anchors, matching, coding, and suppression of duplicates.

    anchors_N4 = anchors([(20, 20), (10, 10)], scales=((0.1, 0.2), (0.4,)), ratios=(1.0, 2.0))
    index_N = match(boxes_M4, is_real_M, anchors_N4, overlap=0.5)     # -1: background
    offsets_N4 = encode(boxes_M4[index_N], anchors_N4)
    kept_D, is_kept_D = suppress(boxes_N4, scores_N, overlap=0.6, most=100)

A box is (left, top, right, bottom), as fractions of the image's width and height, so it is the same
box in an image that was resized to a square. All shapes are fixed: padding has a mask.

Shapes: N anchors, or boxes found; M true boxes; D detections.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector", section 2.2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Standard deviations of the offsets of positions and of sizes in SSD's published code, by which
# both are scaled to the same size.
_OF_POSITIONS, _OF_SIZES = 0.1, 0.2
_TINY = 1e-6  # the smallest side of a box, as a fraction of the image
_MOST_GROWTH = 4.0  # the largest logarithm of a box's side over its anchor's


def overlaps(first_N4: jax.Array, second_M4: jax.Array) -> jax.Array:
  """The intersection over the union of each pair, [N, M], from 0 to 1; 0 without any area."""
  first_N14, second_1M4 = first_N4[:, None], second_M4[None]
  low = jnp.maximum(first_N14[..., :2], second_1M4[..., :2])
  high = jnp.minimum(first_N14[..., 2:], second_1M4[..., 2:])
  both_NM = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
  either_NM = _area(first_N4)[:, None] + _area(second_M4)[None] - both_NM
  return jnp.where(either_NM > 0, both_NM / jnp.where(either_NM > 0, either_NM, 1), 0)


def _area(boxes_N4: jax.Array) -> jax.Array:
  return jnp.prod(jnp.maximum(boxes_N4[..., 2:] - boxes_N4[..., :2], 0), axis=-1)


def anchors(
  sizes: Sequence[tuple[int, int]], scales: Sequence[Sequence[float]], ratios: Sequence[float]
) -> np.ndarray:
  """Returns the anchors of feature maps, [N, 4] of float32, not clipped to the image.

  At each position of a map are len(scales) · len(ratios) boxes around the center of its cell: of
  width scale · sqrt(ratio) and height scale / sqrt(ratio). The order is map, row, column, scale,
  ratio.

  Args:
    sizes: the rows and columns of each map.
    scales: for each map, the square roots of the areas of its boxes, as fractions of the image's.
    ratios: width over height, in an image that was resized to a square.
  """
  found = []
  for (rows, columns), own in zip(sizes, scales, strict=True):
    down, across = np.mgrid[:rows, :columns]
    centers = np.stack([(across + 0.5) / columns, (down + 0.5) / rows], axis=-1)
    halves = np.array(
      [(scale * ratio**0.5 / 2, scale / ratio**0.5 / 2) for scale in own for ratio in ratios]
    )
    centers = centers.reshape(-1, 1, 2)
    each = np.concatenate([centers - halves, centers + halves], axis=-1)
    found.append(each.reshape(-1, 4))
  return np.concatenate(found).astype(np.float32)


def match(
  boxes_M4: jax.Array, is_real_M: jax.Array, anchors_N4: jax.Array, overlap: float
) -> jax.Array:
  """Returns the index of the true box of each anchor, [N] of int32, or -1 for background.

  An anchor has the box that it overlaps most, if that is at least `overlap`. The anchor that
  overlaps a box most has that box in any case; if it is that of several boxes, the one that it
  overlaps most (section 2.2, "Matching strategy").

  Args:
    boxes_M4: the true boxes, and padding.
    is_real_M: False for padding.
    anchors_N4: from `anchors`.
    overlap: the least intersection over union, from 0 to 1.
  """
  overlaps_NM = jnp.where(is_real_M, overlaps(anchors_N4, boxes_M4), -1.0)
  best_M = jnp.argmax(overlaps_NM, axis=0)
  is_best_NM = (jnp.arange(len(anchors_N4))[:, None] == best_M) & is_real_M
  # Above all overlaps, and among themselves by overlap.
  ranked_NM = jnp.where(is_best_NM, overlaps_NM + 2, overlaps_NM)
  index_N = jnp.argmax(ranked_NM, axis=1).astype(jnp.int32)
  return jnp.where(jnp.max(ranked_NM, axis=1) >= overlap, index_N, -1)


def encode(boxes_N4: jax.Array, anchors_N4: jax.Array) -> jax.Array:
  """Returns the offsets of boxes from anchors, [N, 4]: of the center x and y in sides of the anchor
  over 0.1, and the logarithms of width and height over the anchor's over 0.2 (equation 2, and
  SSD's published code for the factors)."""
  center, side = _center(boxes_N4)
  from_center, from_side = _center(anchors_N4)
  positions = (center - from_center) / from_side / _OF_POSITIONS
  sizes = jnp.log(jnp.maximum(side, _TINY) / from_side) / _OF_SIZES
  return jnp.concatenate([positions, sizes], axis=-1)


def decode(offsets_N4: jax.Array, anchors_N4: jax.Array) -> jax.Array:
  """The inverse of `encode`, clipped to the image, in float32; a box grows at most e⁴ times."""
  offsets_N4 = offsets_N4.astype(jnp.float32)
  from_center, from_side = _center(anchors_N4)
  center = from_center + offsets_N4[..., :2] * _OF_POSITIONS * from_side
  growth = jnp.clip(offsets_N4[..., 2:] * _OF_SIZES, -_MOST_GROWTH, _MOST_GROWTH)
  half = from_side * jnp.exp(growth) / 2
  return jnp.clip(jnp.concatenate([center - half, center + half], axis=-1), 0, 1)


def _center(boxes_N4: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The centers and the sides of boxes, [N, 2] each."""
  low, high = boxes_N4[..., :2], boxes_N4[..., 2:]
  return (low + high) / 2, high - low


def suppress(
  boxes_N4: jax.Array, scores_N: jax.Array, *, overlap: float, most: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the indices of boxes without their duplicates, [D], and which of them are real.

  By falling score each box is kept unless it overlaps a box that is kept by more than `overlap`
  (greedy non-maximum suppression). Only the `most` boxes of the highest scores are considered, so D
  is `most`, or N if that is less. The shapes do not depend on the values.

  Args:
    boxes_N4: of one class.
    scores_N: above 0 for a box, and 0 or less for padding.
    overlap: intersection over union, from 0 to 1; 1 keeps all.
    most: how many boxes are considered.
  """
  scores_D, index_D = jax.lax.top_k(scores_N, min(most, len(scores_N)))
  overlaps_DD = overlaps(boxes_N4[index_D], boxes_N4[index_D])
  places_D = jnp.arange(len(index_D))

  def take(place: int, is_kept_D: jax.Array) -> jax.Array:
    falls_D = (overlaps_DD[place] > overlap) & (places_D > place) & is_kept_D[place]
    return is_kept_D & ~falls_D

  return index_D, jax.lax.fori_loop(0, len(index_D), take, scores_D > 0)


def detect(
  boxes_N4: jax.Array, scores_NK: jax.Array, *, least_score: float, overlap: float, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the detections of one image by falling score: boxes [D, 4], classes [D], scores [D].

  Duplicates are suppressed within each class. Rows of score 0 are padding.

  Args:
    boxes_N4: a box for each anchor.
    scores_NK: the probability of each of K classes, without background.
    least_score: boxes of lower scores are no detections.
    overlap: as in `suppress`.
    most: D, and how many boxes of each class are considered.
  """
  scores_NK = jnp.where(scores_NK >= least_score, scores_NK, 0)

  def of_class(scores_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    index_D, is_kept_D = suppress(boxes_N4, scores_N, overlap=overlap, most=most)
    return index_D, jnp.where(is_kept_D, scores_N[index_D], 0)

  index_KD, scores_KD = jax.vmap(of_class)(scores_NK.T)
  scores_D, place_D = jax.lax.top_k(scores_KD.reshape(-1), min(most, scores_KD.size))
  index_D, classes_D = index_KD.reshape(-1)[place_D], place_D // scores_KD.shape[1]
  return boxes_N4[index_D], classes_D.astype(jnp.int32), scores_D
