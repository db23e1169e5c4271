"""The picture of a run: its loss over the steps.

plot_loss(read_metrics(workdir.metrics), workdir.plot)
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

_TRAIN = "#2563a8"
_VALIDATION = "#d9541e"


def smooth(values: Sequence[float], *, width: float) -> np.ndarray:
  """The mean around each value, weighted by a Gaussian; unlike a running mean it does not lag.

      result_i = Σ_j g(i − j) v_j / Σ_j g(i − j),   g(n) = exp(−n² / 2·width²)

  Args:
    values: one a logged step.
    width: the standard deviation, in logged steps; above 0.
  """
  reach = min(len(values), int(np.ceil(4 * width)))
  offsets = np.arange(-reach, reach + 1)
  kernel = np.exp(-0.5 * (offsets / width) ** 2)
  # The full convolution, cut to the values' places, whichever of the two is longer.
  place = slice(reach, reach + len(values))
  total = np.convolve(np.asarray(values, float), kernel)[place]
  return total / np.convolve(np.ones(len(values)), kernel)[place]


def plot_loss(metrics: Sequence[dict[str, float]], path: pathlib.Path) -> None:
  """Draws the training loss, smoothed, and the validation losses into a PNG file.

  Args:
    metrics: the objects of metrics.jsonl, with `step`, `loss` and, on some, `validation/loss`.
    path: the file to write.

  Raises:
    ValueError: when nothing was logged.
  """
  if not metrics:
    raise ValueError(f"{path}: there is nothing to draw, no step was logged")
  steps = [record["step"] for record in metrics]
  losses = [record["loss"] for record in metrics]
  validation = [record for record in metrics if "validation/loss" in record]

  # A Figure of its own, without pyplot, touches no global state and needs no display.
  figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
  axes = figure.subplots()
  axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=1)
  # The width grows with the run, so that a long curve is as readable as a short one.
  smoothed = smooth(losses, width=max(0.5, len(losses) / 50))
  axes.plot(steps, smoothed, color=_TRAIN, linewidth=2, label="train")
  if validation:
    axes.plot(
      [record["step"] for record in validation],
      [record["validation/loss"] for record in validation],
      color=_VALIDATION,
      linewidth=1,
      marker="o",
      markersize=5,
      label="validation",
    )
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.2)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path)
