"""Boxes: overlaps, anchors, matching and suppression, on cases worked out by hand and at random."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import boxes


def random_boxes(count, seed, side=0.3):
  rng = np.random.default_rng(seed)
  centers, halves = rng.uniform(0, 1, (count, 2)), rng.uniform(0.02, side, (count, 2))
  return np.concatenate([centers - halves, centers + halves], axis=1).astype(np.float32)


def test_the_overlap_of_boxes_is_their_intersection_over_their_union():
  first = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [1, 1, 1, 1]], np.float32)
  second = np.array([[1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 3, 1], [1, 1, 1, 1]], np.float32)
  wanted = [[1 / 7, 1, 0, 0], [0, 1 / 4, 0, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(boxes.overlaps(first, second), wanted, atol=1e-7)


def test_anchors_are_around_the_centers_of_their_cells_in_a_known_order():
  found = boxes.anchors([(2, 1), (1, 1)], scales=((0.2, 0.4), (0.8,)), ratios=(1.0, 4.0))
  assert found.shape == (2 * 1 * 2 * 2 + 2, 4) and found.dtype == np.float32
  # The upper cell: scale 0.2 with both ratios, then 0.4.
  np.testing.assert_allclose(found[0], [0.4, 0.15, 0.6, 0.35], atol=1e-6)
  np.testing.assert_allclose(found[1], [0.3, 0.2, 0.7, 0.3], atol=1e-6)
  np.testing.assert_allclose(found[2], [0.3, 0.05, 0.7, 0.45], atol=1e-6)
  np.testing.assert_allclose(found[4], [0.4, 0.65, 0.6, 0.85], atol=1e-6)
  np.testing.assert_allclose(found[8], [0.1, 0.1, 0.9, 0.9], atol=1e-6)
  sides = found[:, 2:] - found[:, :2]
  np.testing.assert_allclose(np.sqrt(sides.prod(axis=1))[:4], [0.2, 0.2, 0.4, 0.4], atol=1e-6)


def test_anchors_match_the_boxes_that_they_overlap_and_each_box_has_its_best_anchor():
  anchors = np.array(
    [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]],
    np.float32,
  )
  true = np.array(
    [
      [0.0, 0.0, 0.5, 0.45],  # overlaps the first anchor by 0.9
      [0.6, 0.1, 0.8, 0.3],  # overlaps the second one most, by 0.04 / 0.25 = 0.16 only
      [0.0, 0.5, 1.0, 1.0],  # padding: it would match the last two
    ],
    np.float32,
  )
  is_real = np.array([True, True, False])
  assert boxes.match(true, is_real, anchors, 0.5).tolist() == [0, 1, -1, -1]
  # All real: the third box overlaps the last two by 0.5 each, which is enough for both.
  assert boxes.match(true, np.ones(3, bool), anchors, 0.5).tolist() == [0, 1, 2, 2]
  assert boxes.match(true, np.ones(3, bool), anchors, 0.51).tolist() == [0, 1, 2, -1]
  assert boxes.match(true, np.zeros(3, bool), anchors, 0.0).tolist() == [-1] * 4


def test_an_anchor_that_is_the_best_of_two_boxes_has_the_one_that_it_overlaps_more():
  anchors = np.array([[0, 0, 0.4, 0.4], [0.9, 0.9, 1, 1]], np.float32)
  true = np.array([[0, 0, 0.3, 0.4], [0, 0, 0.4, 0.39]], np.float32)
  assert boxes.match(true, np.ones(2, bool), anchors, 0.5).tolist() == [1, -1]


def test_coding_is_undone_and_has_the_scales_of_ssd():
  anchors = random_boxes(50, 0)
  true = np.clip(random_boxes(50, 1), 0.01, 0.99)
  offsets = boxes.encode(true, anchors)
  np.testing.assert_allclose(boxes.decode(offsets, anchors), true, atol=1e-5)
  # Half an anchor's side to the right, and twice as high.
  anchor = np.array([[0.2, 0.2, 0.4, 0.4]], np.float32)
  moved = np.array([[0.3, 0.1, 0.5, 0.5]], np.float32)
  wanted = [[0.5 / 0.1, 0, 0, np.log(2) / 0.2]]
  np.testing.assert_allclose(boxes.encode(moved, anchor), wanted, atol=1e-5)
  # A wild prediction stays a box in the image.
  wild = np.asarray(boxes.decode(np.full((1, 4), 1e6, np.float32), anchor))
  assert np.isfinite(wild).all() and wild.min() >= 0 and wild.max() <= 1


def plain_suppression(corners, scores, overlap):
  """The textbook's loop, in Python."""
  order = [n for n in np.argsort(-scores, kind="stable") if scores[n] > 0]
  kept = []
  for n in order:
    if all(plain_overlap(corners[n], corners[m]) <= overlap for m in kept):
      kept.append(n)
  return kept


def plain_overlap(a, b):
  width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
  height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
  area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
  return width * height / area if area else 0.0


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.6, 1.0])
def test_suppression_keeps_what_a_plain_loop_keeps(overlap):
  suppress = jax.jit(boxes.suppress, static_argnames=("overlap", "most"))
  counts = set()
  for seed in range(5):
    corners = random_boxes(60, seed)
    scores = np.random.default_rng(seed).uniform(-0.3, 1, 60).astype(np.float32)
    index, is_kept = suppress(corners, scores, overlap=overlap, most=60)
    wanted = plain_suppression(corners, scores, overlap)
    assert index[is_kept].tolist() == wanted
    counts.add(len(wanted))
  assert (min(counts) < max(counts) < 60) or overlap == 1.0  # something was suppressed


def test_a_box_is_not_suppressed_by_one_that_is_itself_suppressed():
  corners = np.array([[0, 0, 1, 1], [0.3, 0, 1.3, 1], [0.6, 0, 1.6, 1]], np.float32)
  index, is_kept = boxes.suppress(corners, jnp.array([0.9, 0.8, 0.7]), overlap=0.5, most=3)
  assert index[is_kept].tolist() == [0, 2]


def test_neighbors_that_touch_survive_at_an_overlap_that_allows_it():
  corners = np.array([[0, 0, 1, 1], [0.3, 0, 1.3, 1]], np.float32)  # overlap 0.54
  scores = jnp.array([0.9, 0.8])
  for overlap, kept in ((0.5, 1), (0.6, 2)):
    assert int(boxes.suppress(corners, scores, overlap=overlap, most=2)[1].sum()) == kept


def test_detections_are_sorted_over_all_classes_and_suppressed_within_each():
  corners = jnp.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.49], [0.5, 0.5, 1, 1]])
  scores = jnp.array([[0.9, 0.3], [0.8, 0.7], [0.05, 0.6]])
  found = boxes.detect(corners, scores, least_score=0.1, overlap=0.5, most=4)
  wanted = [(0, 0, 0.9), (1, 1, 0.7), (2, 1, 0.6)]
  for place, (box, label, score) in enumerate(wanted):
    np.testing.assert_array_equal(found[0][place], corners[box])
    assert int(found[1][place]) == label and float(found[2][place]) == pytest.approx(score)
  assert found[2].shape == (4,) and float(found[2][3]) == 0  # padding
  fewer = boxes.detect(corners, scores, least_score=0.1, overlap=0.5, most=2)
  assert fewer[2].tolist() == pytest.approx([0.9, 0.7])


def test_gradients_of_the_coding_are_finite_for_boxes_without_area():
  anchors = random_boxes(4, 3)
  flat = np.repeat(anchors[:, :2], 2, axis=1)[:, [0, 2, 1, 3]]
  gradient = jax.grad(lambda x: boxes.encode(x, anchors).sum())(jnp.asarray(flat))
  assert np.isfinite(gradient).all()
  for a, b in itertools.product((flat, anchors), repeat=2):
    assert np.isfinite(jax.grad(lambda x: boxes.overlaps(x, b).sum())(jnp.asarray(a))).all()  # noqa: B023
