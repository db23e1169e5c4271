"""A run's README.md, with its settings and results, and its loss.png.

    write_report(workdir, targets=str(lora_jax.summary(...)), command="python -m experiments...")

The page is generated from config.json, metrics.jsonl and eval.json in the folder. So it can be
written at any time, at the start of a run, at an interruption and at the end, and is true then.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from lora_jax.checks import shown
from lora_jax.io import files, json_files
from lora_jax.run import word_marks
from lora_jax.run.metrics import read_metrics
from lora_jax.run.plot import plot_loss
from lora_jax.run.workdir import Workdir, read_config, write_text, writing

Lines = Callable[[Mapping[str, Any]], list[str]]

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def write_report(
  workdir: Workdir,
  *,
  targets: str,
  command: str,
  lines: Lines,
  unit: str = "token",
  how: Sequence[str] = (),
) -> None:
  """Writes the page of a run in its current state and, once a step is logged, plots its losses.

  Args:
    workdir: the run's folder. It must have config.json, with `train.steps`; metrics.jsonl and
      eval.json are used if present. eval.json has `split`, the metrics `before` and, at the end,
      `after`; `samples`, with the texts `prompt`, `wanted`, `before` and `after` each; and `data`,
      for `lines`.
    targets: the table of what trains.
    command: the command that continues the run, or repeats it.
    lines: maps the `data` of eval.json to lines of text; raises ValueError if it is damaged.
    unit: the unit of the counts and losses, in the singular.
    how: lines on how the run is computed.

  Raises:
    ValueError: if a file of the folder is damaged.
    OSError: if they cannot be written.
  """
  config = read_config(workdir.path)
  logged = read_metrics(workdir.metrics) if workdir.metrics.exists() else []
  for line in logged:
    if not {"loss", "tokens_per_second"} <= line.keys():
      raise ValueError(
        f"{workdir.metrics}: the line of step {line['step']} has no loss or no tokens_per_second; "
        "delete it"
      )
  results = read_results(workdir.evaluation) if workdir.evaluation.exists() else {}
  if logged:
    with writing(workdir.plot):
      plot_loss(logged, workdir.plot, unit)
  sections = [
    f"# {workdir.path.name}",
    _status(config["train"]["steps"], logged, finished="after" in results),
    _fenced(command, "bash"),
    _data(results, lines, workdir.evaluation),
    _results(results),
    _curve(logged, workdir, unit),
    _samples(results.get("samples", ()), workdir),
    f"## What trains\n\n{_fenced(targets)}",
    "## How it is computed\n\n" + "\n".join(f"- {line}" for line in how) if how else "",
    f"## Config\n\n{_fenced(json.dumps(config, indent=2), 'json')}",
    _circumstances(),
  ]
  write_text(workdir.readme, "\n\n".join(filter(None, sections)) + "\n")


def read_results(path: pathlib.Path) -> dict[str, Any]:
  """Returns a run's eval.json in the form of `write_report`; null, for values not finite, is NaN.

  Raises:
    FileNotFoundError: if there is none.
    PermissionError: if it cannot be read.
    ValueError: if it is damaged.
  """
  content = files.read_bytes(path, json_files.MAX_BYTES)
  try:
    found = json_files.parse(content)
    _typed("split", found.get("split"), str)
    found["before"] = _metrics("before", found.get("before"))
    if "after" in found:
      found["after"] = _metrics("after", found["after"])
    if "data" in found:
      _typed("data", found["data"], dict)
    for sample in _typed("samples", found.get("samples"), list):
      for name, text in _typed("a sample", sample, dict).items():
        _typed(f"a sample's {name[:80]}", text, str)
      if not {"prompt", "wanted"} <= sample.keys():
        raise ValueError("a sample has no prompt or no wanted text")
  except ValueError as error:
    raise damaged(path, error) from None
  return found


def damaged(path: pathlib.Path, error: ValueError) -> ValueError:
  """The error for an eval.json with unexpected contents."""
  return ValueError(
    f"{path}: does not hold a run's evaluation ({error}); delete it, and the same command "
    "measures again"
  )


def _metrics(when: str, value: Any) -> dict[str, float]:
  metrics = _typed(when, value, dict)
  for name, number in metrics.items():
    if number is not None:
      _typed(f"{when} {name[:80]}", number, int | float)
  if not {"loss", "rows"} <= metrics.keys():
    raise ValueError(f"{when} has no loss or no rows")
  return {name: math.nan if x is None else x for name, x in metrics.items()}


def _typed(name: str, value: Any, kind: Any) -> Any:
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f"{name} is {shown(value)}")
  return value


def _status(steps: int, logged: Sequence[Mapping[str, float]], finished: bool) -> str:
  last = logged[-1]["step"] if logged else 0
  if finished:
    return (
      f"Finished: {steps:,} steps. `adapter/` is the trained adapter, as `peft` loads it. In "
      "another workdir, this command repeats the run:"
    )
  return (
    f"Not finished: {last:,} of {steps:,} steps were logged when this was written. This command "
    "continues from the last checkpoint:"
  )


def _data(results: Mapping[str, Any], lines: Lines, path: pathlib.Path) -> str:
  if "data" not in results:
    return ""
  try:
    found = lines(results["data"])
  except ValueError as error:
    raise damaged(path, error) from None
  return "## Data\n\n" + "\n".join(f"- {line}" for line in found)


def _results(results: Mapping[str, Any]) -> str:
  if "before" not in results:
    return ""
  whens = [when for when in ("before", "after") if when in results]
  rows = [
    [name, *(_number(results[when].get(name, math.nan)) for when in whens)]
    for name in results["before"]
  ]
  return f"## Results on {results['split']}\n\n{_table(['', *whens], rows)}"


def _curve(logged: Sequence[Mapping[str, float]], workdir: Workdir, unit: str) -> str:
  if not logged:
    return ""
  losses = [line["loss"] for line in logged]
  lowest = min(logged, key=lambda line: line["loss"])
  speed = statistics.median(line["tokens_per_second"] for line in logged)
  return (
    f"## Losses\n\n![the losses over the steps]({workdir.plot.name})\n\n"
    f"In training from {losses[0]:.3f} (step {logged[0]['step']:,}) to {losses[-1]:.3f} (step "
    f"{logged[-1]['step']:,}), the lowest {lowest['loss']:.3f} (step {lowest['step']:,}); "
    f"{speed:,.0f} {unit}s/s, padding included. Every logged step is in `metrics.jsonl`, and for "
    f"`tensorboard --logdir={workdir.path.name}` in `tensorboard/`."
  )


def _samples(samples: Sequence[Mapping[str, str]], workdir: Workdir) -> str:
  if not samples:
    return ""
  if workdir.picture.exists():
    names = ", ".join(f"`{sample['prompt']}`" for sample in samples)
    return (
      "## Samples\n\nHeld out, with the wanted answer and those of the model.\n\n"
      f"![the samples]({workdir.picture.name})\n\nFrom the upper left, row by row: {names}."
    )
  if all(sample.get("marks") == "words" for sample in samples):
    return _transcripts(samples)
  shown = []
  for number, sample in enumerate(samples, start=1):
    answers = [f"{name + ':':8} {text}" for name, text in sample.items() if name != "prompt"]
    shown.append(f"{number}.\n\n" + _fenced("\n".join([sample["prompt"], "", *answers]), "text"))
  return "## Samples\n\nHeld out, with the texts that the model writes.\n\n" + "\n\n".join(shown)


def _transcripts(samples: Sequence[Mapping[str, str]]) -> str:
  """A table of clips, with the words that differ from the reference marked."""
  whens = [when for when in ("before", "after") if when in samples[0]]
  rows = [
    [word_marks.plain(sample["prompt"]), word_marks.plain(sample["wanted"])]
    + [word_marks.marked(sample["wanted"], sample[when]) for when in whens]
    for sample in samples
  ]
  lines = [["clip", "reference", *whens], ["---"] * (2 + len(whens)), *rows]
  table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
  return (
    "## Samples\n\nHeld out, with what the model writes: wrong words are bold, and missing ones "
    f"struck through.\n\n{table}"
  )


def _circumstances() -> str:
  device = jax.devices()[0].device_kind
  versions = ", ".join(f"{package} {metadata.version(package)}" for package in _PACKAGES)
  return f"Last run with {versions}; devices: {jax.device_count()} × {device}."


def _number(value: float) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fenced(text: str, language: str = "text") -> str:
  """A code block, for any text."""
  fence = "```"
  while fence in text:
    fence += "`"
  return f"{fence}{language}\n{text}\n{fence}"
