"""The picture of a run: its loss over the steps.

plot_loss(read_metrics(workdir.metrics), workdir.plot)
"""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

_TRAIN = "#2563a8"
_VALIDATION = "#d9541e"


def smooth(values: Sequence[float], *, decay: float) -> list[float]:
  """The exponential moving average, unbiased at its start.

      m_i = decay · m_{i-1} + (1 − decay) · v_i,   result_i = m_i / (1 − decay^i)

  Args:
    values: one a logged step.
    decay: 0 (no smoothing) or more, below 1.
  """
  result, mean, weight = [], 0.0, 0.0
  for value in values:
    mean = decay * mean + (1 - decay) * value
    weight = decay * weight + (1 - decay)
    result.append(mean / weight)
  return result


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
  # The window grows with the run, so that a long curve is as readable as a short one.
  decay = 1 - 1 / max(1, min(50, len(steps) / 20))
  axes.plot(steps, smooth(losses, decay=decay), color=_TRAIN, linewidth=2, label="train")
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
