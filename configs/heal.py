r"""Heals a compressed model with LoRA, and with what its task trains in full.

    python -m experiments.train --config=configs/heal.py:compressed=runs/small --workdir=runs/healed
    python -m experiments.train --workdir=runs/healed_vit \
        --config=configs/heal.py:model=vit,compressed=runs/small_vit,distill

    :compressed=runs/small   the workdir of experiments.compress
    :model=smollm2   as in configs/compress.py. SmolLM2 heals on the text that was used neither for
                     calibration nor for evaluation, the others on the task's training split
    :rank=16         of the adapter
    :distill         also learn from the model before its compression
    :scan            stack the layers; all must be compressed the same way
    :smoke           a few steps
"""

import pathlib

import ml_collections

from configs import arguments, compress
from lora_jax.io import json_files


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(
    text, model="smollm2", compressed="runs/small", rank=16, distill=False, scan=False, smoke=False
  )
  if args["model"] not in compress.MODELS:
    raise ValueError(f"the model {args['model']!r} is unknown; use {', '.join(compress.MODELS)}")
  is_text = args["model"] == "smollm2"
  config = compress.run_of(args["model"], args["smoke"], args["rank"])
  folder = pathlib.Path(args["compressed"])
  config.model.source = str(folder / "model")
  config.model.scan_layers = args["scan"]
  config.train.steps, config.optimizer.peak_learning_rate = 200, 1e-3
  if is_text:
    _on_the_rest(config, folder)
  if args["distill"]:
    config.distill.teacher = _before(folder)
  if args["smoke"]:
    config.train.steps, config.train.checkpoint_every = 2, 2
    config.optimizer.warmup_steps = 1
  return config


def _on_the_rest(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """The text that the compression left."""
  data = config.data
  data.source, data.format, data.columns = str(folder / "rest.jsonl"), "jsonl", ()
  data.sign_of = ""
  data.prompt, data.completion, data.choices = "{first}", "{rest}", ()
  data.split_by = "rest"
  data.max_length, data.buckets = 272, (272,)  # a window and some room
  config.train.batch_size = 8
  config.evaluation.examples, config.evaluation.batch_size = 16, 8
  config.evaluation.samples = 0


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
