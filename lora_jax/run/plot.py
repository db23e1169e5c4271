"""Plots of a run: its loss over the steps.

plot_loss(read_metrics(workdir.metrics), workdir.plot)
plot_members(read_metrics(workdir.metrics), ["0: rank 4", "1: rank 8"], workdir.plot)
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_jax.io import outputs

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_TRAIN = "#2563a8"
_VALIDATION = "#d9541e"


def smooth(values: Sequence[float], *, width: float) -> np.ndarray:
  """The mean around each value, weighted by a Gaussian; unlike a running mean it does not lag.

      result_i = Σ_j g(i − j) v_j / Σ_j g(i − j),   g(n) = exp(−n² / 2·width²)

  Args:
    values: one value per logged step.
    width: the standard deviation, in logged steps; above 0.
  """
  reach = min(len(values), int(np.ceil(4 * width)))
  offsets = np.arange(-reach, reach + 1)
  kernel = np.exp(-0.5 * (offsets / width) ** 2)
  # The full convolution, cut to the values' positions; the kernel may be longer than the values.
  place = slice(reach, reach + len(values))
  total = np.convolve(np.asarray(values, float), kernel)[place]
  return total / np.convolve(np.ones(len(values)), kernel)[place]


def plot_loss(metrics: Sequence[dict[str, float]], path: pathlib.Path, unit: str = "token") -> None:
  """Plots the training loss, smoothed, and the validation losses to a PNG file.

  Args:
    metrics: the objects of metrics.jsonl, with `step`, `loss` and, on some, `validation/loss`.
    path: the file to write.
    unit: the unit that has a loss, in the singular.

  Raises:
    ValueError: if nothing was logged.
  """
  figure = _figure(metrics, path, 7, 4)
  steps = [record["step"] for record in metrics]
  losses = [record["loss"] for record in metrics]
  validation = [record for record in metrics if "validation/loss" in record]

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
  _finish(axes, unit)
  axes.legend(frameon=False)
  with outputs.whole_file(path) as partial:
    figure.savefig(partial)


def plot_members(
  metrics: Sequence[Mapping[str, float]],
  labels: Sequence[str],
  path: pathlib.Path,
  unit: str = "token",
) -> None:
  """Plots the training loss of every member of a sweep, smoothed, to a PNG file.

  Args:
    metrics: the objects of metrics.jsonl, with `step` and, while member n trains, `loss/n`.
    labels: the name of each member.
    path: the file to write.
    unit: the unit that has a loss, in the singular.

  Raises:
    ValueError: if nothing was logged.
  """
  import matplotlib

  figure = _figure(metrics, path, 9, 4.5)
  axes = figure.subplots()
  # From dark to light in the members' order, so that neighbors in a grid look alike.
  colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(labels)))
  for n, (label, color) in enumerate(zip(labels, colors, strict=True)):
    name = f"loss/{n}"
    steps = [record["step"] for record in metrics if name in record]
    losses = [record[name] for record in metrics if name in record]
    smoothed = smooth(losses, width=max(0.5, len(losses) / 50)) if losses else []
    axes.plot(steps, smoothed, color=color, linewidth=1.5, label=label)
  _finish(axes, unit)
  axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
  with outputs.whole_file(path) as partial:
    figure.savefig(partial)


def _figure(metrics: Sequence, path: pathlib.Path, width: float, height: float) -> "Figure":
  """An empty figure, of a size in inches; raises ValueError if there are no metrics to plot."""
  if not metrics:
    raise ValueError(f"{path}: there is nothing to plot, no step was logged")
  from matplotlib.figure import Figure  # the import takes half a second, and few programs plot

  # A Figure without pyplot touches no global state and needs no display.
  return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _finish(axes: "Axes", unit: str) -> None:
  """Adds the labels and lines around the curves."""
  axes.set_xlabel("step")
  axes.set_ylabel(f"loss (nats per {unit})")
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.2)
  axes.spines[["top", "right"]].set_visible(False)
