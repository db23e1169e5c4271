"""A run's page, README.md, which tells what was done and what came of it, and its loss.png.

    write_report(workdir, targets=str(lora_jax.summary(...)), command="python -m experiments...")

The page is made of what the folder holds: config.json, metrics.jsonl and eval.json. So it can be
written at any time, at the beginning of a run, where it stops and at its end, and is then true.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from lora_jax.train.metrics import read_metrics
from lora_jax.train.plot import plot_loss
from lora_jax.train.workdir import Workdir, read_config, write_text, writing

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def write_report(workdir: Workdir, *, targets: str, command: str) -> None:
  """Writes the page of a run as it stands and, once a step is logged, draws its losses.

  Args:
    workdir: config.json must be there, with its `train.steps`; of metrics.jsonl and eval.json
      what there is. eval.json has `split`, metrics `before` and, at the end, `after`, and
      `samples`, with the texts `prompt`, `wanted`, `before` and `after` each.
    targets: the table of what trains.
    command: what goes on with the run, or repeats it.

  Raises:
    OSError: when they cannot be written.
  """
  config = read_config(workdir.path)
  logged = read_metrics(workdir.metrics) if workdir.metrics.exists() else []
  results = json.loads(workdir.evaluation.read_text()) if workdir.evaluation.exists() else {}
  if logged:
    with writing(workdir.plot):
      plot_loss(logged, workdir.plot)
  sections = [
    f"# {workdir.path.name}",
    _status(config["train"]["steps"], logged, finished="after" in results),
    _fenced(command, "bash"),
    _results(results),
    _curve(logged, workdir),
    _samples(results.get("samples", ())),
    f"## What trains\n\n{_fenced(targets)}",
    f"## Config\n\n{_fenced(json.dumps(config, indent=2), 'json')}",
    _circumstances(),
  ]
  write_text(workdir.readme, "\n\n".join(filter(None, sections)) + "\n")


def _status(steps: int, logged: Sequence[Mapping[str, float]], finished: bool) -> str:
  last = logged[-1]["step"] if logged else 0
  if finished:
    return (
      f"Finished: {steps:,} steps. `adapter/` is what was trained, as `peft` loads it. In another "
      "workdir this gives the same again:"
    )
  return (
    f"Not finished: {last:,} of {steps:,} steps were logged when this was written. This goes on "
    "from the last checkpoint:"
  )


def _results(results: Mapping[str, Any]) -> str:
  if "before" not in results:
    return ""
  whens = [when for when in ("before", "after") if when in results]
  rows = [
    [name, *(_number(results[when].get(name, math.nan)) for when in whens)]
    for name in results["before"]
  ]
  return f"## Results on {results['split']}\n\n{_table(['', *whens], rows)}"


def _curve(logged: Sequence[Mapping[str, float]], workdir: Workdir) -> str:
  if not logged:
    return ""
  losses = [line["loss"] for line in logged]
  lowest = min(logged, key=lambda line: line["loss"])
  speed = statistics.median(line["tokens_per_second"] for line in logged)
  return (
    f"## Losses\n\n![the losses over the steps]({workdir.plot.name})\n\n"
    f"In training from {losses[0]:.3f} (step {logged[0]['step']:,}) to {losses[-1]:.3f} (step "
    f"{logged[-1]['step']:,}), the lowest {lowest['loss']:.3f} (step {lowest['step']:,}); "
    f"{speed:,.0f} tokens/s, padding included. Every logged step is in `metrics.jsonl`, and for "
    f"`tensorboard --logdir={workdir.path.name}` in `tensorboard/`."
  )


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
  if not samples:
    return ""
  shown = []
  for number, sample in enumerate(samples, start=1):
    answers = [f"{name + ':':8} {text}" for name, text in sample.items() if name != "prompt"]
    shown.append(f"{number}.\n\n" + _fenced("\n".join([sample["prompt"], "", *answers]), "text"))
  return "## Samples\n\nHeld out, and what the model writes after each.\n\n" + "\n\n".join(shown)


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
  """A block of code, whatever stands in it."""
  fence = "```"
  while fence in text:
    fence += "`"
  return f"{fence}{language}\n{text}\n{fence}"
