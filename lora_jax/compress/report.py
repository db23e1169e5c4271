"""The costs and gains of a compression: sizes, FLOPs, times and quality, step by step.

    rows = [report.Row("dense", measures), report.Row("factorize", others), ...]
    report.write("runs/small", rows, about="python -m experiments.compress ...")

writes report.json, report.md with the table, and pareto.png: perplexity against the size in memory.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from lora_jax import cost, families
from lora_jax.checks import shown
from lora_jax.io import json_files, outputs
from lora_jax.weights import Adapted, Factored, Pruned, is_weight

PyTree = Any

_REPORT = "report.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
  """Measurements of a model after a step.

  Attributes:
    parameters: the number of stored values; in pruned leaves, of those that are not zero.
    memory: bytes of the arrays that it needs on the device.
    disk: bytes of the tensors' file.
    flops: floating-point operations of the products per token of a prompt.
    prefill: milliseconds for a prompt, by batch size.
    token: milliseconds for one further token of every row, with a cache, by batch size.
    perplexity: on the held-out windows.
    accuracy: on the task, 0 to 1, or None if no task is configured.
  """

  parameters: int
  memory: int
  disk: int
  flops: int
  prefill: dict[int, float]
  token: dict[int, float]
  perplexity: float
  accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Row:
  """A step, described for the table ("dense" at the start), and the measurements after it."""

  step: str
  measures: Measures

  def __str__(self) -> str:
    m = self.measures
    size = f"{m.parameters / 1e6:,.1f} M parameters, {m.memory / 1e6:,.1f} MB"
    return f"{self.step}: {size}, perplexity {m.perplexity:,.2f}"


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


def flops_per_token(apply: Callable, params: PyTree, length: int) -> int:
  """The floating-point operations of the products per token of a text of this length."""
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  shapes = jax.eval_shape(lambda: params)
  return cost.flops(jax.make_jaxpr(apply)({"params": shapes}, tokens)) // length


def latency(
  apply: Callable,
  params: PyTree,
  config: families.Config,
  *,
  rows: int,
  length: int,
  repeats: int,
) -> tuple[float, float]:
  """Returns milliseconds for `rows` prompts of `length` tokens, and for one more token of each.

  Medians of `repeats` calls, after one that compiles.
  """
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
  return (
    _median(lambda: prefill(params, tokens, cache), repeats),
    _median(lambda: step(params, tokens[:, :1], positions, filled), repeats),
  )


def _median(run: Callable, repeats: int) -> float:
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(1000 * (time.perf_counter() - start))
  return float(np.median(times))


# ---- writing


def table(rows: Sequence[Row]) -> str:
  """The rows in Markdown; sizes also as a fraction of the first row's."""
  first = rows[0].measures
  batches = sorted(first.prefill)
  header = [
    "step", "parameters", "memory", "disk", "GFLOP a token",
    *(f"prefill × {n}" for n in batches), *(f"token × {n}" for n in batches),
    "perplexity", "accuracy",
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
        *(f"{m.prefill[n]:,.1f} ms" for n in batches),
        *(f"{m.token[n]:,.1f} ms" for n in batches),
        f"{m.perplexity:,.2f}",
        "-" if m.accuracy is None else f"{m.accuracy:.1%}",
      ]
    )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    if len({(*row.measures.prefill, None, *row.measures.token) for row in rows}) > 1:
      raise ValueError("not every step was measured at the same batch sizes")
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path}: is not the report of a compression ({error!r:.200}); restore it, or compress again "
      "into another workdir"
    ) from None
  return about, rows


def _row(fields: dict[str, Any]) -> Row:
  def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
      raise TypeError(f"{name} is {shown(value)}")
    return math.nan if value is None else value

  step = fields.pop("step")
  if not isinstance(step, str):
    raise TypeError(f"step is {shown(step)}")
  for name in ("prefill", "token"):
    times = dict(fields[name])
    fields[name] = {int(rows): number(name, x) for rows, x in times.items()}
    if not times:
      raise TypeError(f"{name} is {shown(times)}")
  accuracy = fields.pop("accuracy")
  numbers: dict[str, Any] = {
    name: value if name in ("prefill", "token") else number(name, value)
    for name, value in fields.items()
  }
  for name in ("parameters", "memory", "disk", "flops"):
    if not numbers.get(name, 0) > 0:
      raise ValueError(f"{name} is {shown(numbers.get(name))}")
  return Row(step, Measures(**numbers, accuracy=accuracy and number("accuracy", accuracy)))


def plot_pareto(rows: Sequence[Row], path: Path) -> None:
  """Plots perplexity against megabytes in memory, with a line through the Pareto-optimal points."""
  points = [(row.measures.memory / 1e6, row.measures.perplexity) for row in rows]
  figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
  axes = figure.subplots()
  axes.scatter(*zip(*points, strict=True), color="#2563a8", zorder=3)
  for row, point in zip(rows, points, strict=True):
    axes.annotate(row.step, point, xytext=(5, 5), textcoords="offset points", fontsize=8)
  best = [
    point for point in points
    if not any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)
  ]  # fmt: skip
  axes.plot(*zip(*sorted(best), strict=True), color="#d9541e", linewidth=1.5)
  axes.set(xlabel="MB in memory", ylabel="perplexity", yscale="log")
  axes.grid(alpha=0.3)
  with outputs.whole_file(path) as partial:
    figure.savefig(partial)
