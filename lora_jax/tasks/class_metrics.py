"""Figures of a classifier from its scores: accuracy, balanced accuracy, and the area under the ROC.

    figures = of_scores(scores_NK, labels_N)     # {"accuracy": …, "balanced_accuracy": …, "auc": …}

Where classes are unequal in number, accuracy is that of the largest one; the other two are not.
"""

import numpy as np


def of_scores(scores_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
  """Returns the figures of scores, all from 0 to 1.

  accuracy: the fraction of rows whose label has the highest score, of several the first.
  balanced_accuracy: the mean over the classes that occur of the fraction of their rows that are
    right (recall).
  auc: how probably a row of a class has a higher score for it than a row of another class, a tie
    for a half. With two classes that of the second; with more the mean over classes, each against
    the rest (Fawcett 2006, "An introduction to ROC analysis"). NaN where a class does not occur.

  Args:
    scores_NK: of N rows for K classes, at least 2; what grows with the probability.
    labels_N: the numbers of the classes.
  """
  right_N = scores_NK.argmax(axis=1) == labels_N
  recalls = [right_N[labels_N == label].mean() for label in np.unique(labels_N)]
  of_classes = range(1, 2) if scores_NK.shape[1] == 2 else range(scores_NK.shape[1])
  # With two classes the probability of one is what the other leaves, so it orders the rows alike.
  areas = [area_under_roc(scores_NK[:, k], labels_N == k) for k in of_classes]
  return {
    "accuracy": float(right_N.mean()),
    "balanced_accuracy": float(np.mean(recalls)),
    "auc": float(np.mean(areas)),
  }


def area_under_roc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
  """Returns the probability that a positive row has a higher score than a negative one.

      (Σ ranks of the positive rows − P (P + 1) / 2) / (P · Q)

  of P positive and Q negative rows, where rows of one score share their mean rank (Mann and Whitney
  1947). NaN where there are none of either.
  """
  _, places_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
  # In whole numbers and halves, so that no rounding depends on the order of the rows.
  ranks = np.cumsum(counts) - (counts - 1) / 2
  positive = int(positive_N.sum())
  negative = len(positive_N) - positive
  if not positive or not negative:
    return float("nan")
  total = ranks[places_N[positive_N]].sum() - positive * (positive + 1) / 2
  return float(total / (positive * negative))
