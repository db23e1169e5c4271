r"""Heals a compressed model with LoRA, on text used neither for calibration nor for evaluation.

python -m experiments.train --config=configs/heal.py:compressed=runs/small --workdir=runs/healed

:compressed=runs/small   the workdir of experiments.compress
:rank=16                 of the adapter
:distill                 also learn from the model before its compression
:scan                    stack the layers; all must be compressed the same way
:smoke                   a few steps
"""

import pathlib

import ml_collections

from configs import arguments, quickstart
from lora_jax.io import json_files


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(
    text, compressed="runs/small", rank=16, distill=False, scan=False, smoke=False
  )
  config = quickstart.get_config(f"rank={args['rank']}")
  folder = pathlib.Path(args["compressed"])
  config.model.source = str(folder / "model")
  config.model.scan_layers = args["scan"]

  data = config.data
  data.source, data.format, data.columns = str(folder / "rest.jsonl"), "jsonl", ()
  data.sign_of = ""
  data.prompt, data.completion, data.choices = "{first}", "{rest}", ()
  data.split_by = "rest"
  data.max_length, data.buckets = 272, (272,)  # a window and some room

  config.train.steps, config.train.batch_size = 200, 8
  config.optimizer.peak = 1e-3
  config.evaluation.examples, config.evaluation.batch_size = 16, 8
  config.evaluation.samples = 0
  if args["distill"]:
    config.distill.teacher = _before(folder)
  if args["smoke"]:
    config.train.steps, config.train.checkpoint_every = 2, 2
    config.optimizer.warmup_steps = 1
  return config


def _before(folder: pathlib.Path) -> str:
  """The model that a workdir of experiments.compress started from."""
  compressed = json_files.read_json(folder / "config.json", what="the config of a compression")
  model = compressed.get("model")
  source = model.get("source") if isinstance(model, dict) else None
  if not isinstance(source, str) or not isinstance(compressed.get("adapter"), str):
    raise ValueError(
      f"{folder / 'config.json'}: names no model.source or no adapter; restore it, or name the "
      "model by --config.distill.teacher"
    )
  if compressed["adapter"]:
    raise ValueError(
      f"{folder}: the adapter of {compressed['adapter']} was part of the model before its "
      "compression; export that run with --to=merged, and name it by --config.distill.teacher"
    )
  return source
