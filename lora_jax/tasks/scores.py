"""Metrics of predictions: of classes from their confusion matrix, of scores by scipy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def added(outputs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Returns the sums of the outputs of all batches; raises ValueError if no row has weight."""
  if not outputs or not sum(float(each["rows"]) for each in outputs):
    raise ValueError("there is no row to evaluate on: the split is empty")
  return {
    name: sum((np.asarray(x[name], np.float64) for x in outputs), start=np.zeros(()))
    for name in outputs[0]
  }


def of_confusion(counts: np.ndarray) -> dict[str, float]:
  """Returns the metrics of a confusion matrix; 0 / 0 is 0.

  Args:
    counts: integers [classes, classes]; rows are labels, columns are predictions.

  Returns:
    `accuracy` (0 to 1); `f1`, of the second class if there are two, otherwise the mean over
    classes; and `matthews` (-1 to 1), the correlation coefficient R_K of Gorodkin 2004, "Comparing
    two K-category assignments by a K-category correlation coefficient", equation 8.
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
  """Returns Pearson's and Spearman's correlations of two lists of numbers; 0 if either list is
  constant, where they are undefined."""
  if len(said) < 2 or np.ptp(said) == 0 or np.ptp(wanted) == 0:
    return {"pearson": 0.0, "spearman": 0.0}
  import scipy.stats  # the import takes a second, and few tasks need it

  return {
    "pearson": _statistic(scipy.stats.pearsonr(said, wanted)),
    "spearman": _statistic(scipy.stats.spearmanr(said, wanted)),
  }


def _statistic(result: Any) -> float:
  """The statistic of a test; scipy makes its results' classes at run time, without types."""
  return float(result.statistic)


def rows_of(outputs: Sequence[Mapping[str, Any]], *names: str) -> list[np.ndarray]:
  """Returns the outputs of each batch, [B, 1], for the rows with nonzero `weights`."""
  counted = np.concatenate([np.asarray(x["weights"]) for x in outputs]) > 0
  return [np.concatenate([np.asarray(x[name]) for x in outputs])[counted] for name in names]
