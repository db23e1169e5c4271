"""Figures of classes and of scores, against scipy and against their definitions."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.tasks import scores

LABELS = st.integers(2, 4).flatmap(
  lambda classes: st.lists(
    st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=30
  ).map(lambda rows: (classes, rows))
)


def confusion(classes, rows):
  counts = np.zeros((classes, classes), int)
  for wanted, said in rows:
    counts[wanted, said] += 1
  return counts


@settings(deadline=None, max_examples=60)
@given(LABELS)
def test_figures_of_classes_are_those_of_their_definitions(labels):
  classes, rows = labels
  found = scores.of_confusion(confusion(classes, rows))
  wanted, said = np.array(rows).T
  assert found["accuracy"] == pytest.approx(np.mean(wanted == said))
  each = []
  for n in range(classes):
    hits, guesses, there = (
      np.sum(x) for x in ((wanted == n) & (said == n), said == n, wanted == n)
    )
    precision, recall = hits / guesses if guesses else 0, hits / there if there else 0
    both = precision + recall
    each.append(2 * precision * recall / both if both else 0)
  assert found["f1"] == pytest.approx(each[1] if classes == 2 else np.mean(each))
  # The correlation of indicators over all classes together (Gorodkin 2004, equations 3 to 8).
  x, y = np.eye(classes)[wanted], np.eye(classes)[said]
  x, y = x - x.mean(0), y - y.mean(0)
  spread = np.sqrt((x * x).sum() * (y * y).sum())
  assert found["matthews"] == pytest.approx((x * y).sum() / spread if spread else 0.0, abs=1e-9)


def test_matthews_of_two_classes_is_pearsons_correlation():
  rng = np.random.default_rng(0)
  wanted = rng.integers(0, 2, 200)
  said = np.where(rng.random(200) < 0.8, wanted, 1 - wanted)
  found = scores.of_confusion(confusion(2, list(zip(wanted, said, strict=True))))
  assert found["matthews"] == pytest.approx(scipy.stats.pearsonr(wanted, said).statistic)


def test_a_constant_answer_has_no_correlation_and_an_empty_split_no_figures():
  assert scores.of_confusion(np.array([[3, 0], [4, 0]])) == pytest.approx(
    {"accuracy": 3 / 7, "f1": 0.0, "matthews": 0.0}
  )
  rising = np.arange(5.0)
  assert scores.correlations(rising, np.ones(5)) == {"pearson": 0.0, "spearman": 0.0}
  assert scores.correlations(rising, rising**3)["spearman"] == pytest.approx(1.0)
  assert 0.9 < scores.correlations(rising, rising**3)["pearson"] < 1
  with pytest.raises(ValueError, match="the split is empty"):
    scores.added([])
  with pytest.raises(ValueError, match="the split is empty"):
    scores.added([{"rows": 0.0, "loss": 0.0}])


def test_rows_of_weight_zero_are_left_out():
  outputs = [
    {"weights": np.array([[1], [0]]), "said": np.array([[2], [3]])},
    {"weights": [[1]], "said": [[4]]},
  ]
  [said] = scores.rows_of(outputs, "said")
  assert said.tolist() == [2, 4]
