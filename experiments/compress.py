r"""Compresses a model step by step, and reports the cost and gain of each step.

    python -m experiments.compress --config=configs/compress.py --workdir=runs/small
    python -m experiments.compress --config=configs/compress.py:steps=factorize+quantize \
        --workdir=runs/smaller --config.factorize.budget=0.7

The workdir then holds model/, which train, evaluate and generate take as a model's folder, the
report (report.md, report.json, pareto.png), config.json, and rest.jsonl, the text that was used
neither for calibration nor to measure by. To heal the model on it, and to add that to the report:

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
import functools
import json
import pathlib
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import lora_jax
from experiments import (
  compression,
  compression_checks,
  config_checks,
  inputs,
  methods,
  parts,
  programs,
)
from experiments.compression import Model
from lora_jax import exchange, families, tasks, tree
from lora_jax.compress import make_windows, merging, perplexity, report, storage
from lora_jax.data import records
from lora_jax.io import outputs
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.tasks import texts
from lora_jax.train import evaluation, workdir
from lora_jax.weights import Pruned, is_weight

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
  parts.check_writes(
    parts.read_shapes(config.model),
    "a compression is measured by the text that a model goes on with: compress another by the "
    "functions of lora_jax.compress, and save it by lora_jax.compress.storage",
  )
  if (folder / "model").exists():
    raise FileExistsError(f"{folder / 'model'}: is there already; use another workdir")
  pretrained = parts.load_model(config.model)
  most, prompt = pretrained.config.max_length, config.report.prompt
  texts.check_positions(
    pretrained.config, config.text.length, f"text.length {config.text.length}", most
  )
  texts.check_positions(
    pretrained.config, prompt + 1, f"report.prompt {prompt} and a token after it", most - 1
  )
  task = task_on(config, pretrained)
  calibration_NT, held_out_NT, rest_NT = read_windows(config.text, pretrained.tokenizer)
  model = Model(pretrained.config, pretrained.params, adapters={})
  if config.adapter:
    model = with_adapter(config, model)
  compression_checks.check_model(config, model, calibration_NT)

  measure = make_measure(config, held_out_NT, task)
  rows = [report.Row("+".join(done) or "dense", measure(model))]
  print(rows[-1])
  for step in config.steps:
    model = compression.STEPS[step](
      config[step], model, compression.Calibration(calibration_NT, config.text.batch_size)
    )
    rows.append(report.Row(step, measure(model)))
    print(rows[-1])
  target = folder / "model"
  steps = [*done, *config.steps]
  storage.save(target, model.params, model.config, pretrained.tokenizer, steps=steps)
  if model.adapters:
    exchange.save(
      folder / "adapter", model.adapters, model.params, model.axes, base_model=str(target),
      table=families.tensor_names(model.config),
    )  # fmt: skip
  write_rest(folder / "rest.jsonl", rest_NT, pretrained.tokenizer)
  report.write(folder, rows, about())
  print(report.table(rows))


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
  table = families.tensor_names(model.config)
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
  return isinstance(leaf.w if isinstance(leaf, Pruned) else leaf, lora_jax.Adapted)


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
  table = families.tensor_names(model.config)
  adapters = exchange.load(run.adapter, model.params, model.axes, table=table)
  if methods.merge_format(trained):
    model = model._replace(params=methods.finish(trained, model.params, adapters, model.axes))
  else:
    model = absorb(model._replace(adapters=adapters))
  _, held_out_NT, _ = read_windows(config.text, small.tokenizer)
  measures = make_measure(config, held_out_NT, task_on(config, small))(model)
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


# ---- text


def read_windows(text: ConfigDict, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
  """The windows for calibration, those to measure by, and the rest.

  Raises:
    ValueError: when there are too few.
  """
  rows = []
  for source in parts.addresses(text.source):
    found = parts.read_file(text, source)
    records.require(found, [text.column], f"{source}: config.text.column")
    records.check_values(found, [text.column], f"{source}: config.text.column")
    rows += found
  windows_NT = make_windows(
    " ".join(str(row[text.column]) for row in rows),
    functools.partial(tokenizer.encode, special_tokens=text.special_tokens),
    text.length,
  )
  needed = text.calibration + text.held_out
  if len(windows_NT) < needed:
    raise ValueError(
      f"the text has {len(windows_NT)} windows of {text.length} tokens, and config.text asks for "
      f"{text.calibration} for calibration and {text.held_out} to measure by; give more text"
    )
  return tuple(np.split(windows_NT, [text.calibration, needed]))


def write_rest(path: pathlib.Path, rest_NT: np.ndarray, tokenizer: Tokenizer):
  """The windows that are left as records: the first token's text, and what follows it."""
  lines = [
    json.dumps(
      {"first": tokenizer.decode(ids[:1]), "rest": tokenizer.decode(ids[1:], after=ids[:1])}
    )
    for ids in rest_NT.tolist()
  ]
  outputs.write_text(path, "".join(f"{line}\n" for line in lines))


# ---- measures


def task_on(config: ConfigDict, found: Pretrained) -> tasks.Task | None:
  """The task that a model is measured by, on the model; None where the config asks for none."""
  if not config.task.examples:
    return None
  task = tasks.make({"name": config.task.name}, config.task.data, loss_chunk=0)
  return task.of_model(found)


def make_measure(config: ConfigDict, held_out_NT: np.ndarray, task: tasks.Task | None) -> Callable:
  """Makes the function from a Model to its `report.Measures`; of a task, the accuracy too."""
  if task is not None:
    records = parts.load_records(config.task.data, task)
    rows = parts.pick(records, config.task.split, "task.split")
    data = task.eval_batches(task.examples(rows)[: config.task.examples], config.task.batch_size)

  def measure(model: Model) -> report.Measures:
    weights, accuracy = merging.without_masks(model.weights), None
    if task is not None:
      eval_step = task.make_eval_step(model.apply)
      accuracy = evaluation.evaluate(eval_step, weights, data, task.metrics)["accuracy"]
    section = config.report
    times = {
      rows: report.latency(
        model.apply, weights, model.config,
        rows=rows, length=section.prompt, repeats=section.repeats,
      )
      for rows in section.batches
    }  # fmt: skip
    return report.Measures(
      parameters=report.count_parameters(model.weights),
      memory=report.count_bytes(weights),
      disk=storage.size(model.params) + report.count_bytes(model.adapters),
      flops=report.flops_per_token(model.apply, weights, section.prompt),
      prefill={rows: prefill for rows, (prefill, _) in times.items()},
      token={rows: token for rows, (_, token) in times.items()},
      perplexity=perplexity(model.apply, weights, held_out_NT, batch_size=config.text.batch_size),
      accuracy=accuracy,
    )

  return measure


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  programs.run(main)
