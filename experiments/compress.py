r"""Compresses a model step by step, and reports the cost and gain of each step.

    python -m experiments.compress --config=configs/compress.py --workdir=runs/small
    python -m experiments.compress --config=configs/compress.py:steps=factorize+quantize \
        --workdir=runs/smaller --config.factorize.budget=0.7

The workdir then holds model/, which train, evaluate and generate take as a model's folder, the
report (report.md, report.json, pareto.png), config.json, and, of a decoder, rest.jsonl, the text
that was used neither for calibration nor to measure by. An encoder or a model of images is
calibrated and measured by the batches of its task. To heal the model, and to add that to the
report:

    python -m experiments.train --config=configs/heal.py:compressed=runs/small --workdir=runs/healed
    python -m experiments.compress --config=configs/compress.py --workdir=runs/small \
        --healed=runs/healed

config.model.source may be such a folder again. With config.adapter a run's adapter is merged before
the first step. With config.keep_adapter it stays as it is, the base is compressed under it, and
adapter/ is written alongside model/, in PEFT's layout:

    python -m experiments.import_adapter --adapter=runs/small/adapter --workdir=runs/adapted \
        --config=configs/quickstart.py --config.model.source=runs/small/model \
        --config.model.scan_layers=False

Impossible or pointless settings are refused before anything is computed or written.
"""

import dataclasses
import itertools
import pathlib
import shlex
import sys
from importlib import metadata
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import lora_jax
from experiments import (
  compression,
  compression_checks,
  compression_data,
  config_checks,
  inputs,
  methods,
  parts,
  programs,
)
from experiments.compression import Model
from lora_jax import exchange, families, tree
from lora_jax.compress import merging, report, storage
from lora_jax.io.pretrained import Pretrained
from lora_jax.run import workdir
from lora_jax.weights import is_weight, unmasked

PyTree = Any

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The config of the compression.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder to write.")
_HEALED = flags.DEFINE_string("healed", None, "A finished run on model/, to add to the report.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  with workdir.open_workdir(_WORKDIR.value, config.to_dict()) as run:
    workdir.settle_inputs(run, inputs.of_compression(config))
    if _HEALED.value:
      add_healed(config, run.path, _HEALED.value)
    else:
      compress(config, run.path)


def compress(config: ConfigDict, folder: pathlib.Path):
  """Runs the steps of a config, measures before, between and after, and writes everything."""
  source = config.model.source
  done = storage.steps_of(source) if storage.is_compressed(source) else ()
  compression_checks.check_config(config, done)
  shapes = extended(config, parts.read_shapes(config.model))
  compression_checks.check_family(config.steps, shapes)
  if (folder / "model").exists():
    raise FileExistsError(f"{folder / 'model'}: is there already; use another workdir")
  data = compression_data.of(config, shapes)
  pretrained = extended(config, parts.load_model(config.model))
  model = Model(pretrained.config, pretrained.params, adapters={})
  if config.adapter:
    model = with_adapter(config, model)
  compression_checks.check_model(config, model, data.calibration.tokens)

  measure = Measure(data, config.report)
  rows = [report.Row("+".join(done) or "dense", measure(model))]
  print(rows[-1])
  for step in config.steps:
    model = compression.STEPS[step](config[step], model, data.calibration)
    rows.append(report.Row(step, measure(model)))
    print(rows[-1])
  target = folder / "model"
  steps = [*done, *config.steps]
  storage.save(target, model.params, model.config, pretrained.tokenizer, steps=steps)
  if model.adapters:
    exchange.save(
      folder / "adapter",
      model.adapters,
      model.params,
      model.axes,
      base_model=str(target),
      table=table_of(model),
    )
  data.write_rest(folder)
  report.write(folder, rows, "\n".join([*remarks(rows), "", about()]))
  print(report.table(rows))
  print("\n".join(remarks(rows)))


def extended(config: ConfigDict, found: Pretrained) -> Pretrained:
  """The model with the leaves of its task if an adapter has them; their start is replaced."""
  if not config.adapter or config.text.source:
    return found
  return compression_data.make_task(config).extend(found, jax.random.key(0))


def table_of(model: Model) -> dict:
  """The tensor names of adapters."""
  return families.tensor_names(model.config, where="modules")


def with_adapter(config: ConfigDict, model: Model) -> Model:
  """The model with the adapter of config.adapter, merged or alongside it.

  Raises:
    ValueError: when the adapter is LoftQ's, or does not fit, or there is no merging it.
  """
  run, trained = parts.open_run(config.adapter, config_checks.ADAPTED)
  if trained.adapter.method == "loftq":
    raise ValueError(
      f"{run.path}: LoftQ's adapter belongs to the quantized base that it made; export the run "
      "with --to=merged, and compress that"
    )
  if trained.model.source != config.model.source:
    print(
      f"the adapter was trained on {trained.model.source!r}, and its base here is "
      f"{config.model.source!r}"
    )
  if trained.model.quantize != "none":
    print(
      f"the adapter was trained on a base in {trained.model.quantize}, whose rounding it may have "
      "compensated; here the base is not rounded"
    )
  table = table_of(model)
  adapters = exchange.load(run.adapter, model.params, model.axes, table=table)
  undropped = {
    path: dataclasses.replace(adapter, dropout=0.0) if adapter.drops else adapter
    for path, adapter in adapters.items()
  }
  model = model._replace(adapters=undropped)
  if config.keep_adapter:
    return model
  merged = absorb(model)
  if merged.adapters:
    path = next(iter(merged.adapters))
    kind = type(tree.flatten(model.params, is_leaf=is_weight)[path]).__name__
    raise ValueError(
      f"{path}: is compressed, a {kind}, which this adapter does not merge into; set "
      "keep_adapter to True"
    )
  return merged


def absorb(model: Model) -> Model:
  """The model with its adapters merged where `merging.absorb` merges them; the others stay."""
  after = tree.flatten(merging.absorb(model.weights), is_leaf=is_weight)
  stay = {path: x for path, x in model.adapters.items() if _is_adapted(after[path])}

  def merged(path, leaf):
    return leaf if path in stay else after[path]

  params = tree.map_with_path(merged, model.params, is_leaf=is_weight)
  return model._replace(params=params, adapters=stay)


def _is_adapted(leaf: Any) -> bool:
  return isinstance(unmasked(leaf), lora_jax.Adapted)


def add_healed(config: ConfigDict, folder: pathlib.Path, healed: str):
  """Adds a run that trained an adapter on the compressed model to its report, as it will be used.

  That is with the adapter merged where the model stays as small by it.

  Raises:
    FileNotFoundError: when there is no report yet.
    ValueError: when the run trained on another model, or the report is damaged.
  """
  run, trained = parts.open_run(healed, config_checks.ADAPTED)
  if pathlib.Path(trained.model.source).absolute() != (folder / "model").absolute():
    raise ValueError(
      f"{run.path}: was trained on {trained.model.source}, and not on {folder / 'model'}; name a "
      "run that heals this model"
    )
  run, trained = parts.open_run(healed)  # and how it was trained
  written, rows = report.read(folder)
  before = [row for row in rows if row.step != "heal"]
  trained.model.scan_layers = False
  small = methods.load_base(trained)
  model = Model(small.config, small.params, adapters={})
  table = table_of(model)
  adapters = exchange.load(run.adapter, model.params, model.axes, table=table)
  if methods.merge_format(trained):
    model = model._replace(params=methods.finish(trained, model.params, adapters, model.axes))
  else:
    model = absorb(model._replace(adapters=adapters))
  measures = Measure(compression_data.of(config, small), config.report)(model)
  rows = [*before, report.Row("heal", measures)]
  report.write(folder, rows, f"{written}\n\n{about()}")
  print(report.table(rows))


def about() -> str:
  """Describes the machine and the command of the measurements."""
  device = jax.devices()[0].device_kind
  return (
    f"`python -m experiments.compress {shlex.join(sys.argv[1:])}`, {device}, "
    f"JAX {metadata.version('jax')}"
  )


# ---- measures


class Measure:
  """The function from a Model to its `report.Measures`; the first model is what others are timed
  against, in turns.

  data: what is measured by.
  section: the config's `report`.
  """

  def __init__(self, data: compression_data.Data, section: ConfigDict):
    self._data, self._section, self._first = data, section, None

  def __call__(self, model: Model) -> report.Measures:
    data, section = self._data, self._section
    weights = merging.deployed(merging.without_masks(model.weights), resident=section.resident)
    runs = data.runs(model, weights)
    times, ratios = report.latencies(runs, self._first, section.repeats)
    self._first = self._first or runs
    return report.Measures(
      parameters=report.count_parameters(model.weights),
      memory=report.count_bytes(weights),
      disk=storage.size(model.params) + report.count_bytes(model.adapters),
      flops=data.flops(model, weights),
      unit=data.UNIT,
      times=times,
      ratios=ratios,
      figures=data.figures(model, weights),
    )


def remarks(rows: list[report.Row]) -> list[str]:
  """Why a step did not lower the time, for each that did not."""
  found = []
  for before, row in itertools.pairwise(rows):
    slower = [
      f"{name} × {n}"
      for name, each in row.measures.ratios.items()
      for n, ratio in each.items()
      if ratio >= before.measures.ratios.get(name, {}).get(n, 1.0)
    ]
    reason = compression.NOT_FASTER.get(row.step)
    if slower and reason:
      found.append(f"- {row.step} did not lower {', '.join(slower)}: {reason}.")
  return found


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  programs.run(main)
