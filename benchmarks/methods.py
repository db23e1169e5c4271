r"""Quality and cost of the adapter methods: a sweep of methods and seeds on one task.

    python -m benchmarks.methods --results=runs/methods.jsonl --output=benchmarks/results.md
    python -m benchmarks.methods --results=runs/methods.jsonl --methods=lora,dora --seeds=0
    python -m benchmarks.methods --results=runs/rates.jsonl --tune=0.25,0.5,1,2,4 --seeds=0

Each run is one of configs/methods.py. The model is loaded once. Every run appends one line to the
results, so an interrupted sweep continues where it stopped; lines of other configs are ignored. The
table has all lines of the requested methods and seeds.

With --tune the runs use multiples of each method's learning rate and are evaluated on the
validation split. The best rate of each belongs in configs/adapters.py, before the test set is used.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from absl import app, flags
from ml_collections import ConfigDict
from tqdm import tqdm

import lora_jax
from benchmarks.circumstances import describe_circumstances
from benchmarks.reporting import define_output, publish
from configs import adapters as presets
from configs import methods as config_file
from experiments import methods, parts
from lora_jax import exchange, families
from lora_jax.data.examples import Example
from lora_jax.run import workdir
from lora_jax.tasks import Task
from lora_jax.train import evaluation, step

PyTree = Any
BASE = "base"

# SmolLM2 has no biases.
_METHODS = flags.DEFINE_list(
  "methods", [name for name in presets.METHODS if name != "bias"], "Of configs/adapters.py."
)
_SEEDS = flags.DEFINE_list(
  "seeds", ["0", "1", "2"], "Whole numbers; one run of each method per seed."
)
_TUNE = flags.DEFINE_list(
  "tune", [], "Multiples of the methods' learning rates, to choose from by the validation split."
)
_RESULTS = flags.DEFINE_string("results", None, "A JSONL file to which each run appends a line.")
_OUTPUT = define_output()
_SMOKE = flags.DEFINE_bool("smoke", False, "A few steps on little data, to check that it runs.")

flags.register_validator(
  "methods",
  lambda names: names and set(names) <= presets.METHODS.keys(),
  f"--methods takes some of {', '.join(presets.METHODS)}",
)
flags.register_validator(
  "seeds", lambda seeds: all(seed.isdecimal() for seed in seeds), "--seeds takes whole numbers"
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  smoke = ",smoke" if _SMOKE.value else ""
  # Seed by seed, so that an interrupted sweep has rows for all methods as early as possible.
  named = [
    (name, f"method={name},seed={s}{smoke}") for s in _SEEDS.value for name in _METHODS.value
  ]
  if _TUNE.value:
    runs = [
      (name, config_file.get_config(f"{text},split=validation,peak={float(factor) * peak}"))
      for name, text in named
      for peak in [presets.METHODS[name].peak]
      for factor in _TUNE.value
    ]
  else:
    base = (BASE, config_file.get_config(f"seed={_SEEDS.value[0]}{smoke}"))
    runs = [base, *((name, config_file.get_config(text)) for name, text in named)]
  lines = sweep(runs, Path(_RESULTS.value))
  table = format_rates(lines) if _TUNE.value else format_table(lines)
  report = f"## The adapter methods on one task\n\n{describe_run()}\n\n{table}"
  publish(report, _OUTPUT.value)


class Shared(NamedTuple):
  """The model and the data, which all runs share."""

  task: Task
  model: nn.Module
  params: PyTree
  axes: Mapping[str, lora_jax.Axes]
  examples: list[Example]
  held_out: list[Example]


def load(config: ConfigDict) -> Shared:
  """The model and the data for a config."""
  task = parts.make_task(config)
  records = parts.load_records(config.data, task)
  pretrained = parts.load_model(config.model)
  model = pretrained.family.make_model(pretrained.config)
  task = task.of_model(pretrained)
  train, held_out = (
    task.examples(parts.pick(records, split, field))
    for split, field in (("train", "data.train"), (config.evaluation.split, "evaluation.split"))
  )
  return Shared(
    task=task,
    model=model,
    params=pretrained.params,
    axes=parts.trace_axes(model, pretrained.params),
    examples=train,
    held_out=held_out[: config.evaluation.examples or None],
  )


def sweep(runs: Sequence[tuple[str, ConfigDict]], results: Path) -> list[dict[str, Any]]:
  """Makes the runs whose lines are not in the results yet; returns the lines of all.

  Args:
    runs: the method's name, or `BASE`, and the config of each; all share one model.
    results: the file of lines; created with its folder if it does not exist.
  """
  results.parent.mkdir(parents=True, exist_ok=True)
  known = (
    [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
  )
  shared, lines = None, []
  for name, config in tqdm(runs, desc="runs"):
    key = {"method": name, "seed": config.seed, "peak": config.optimizer.peak_learning_rate}
    key["config"] = workdir.fingerprint(config.to_dict())
    line = next((old for old in known if key.items() <= old.items()), None)
    if line is None:
      shared = shared or load(config)
      line = key | (measure_base(config, shared) if name == BASE else measure(config, shared))
      with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    lines.append(line)
  return lines


def measure_base(config: ConfigDict, shared: Shared) -> dict[str, Any]:
  """The accuracy and the loss of the base."""
  scores = _evaluate(config, shared, shared.params)
  return {"accuracy": scores["accuracy"], "loss": scores["loss"]}


def measure(config: ConfigDict, shared: Shared) -> dict[str, Any]:
  """One run: its quality and cost, or the step at which it diverged."""
  started = time.perf_counter()
  tx, _ = methods.make_optimizer(config)
  specs = lora_jax.match(shared.params, methods.rules_of(config.adapter), shared.axes)
  dataset = shared.task.train_batches(shared.examples, config.train.batch_size, seed=config.seed)
  base, adapters = methods.start(
    config.adapter,
    jax.random.key(config.seed),
    shared.params,
    specs,
    shared.axes,
    shared.task.run(shared.model.apply),
    shared.task.mask,
    dataset,
  )
  weights = lora_jax.attach(base, adapters)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  state = step.init_state(trainable, tx)
  train_step = methods.make_train_step(
    config, shared.task, lora_jax.adapt(shared.model.apply), tx, adapters
  )
  # All batches have one shape, so the step is compiled once, here, and reports its memory.
  train_step = train_step.lower(state, frozen, dataset[0]).compile()
  memory = train_step.memory_analysis()
  seconds = []
  for number in range(config.train.steps):
    batch = dataset[number]
    begin = time.perf_counter()
    state, metrics = train_step(state, frozen, batch)
    if not metrics["finite"]:
      return {"diverged": number + 1}
    seconds.append(time.perf_counter() - begin)
  weights = lora_jax.join(state.trainable, frozen)
  scores = _evaluate(config, shared, weights)
  result = {
    "accuracy": scores["accuracy"],
    "loss": scores["loss"],
    "trainable": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
    "step_seconds": statistics.median(seconds),
    "peak_bytes": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
    "adapter_bytes": _bytes_on_disk(lora_jax.detach(weights, adapters), base, shared),
    "seconds": time.perf_counter() - started,
  }
  jax.clear_caches()
  return result


def _evaluate(config: ConfigDict, shared: Shared, weights: PyTree) -> dict[str, float]:
  eval_step = shared.task.make_eval_step(lora_jax.adapt(shared.model.apply))
  data = shared.task.eval_batches(shared.held_out, config.evaluation.batch_size)
  return evaluation.evaluate(eval_step, weights, data)


def _bytes_on_disk(adapters: Mapping[str, lora_jax.Adapted], base: PyTree, shared: Shared) -> int:
  """The size of the adapter's tensor file in PEFT's layout."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter"
    table = families.tensor_names(shared.model.config)
    exchange.save(path, adapters, base, shared.axes, base_model="", table=table)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def format_table(lines: Sequence[Mapping[str, Any]]) -> str:
  """The table in Markdown: a row for each method, over its seeds."""
  table = [
    "| method | accuracy, % | loss | learning rate | trains | step, ms | peak memory, MB "
    "| adapter on disk, MB |",
    "| --- " + "| ---: " * 7 + "|",
  ]
  for name in dict.fromkeys(line["method"] for line in lines):
    runs = [line for line in lines if line["method"] == name and "diverged" not in line]
    diverged = [line for line in lines if line["method"] == name and "diverged" in line]
    if diverged:
      where = ", ".join(f"seed {x['seed']} at step {x['diverged']}" for x in diverged)
      table.append(f"| {name}, diverged: {where} {'| – ' * 7}|")
    if not runs:
      continue

    def over(field: str, scale: float, digits: int, runs=runs) -> str:
      return _mean_and_deviation([scale * run[field] for run in runs], digits)

    def median(field: str, scale: float, runs=runs) -> str:
      return f"{scale * statistics.median(run[field] for run in runs):,.1f}"

    cells = [name, over("accuracy", 100, 1), over("loss", 1, 3)]
    if name == BASE:
      cells += ["–"] * 5
    else:
      cells += [
        f"{runs[0]['peak']:g}",
        f"{runs[0]['trainable']:,}",
        median("step_seconds", 1e3),
        median("peak_bytes", 1e-6),
        median("adapter_bytes", 1e-6),
      ]
    table.append(f"| {' | '.join(cells)} |")
  return "\n".join(table)


def format_rates(lines: Sequence[Mapping[str, Any]]) -> str:
  """The table of learning rates: the mean loss and the accuracy of each method at each rate."""
  table = ["| method | learning rate: loss (accuracy, %) |", "| --- | --- |"]
  for name in dict.fromkeys(line["method"] for line in lines):
    cells = []
    for peak in sorted({line["peak"] for line in lines if line["method"] == name}):
      runs = [line for line in lines if (line["method"], line["peak"]) == (name, peak)]
      if any("diverged" in run for run in runs):
        cells.append(f"{peak:g}: diverged")
        continue
      loss, accuracy = (statistics.mean(run[x] for run in runs) for x in ("loss", "accuracy"))
      cells.append(f"{peak:g}: {loss:.3f} ({100 * accuracy:.1f})")
    table.append(f"| {name} | {', '.join(cells)} |")
  return "\n".join(table)


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
  mean = f"{statistics.mean(values):.{digits}f}"
  return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def describe_run() -> str:
  """Device, versions, date and command, and an explanation of the columns."""
  return "\n".join(
    [
      *describe_circumstances("benchmarks.methods", ("jax", "flax", "optax")),
      f"- Accuracy and loss on held-out sentences: mean ± standard deviation over the seeds "
      f"{', '.join(_SEEDS.value)}. Step: the median. Peak memory: that of the compiled step, with "
      "its arguments and results.",
    ]
  )


if __name__ == "__main__":
  flags.mark_flag_as_required("results")
  app.run(main)
