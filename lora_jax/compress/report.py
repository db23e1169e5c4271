"""The costs and gains of a compression: sizes, FLOPs, times and quality, step by step.

    rows = [report.Row("dense", measures), report.Row("factorize", others), ...]
    report.write("runs/small", rows, about="python -m experiments.compress ...")

writes report.json, report.md with the table, and pareto.png: perplexity, or the loss of a task,
against the size in memory.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import cost, families
from lora_jax.checks import shown
from lora_jax.io import json_files, outputs
from lora_jax.weights import Adapted, Factored, Pruned, is_weight

PyTree = Any
Runs = Mapping[tuple[str, int], Callable[[], Any]]
"""The calls that are timed: {(name, rows of the batch): a call that returns its result}."""

_REPORT = "report.json"
_LOSSES = ("perplexity", "loss")  # figures that fall as a model gets better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
  """Measurements of a model after a step.

  Attributes:
    parameters: the number of stored values; in pruned leaves, of those that are not zero.
    memory: bytes of the arrays that it needs on the device.
    disk: bytes of the tensors' file.
    flops: floating-point operations of the products per unit.
    unit: of `flops`: "token", of a prompt, or "input".
    times: milliseconds by name and batch size, such as {"latency": {1: 5.0, 8: 20.0}}.
    ratios: of the same, to the times of the model before all steps, taken in turns; {} if that
      model was not at hand.
    figures: the perplexity on held-out text, the metrics of a task.
  """

  parameters: int
  memory: int
  disk: int
  flops: int
  unit: str
  times: dict[str, dict[int, float]]
  ratios: dict[str, dict[int, float]]
  figures: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
  """A step, described for the table ("dense" at the start), and the measurements after it."""

  step: str
  measures: Measures

  def __str__(self) -> str:
    m = self.measures
    size = f"{m.parameters / 1e6:,.1f} M parameters, {m.memory / 1e6:,.1f} MB"
    return ", ".join([f"{self.step}: {size}", *(f"{k} {x:.4g}" for k, x in m.figures.items())])


# ---- measurements


def count_parameters(params: PyTree) -> int:
  """The number of stored values of a tree: without masked values, each quantized value as one."""
  return sum(map(_count, jax.tree.leaves(params, is_leaf=is_weight)))


def _count(leaf: Any) -> int:
  match leaf:
    case Pruned(w=Adapted() as adapted, mask=mask):
      return int(mask.sum()) + sum(part.size for part in adapted.parts.values())
    case Pruned(mask=mask):
      return int(mask.sum())
    case Factored(a=a, b=b):
      return _count(a) + _count(b)
    case Adapted(w=w):
      return _count(w) + sum(part.size for part in leaf.parts.values())
  return math.prod(leaf.shape)


def count_bytes(params: PyTree) -> int:
  """The bytes of all arrays of a tree, including masks and scales."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def decoding(
  apply: Callable, params: PyTree, config: families.Config, *, rows: int, length: int
) -> Runs:
  """The runs "prefill", of `rows` prompts of `length` tokens, and "token", one more of each row."""
  tokens = jnp.ones((rows, length), jnp.int32)
  init_cache = families.family_of(config).init_cache
  assert init_cache is not None  # only models of texts are compressed
  cache = init_cache(config, rows, length + 1, config.dtype)

  @jax.jit
  def prefill(params, tokens, cache):
    last = jnp.full((rows, 1), length - 1)
    return apply({"params": params}, tokens, at_BC=last, cache=cache)

  @jax.jit
  def step(params, token, positions, cache):
    return apply({"params": params}, token, positions_BT=positions, cache=cache)

  _, filled = prefill(params, tokens, cache)
  positions = jnp.full((rows, 1), length)
  return {
    ("prefill", rows): lambda: prefill(params, tokens, cache),
    ("token", rows): lambda: step(params, tokens[:, :1], positions, filled),
  }


def latencies(
  runs: Runs, first: Runs | None, repeats: int
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
  """Returns the times and ratios of `Measures`: medians over `repeats` turns.

  Args:
    runs: what is timed.
    first: the same of the model before all steps; each turn of a run follows one of its own.
    repeats: turns, after a call of each that compiles.
  """
  times: dict[str, dict[int, float]] = {}
  ratios: dict[str, dict[int, float]] = {}
  for (name, rows), run in runs.items():
    turns = [] if first is None else [first[name, rows]]
    turns.append(run)
    for each in turns:
      jax.block_until_ready(each())
    found = np.array([[_milliseconds(each) for each in turns] for _ in range(repeats)])
    times.setdefault(name, {})[rows] = float(np.median(found[:, -1]))
    if first is not None:
      ratios.setdefault(name, {})[rows] = float(np.median(found[:, -1] / found[:, 0]))
  return times, ratios


def _milliseconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run())
  return 1000 * (time.perf_counter() - start)


def flops_per_token(apply: Callable, params: PyTree, length: int) -> int:
  """The floating-point operations of the products per token of a text of this length."""
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  shapes = jax.eval_shape(lambda: params)
  return cost.flops(jax.make_jaxpr(apply)({"params": shapes}, tokens)) // length


# ---- writing


def table(rows: Sequence[Row]) -> str:
  """The rows in Markdown; sizes and times also as a fraction of the first row's."""
  first = rows[0].measures
  timed = [(name, n) for name, each in first.times.items() for n in sorted(each)]
  figures = list(dict.fromkeys(name for row in rows for name in row.measures.figures))
  header = [
    "step", "parameters", "memory", "disk", f"GFLOP per {first.unit}",
    *(f"{name} × {n}" for name, n in timed), *figures,
  ]  # fmt: skip
  lines = [header, ["---", *["---:"] * (len(header) - 1)]]
  for row in rows:
    m = row.measures
    lines.append(
      [
        row.step,
        f"{m.parameters / 1e6:,.1f} M ({m.parameters / first.parameters:.2f})",
        f"{m.memory / 1e6:,.1f} MB ({m.memory / first.memory:.2f})",
        f"{m.disk / 1e6:,.1f} MB ({m.disk / first.disk:.2f})",
        f"{m.flops / 1e9:.3f} ({m.flops / first.flops:.2f})",
        *(_time(m, name, n) for name, n in timed),
        *(f"{m.figures[name]:,.4g}" if name in m.figures else "-" for name in figures),
      ]
    )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(m: Measures, name: str, rows: int) -> str:
  ratio = m.ratios.get(name, {}).get(rows)
  return f"{m.times[name][rows]:,.1f} ms" + ("" if ratio is None else f" ({ratio:.2f})")


def write(folder: str | Path, rows: Sequence[Row], about: str) -> None:
  """Writes report.json, report.md and pareto.png into a folder.

  Args:
    folder: an existing folder.
    rows: the steps, the dense model first.
    about: a description of the measurement, in Markdown.
  """
  folder = Path(folder)
  steps = [{"step": row.step} | dataclasses.asdict(row.measures) for row in rows]
  fields = {"about": about, "steps": steps}
  outputs.write_text(folder / _REPORT, outputs.as_json(fields, indent=2) + "\n")
  text = f"# {folder.name}\n\n{table(rows)}\n\n![Pareto plot](pareto.png)\n\n{about}\n"
  outputs.write_text(folder / "report.md", text)
  plot_pareto(rows, folder / "pareto.png")


def read(folder: str | Path) -> tuple[str, list[Row]]:
  """Returns the `about` and the rows that `write` was given.

  Raises:
    FileNotFoundError: if the folder has no report.
    PermissionError: if it cannot be read.
    ValueError: if it is damaged.
  """
  path = Path(folder) / _REPORT
  found = json_files.read_json(path, what="the report of a compression")
  try:
    rows = [_row(dict(fields)) for fields in found["steps"]]
    about = found["about"]
    if not isinstance(about, str):
      raise TypeError(f"about is {shown(about)}")
    if len({tuple((x, *each) for x, each in row.measures.times.items()) for row in rows}) > 1:
      raise ValueError("not every step was measured at the same batch sizes")
    if not all(_loss_of(rows) in row.measures.figures for row in rows):
      raise ValueError(f"not every step has its {_loss_of(rows)}")
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path}: is not the report of a compression ({error!r:.200}); restore it, or compress again "
      "into another workdir"
    ) from None
  return about, rows


def _loss_of(rows: Sequence[Row]) -> str:
  """The figure that is plotted."""
  return next(x for x in _LOSSES if x in rows[0].measures.figures)


def _row(fields: dict[str, Any]) -> Row:
  step, unit = fields.pop("step"), fields.pop("unit")
  if not isinstance(step, str) or unit not in ("token", "input"):
    raise TypeError(f"step and unit are {shown((step, unit))}")
  times = {
    part: {name: {int(n): _number(name, x) for n, x in dict(each).items()} for name, each in found}
    for part, found in ((part, dict(fields.pop(part)).items()) for part in ("times", "ratios"))
  }
  if not times["times"] or not all(times["times"].values()):
    raise TypeError(f"times is {shown(times['times'])}")
  figures = {name: _number(name, x) for name, x in dict(fields.pop("figures")).items()}
  if not set(_LOSSES) & set(figures):
    raise TypeError(f"figures is {shown(figures)}")
  sizes: dict[str, Any] = {name: _number(name, value) for name, value in fields.items()}
  for name in ("parameters", "memory", "disk", "flops"):
    if not sizes.get(name, 0) > 0:
      raise ValueError(f"{name} is {shown(sizes.get(name))}")
  measures = Measures(
    **sizes, times=times["times"], ratios=times["ratios"], unit=unit, figures=figures
  )
  return Row(step, measures)


def _number(name: str, value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float | None):
    raise TypeError(f"{name} is {shown(value)}")
  return math.nan if value is None else value


def plot_pareto(rows: Sequence[Row], path: Path) -> None:
  """Plots perplexity, or a task's loss, against megabytes in memory, with a line through the
  Pareto-optimal points."""
  figure_of = _loss_of(rows)
  points = [(row.measures.memory / 1e6, row.measures.figures[figure_of]) for row in rows]
  from matplotlib.figure import Figure  # the import takes half a second

  figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
  axes = figure.subplots()
  axes.scatter(*zip(*points, strict=True), color="#2563a8", zorder=3)
  for row, point in zip(rows, points, strict=True):
    axes.annotate(row.step, point, xytext=(5, 5), textcoords="offset points", fontsize=8)
  best = [
    point
    for point in points
    if not any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)
  ]
  axes.plot(*zip(*sorted(best), strict=True), color="#d9541e", linewidth=1.5)
  axes.set(xlabel="MB in memory", ylabel=figure_of, yscale="log")
  axes.grid(alpha=0.3)
  with outputs.whole_file(path) as partial:
    figure.savefig(partial)
