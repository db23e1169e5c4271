"""Figures of a classifier, against scipy and against counting."""

import math

import numpy as np
import pytest
import scipy.stats

from lora_jax.tasks import class_metrics


def test_figures_are_those_of_scipy_and_of_counting():
  rng = np.random.default_rng(0)
  labels = rng.choice(2, 200, p=[0.2, 0.8])
  for digits in (9, 1):  # without ties, and with many
    scores = np.round(rng.random(200) + 0.3 * labels, digits)
    expected = scipy.stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    expected /= (labels == 1).sum() * (labels == 0).sum()
    assert class_metrics.area_under_roc(scores, labels == 1) == pytest.approx(expected, abs=1e-12)
    found = class_metrics.of_scores(np.stack([1 - scores, scores], 1), labels)
    assert found["auc"] == pytest.approx(expected, abs=1e-12)
    said = scores > 0.5
    assert found["accuracy"] == (said == labels).mean()
    halves = (said[labels == 1].mean(), 1 - said[labels == 0].mean())
    assert found["balanced_accuracy"] == pytest.approx(np.mean(halves))
  three = rng.random((50, 3))
  labels = np.arange(50) % 3
  areas = [class_metrics.area_under_roc(three[:, k], labels == k) for k in range(3)]
  assert class_metrics.of_scores(three, labels)["auc"] == pytest.approx(np.mean(areas))


def test_a_class_that_does_not_occur_has_no_area_and_no_part_in_the_balance():
  scores = np.array([[0.9, 0.1], [0.2, 0.8]])
  found = class_metrics.of_scores(scores, np.array([0, 0]))
  assert math.isnan(found["auc"]) and found["balanced_accuracy"] == found["accuracy"] == 0.5
  perfect = class_metrics.of_scores(scores, np.array([0, 1]))
  assert perfect == {"accuracy": 1.0, "balanced_accuracy": 1.0, "auc": 1.0}
