"""Metrics of a classifier from its scores: accuracy, balanced accuracy, and area under the ROC.

    figures = of_scores(scores_NK, labels_N)     # {"accuracy": …, "balanced_accuracy": …, "auc": …}

With imbalanced classes, accuracy is dominated by the largest class; the other two are not.
"""

import numpy as np


def of_scores(scores_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
  """Returns the metrics of scores, all from 0 to 1.

  accuracy: the fraction of rows whose label has the highest score; the first class wins ties.
  balanced_accuracy: the mean recall of the classes that occur.
  auc: the probability that a row of a class has a higher score for it than a row of another class;
    a tie counts half. With two classes this is the AUC of the second; with more, the mean of each
    class against the rest (Fawcett 2006, "An introduction to ROC analysis"). NaN if a class does
    not occur.

  Args:
    scores_NK: of N rows for K classes, at least 2; any increasing function of the probability.
    labels_N: the indices of the classes.
  """
  right_N = scores_NK.argmax(axis=1) == labels_N
  recalls = [right_N[labels_N == label].mean() for label in np.unique(labels_N)]
  of_classes = range(1, 2) if scores_NK.shape[1] == 2 else range(scores_NK.shape[1])
  # With two classes, one probability is 1 minus the other, so both rank the rows alike.
  areas = [area_under_roc(scores_NK[:, k], labels_N == k) for k in of_classes]
  return {
    "accuracy": float(right_N.mean()),
    "balanced_accuracy": float(np.mean(recalls)),
    "auc": float(np.mean(areas)),
  }


def area_under_roc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
  """Returns the probability that a positive row has a higher score than a negative one.

      (Σ ranks of the positive rows − P (P + 1) / 2) / (P · Q)

  for P positive and Q negative rows; rows with equal scores have their mean rank (Mann and Whitney
  1947). NaN if there are no positive or no negative rows.
  """
  _, places_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
  # Ranks are integers or halves, so the sums are exact in any order of the rows.
  ranks = np.cumsum(counts) - (counts - 1) / 2
  positive = int(positive_N.sum())
  negative = len(positive_N) - positive
  if not positive or not negative:
    return float("nan")
  total = ranks[places_N[positive_N]].sum() - positive * (positive + 1) / 2
  return float(total / (positive * negative))
