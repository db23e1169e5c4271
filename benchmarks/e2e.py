r"""BLEU on E2E of LoRA and of full fine-tuning: a table of finished runs.

    for seed in 0 1 2; do
      for how in "" full; do
        run=runs/e2e_${how:-lora}_$seed
        python -m experiments.train --config=configs/e2e.py:$how --config.seed=$seed --workdir=$run
        python -m experiments.evaluate --workdir=$run --nobase --max_tokens=80 --beams=1 --beams=4
      done
    done
    python -m benchmarks.e2e --output=benchmarks/results.md runs/e2e_*

Runs that differ in nothing but their seed share a row.
"""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import app

from benchmarks.circumstances import describe_circumstances
from benchmarks.reporting import define_output, publish
from lora_jax.run import metrics, workdir

_OUTPUT = define_output()


class Run(NamedTuple):
  """A run's folder: its config, its `eval_test.json`, and its costs."""

  config: dict[str, Any]
  result: dict[str, Any]
  tokens_per_second: float
  megabytes: float


def main(argv: Sequence[str]) -> None:
  if len(argv) < 2:
    raise app.UsageError("name the workdirs of one evaluated run or more")
  report = describe([read_run(pathlib.Path(path)) for path in argv[1:]])
  publish(report, _OUTPUT.value)


def read_run(path: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    FileNotFoundError: if it is not a run, or was not evaluated.
    ValueError: if it was evaluated without BLEU.
  """
  config = workdir.read_config(path)
  file = path / "eval_test.json"
  if not file.exists():
    raise FileNotFoundError(f"{file}: not there; run experiments.evaluate with --beams first")
  result = json.loads(file.read_text())
  if not scores_of(result):
    raise ValueError(f"{file}: has no BLEU; run experiments.evaluate again, with --beams")
  run = workdir.Workdir(path)
  lines = metrics.read_metrics(run.metrics)
  return Run(
    config,
    result,
    statistics.median(line["tokens_per_second"] for line in lines),
    sum(file.stat().st_size for file in run.adapter.glob("*.safetensors")) / 1e6,
  )


def describe(runs: Sequence[Run]) -> str:
  """The table in Markdown, and the conditions of the measurement.

  Raises:
    ValueError: if the runs were decoded in different ways.
  """
  decodings = {json.dumps(decoding_of(run.result)) for run in runs}
  if len(decodings) > 1:
    raise ValueError(f"the runs were decoded in several ways: {'; '.join(sorted(decodings))}")
  decoding = decoding_of(runs[0].result)
  beams = decoding.pop("signatures")
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(json.dumps(_without_seed(run.config), sort_keys=True), []).append(run)

  header = ["fine-tuning", "steps × batch", "seeds", "loss"]
  header += [f"BLEU, {name}" for name in beams] + ["tokens/s", "weights on disk, MB"]
  table = [header, ["---", *["---:"] * (len(header) - 1)]]
  for group in groups.values():
    config = group[0].config
    cells = [
      _name(config["adapter"]),
      f"{config['train']['steps']} × {config['train']['batch_size']}",
      ", ".join(str(run.config["seed"]) for run in group),
      _spread([run.result["adapter"]["loss"] for run in group], digits=3),
    ]
    cells += [_spread([scores_of(run.result)[x]["bleu"] for run in group], 1) for x in beams]
    cells += [f"{statistics.median(run.tokens_per_second for run in group):,.0f}"]
    table.append([*cells, f"{group[0].megabytes:,.1f}"])
  return "\n".join(
    [
      "## E2E NLG, development set",
      "",
      *describe_circumstances("benchmarks.e2e", ("jax", "flax", "optax", "sacrebleu")),
      f"- {', '.join(f'{name} {value}' for name, value in decoding.items())}; "
      f"{', '.join(sorted(set(beams.values())))}. Mean ± standard deviation over the seeds. Loss: "
      "nats per token of the references. Tokens/s: the median of training, including padding.",
      "",
      *(f"| {' | '.join(row)} |" for row in table),
    ]
  )


def scores_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The BLEU for each number of beams."""
  return {name: x for name, x in result["adapter"].items() if name.startswith("beams ")}


def decoding_of(result: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that must be equal for BLEUs to be comparable."""
  scores = scores_of(result)
  return {
    "texts": max(score["texts"] for score in scores.values()),
    "max_tokens": result["max_tokens"],
    "length_penalty": result["length_penalty"],
    "signatures": {name: score["signature"] for name, score in scores.items()},
  }


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in config.items() if name != "seed"}


def _name(adapter: Mapping[str, Any]) -> str:
  rank = f", rank {adapter['rank']}" if "rank" in adapter else ""
  return f"{adapter['method']}{rank}"


def _spread(values: Sequence[float], digits: int) -> str:
  mean = f"{statistics.mean(values):.{digits}f}"
  return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
  app.run(main)
