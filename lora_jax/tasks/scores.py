"""Figures of predictions: of classes by their confusion matrix, of scores by scipy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats


def added(outputs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """The sums of what the step of each batch gave; raises ValueError where no row counts."""
  if not outputs or not sum(float(each["rows"]) for each in outputs):
    raise ValueError("there is no row to evaluate on: the split is empty")
  return {name: sum(np.asarray(x[name], np.float64) for x in outputs) for name in outputs[0]}


def of_confusion(counts: np.ndarray) -> dict[str, float]:
  """The figures of a confusion matrix; a quotient of nothing is 0.

  Args:
    counts: integers [classes, classes], rows by what is wanted, columns by what was said.

  Returns:
    `accuracy` (0 to 1); `f1`, of two classes that of the second one, of more the mean of all; and
    `matthews` (-1 to 1), the correlation coefficient R_K of Gorodkin 2004, "Comparing two
    K-category assignments by a K-category correlation coefficient", equation 8.
  """
  total, wanted, said = counts.sum(), counts.sum(axis=1), counts.sum(axis=0)
  hits = np.diagonal(counts)
  f1 = 2 * hits / np.maximum(wanted + said, 1)
  covariance = total * hits.sum() - wanted @ said
  spread = math.sqrt(float(total**2 - said @ said) * float(total**2 - wanted @ wanted))
  return {
    "accuracy": float(hits.sum() / total),
    "f1": float(f1[1] if len(counts) == 2 else f1.mean()),
    "matthews": float(covariance / spread) if spread else 0.0,
  }


def correlations(said: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
  """Pearson's and Spearman's correlations of two lists of numbers; 0 where either is constant, for
  which none is defined."""
  if len(said) < 2 or np.ptp(said) == 0 or np.ptp(wanted) == 0:
    return {"pearson": 0.0, "spearman": 0.0}
  return {
    "pearson": float(scipy.stats.pearsonr(said, wanted).statistic),
    "spearman": float(scipy.stats.spearmanr(said, wanted).statistic),
  }


def rows_of(outputs: Sequence[Mapping[str, Any]], *names: str) -> list[np.ndarray]:
  """What the step of each batch gave, [B, 1], of every row that counts, by its `weights`."""
  counted = np.concatenate([np.asarray(x["weights"]) for x in outputs]) > 0
  return [np.concatenate([np.asarray(x[name]) for x in outputs])[counted] for name in names]
