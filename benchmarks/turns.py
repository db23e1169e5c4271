"""Measurements in turns: the candidates run in one process, one after another, round by round.

    seconds = run_in_turns({"ours": timed(ours), "theirs": timed(theirs)}, rounds=15)
    ratio(seconds["ours"], seconds["theirs"])     # "0.74 (0.73–0.76)"

A ratio is taken within each round, so that neither slow phases of the machine nor a drift decide.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import jax
from tqdm import tqdm

Label = TypeVar("Label", bound=Hashable)


def run_in_turns(
  rows: Mapping[Label, Callable[[], float]], rounds: int
) -> dict[Label, list[float]]:
  """The results of each row in each round; the order is reversed every other round."""
  seconds = {label: [] for label in rows}
  for i in tqdm(range(rounds), desc="rounds"):
    for label in rows if i % 2 == 0 else reversed(rows):
      seconds[label].append(rows[label]())
  return seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
  """A row that runs a function, waits for its result and returns the seconds of both."""

  def seconds() -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started

  return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> str:
  """The median of the ratios round by round, and their quartiles."""
  ratios = [x / y for x, y in zip(numerator, denominator, strict=True)]
  if len(ratios) == 1:
    return f"{ratios[0]:.2f}"
  low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
  return f"{median:.2f} ({low:.2f}–{high:.2f})"
