"""Learning rates of configs whose task adds a head, and sweeps over the learning rate."""

from collections.abc import Mapping

import ml_collections


def choose(
  optimizer: ml_collections.ConfigDict, method: str, peaks: Mapping[str, float], head: float
) -> None:
  """Sets the learning rates of a config's `optimizer`.

  method: its name; "head" trains the new head alone.
  peaks: by method; others keep that of the optimizer.
  head: of the new head with every method, since it learns from nothing.
  """
  optimizer.peak_learning_rate = peaks.get(method, optimizer.peak_learning_rate)
  if method != "head":
    optimizer.rates = (*optimizer.rates, ("head/.*", head / optimizer.peak_learning_rate))


def sweep(config: ml_collections.ConfigDict) -> None:
  """Makes a sweep over three learning rates, with half of the steps."""
  rates = tuple(factor * config.optimizer.peak_learning_rate for factor in (0.3, 1.0, 3.0))
  config.sweep.grid = (("optimizer.peak_learning_rate", rates),)
  config.train.steps //= 2
