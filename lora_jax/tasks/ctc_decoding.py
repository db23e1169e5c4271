"""CTC: the most likely text of a row of frames, greedily or by beam search.

    collapse([0, 3, 3, 0, 3, 5], blank=0)                   # [3, 3, 5]
    beam_search(log_p_SK, beams=8, blank=0)                 # [3, 3, 5]
    frames_needed([3, 3, 5])                                # 4: a blank between the two

Graves et al. 2006, "Connectionist Temporal Classification"; the beam search over prefixes is that
of Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition", algorithm 1,
without a language model.

Letters: S frames, K classes with the blank.
"""

import itertools
from collections.abc import Sequence

import numpy as np


def collapse(path: Sequence[int], blank: int) -> list[int]:
  """Returns a path of frames as a text: repeats are one, blanks are left out."""
  return [label for label, _ in itertools.groupby(path) if label != blank]


def frames_needed(labels: Sequence[int]) -> int:
  """Returns the fewest frames that a text needs: one a label, and a blank between equal ones."""
  return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def beam_search(log_p_SK: np.ndarray, beams: int, blank: int) -> list[int]:
  """Returns the most likely text, over all paths that collapse to it.

  Args:
    log_p_SK: log-probabilities of each frame.
    beams: prefixes that are kept at each frame; enough of them make the search exact.
    blank: the class that is left out.
  """
  # The log-probabilities of a prefix by paths that end in a blank, and by those that do not.
  found: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
  for log_p_K in np.asarray(log_p_SK, np.float64):
    after: dict[tuple[int, ...], list[float]] = {}

    def add(prefix: tuple[int, ...], which: int, log_p: float, after=after) -> None:
      sums = after.setdefault(prefix, [-np.inf, -np.inf])
      sums[which] = np.logaddexp(sums[which], log_p)

    for prefix, (blanks, labels) in found.items():
      whole = np.logaddexp(blanks, labels)
      add(prefix, 0, whole + log_p_K[blank])
      for label in range(len(log_p_K)):
        if label == blank:
          continue
        if prefix and prefix[-1] == label:
          add(prefix, 1, labels + log_p_K[label])
          add((*prefix, label), 1, blanks + log_p_K[label])
        else:
          add((*prefix, label), 1, whole + log_p_K[label])
    pairs = [(prefix, (blanks, labels)) for prefix, (blanks, labels) in after.items()]
    found = dict(sorted(pairs, key=lambda pair: -np.logaddexp(*pair[1]))[:beams])
  return list(max(found, key=lambda prefix: np.logaddexp(*found[prefix])))
