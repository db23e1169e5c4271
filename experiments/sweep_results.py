"""The results of a sweep: a folder for each member, as for a separate run; one table; one plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import processes
from experiments.sweep_config import Fields, label
from lora_jax import tables
from lora_jax.run import metrics, plot, workdir
from lora_jax.tasks import Task


def lines_of(
  logged: Sequence[Mapping[str, float]], config: ConfigDict, member: int, of: int
) -> list[dict[str, float]]:
  """One member's lines of the log, as in a separate run; the speed is its part of the total."""
  end, train = f"/{member}", config.train
  return [
    {
      name.removesuffix(end): x / of if name == "tokens_per_second" else x
      for name, x in line.items()
      if name.endswith(end) or name in ("step", "tokens_per_second")
    }
    for line in logged
    if f"loss{end}" in line
    and (
      line["step"] % train.log_every == 0
      or line["step"] == train.steps
      or f"validation/loss{end}" in line
    )
  ]


def write_member(
  folder: workdir.Workdir,
  config: ConfigDict,
  results: Mapping[str, Any],
  lines: Sequence[Mapping[str, float]],
) -> None:
  """Writes the files of a run in addition to its adapter."""
  workdir.write_json(folder.config, config.to_dict())
  workdir.write_json(folder.evaluation, results)
  with metrics.MetricsWriter(folder.metrics, folder.tensorboard, step=0) as writer:
    for line in lines:
      writer.write(line["step"], {name: x for name, x in line.items() if name != "step"})


def command_of(fields: Fields) -> str:
  """The command that trains a member alone."""
  own = [f"--config.{name}={value}" for name, value in fields.items()]
  # A tuple that is given twice is both together, so what was given of the sweep has to go.
  of_all = ("config.sweep.grid", "config.sweep.members")
  none = [f"--{name}=()" for name in of_all]
  return processes.command(without=("workdir", *of_all), more=[*none, *own, "--workdir=..."])


def format_rows(rows: Sequence[Mapping[str, Any]], render: Callable) -> str:
  """The table of all members, by `render(header, rows)`."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
  return render([name.rpartition(".")[2] for name in names], cells)


def write_results(
  run: workdir.Workdir,
  fields: Sequence[Fields],
  common: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  task: Task,
) -> None:
  """Writes the table, for people and for programs, and draws the members' losses."""
  page = [
    f"# {run.path.name}: {len(rows)} adapters, trained in one program",
    f"On {common['split']}, before: {task.line(common['before'])}. After:",
    format_rows(rows, tables.markdown),
  ]
  finished = [row for row in rows if row["outcome"] == "finished"]
  if finished:
    best = min(finished, key=lambda row: row["loss"])
    n = best["member"]
    page.append(f"The lowest loss is that of `members/{n}` ({label(fields[n])}).")
  page.append(f"![the losses over the steps]({run.plot.name})")
  workdir.write_text(run.path / "results.md", "\n\n".join(page) + "\n")
  workdir.write_json(run.path / "results.json", {"before": common["before"], "members": list(rows)})
  labels = [f"{n}: {label(each)}" for n, each in enumerate(fields)]
  plot.plot_members(metrics.read_metrics(run.metrics), labels, run.plot, task.UNIT)


def _cell(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
