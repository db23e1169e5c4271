"""A tiny model, a text and a config of `experiments.compress`, for tests of the compression."""

import json
import pathlib
import runpy

import jax
import numpy as np
import tiny_experiment

import lora_jax
from configs import compress
from experiments import parts
from lora_jax import exchange
from lora_jax.models import llama
from lora_jax.run import workdir


def write(folder: pathlib.Path, tokenizer):
  """Writes the model and the text into a folder; returns a task's section `data`."""
  path = tiny_experiment.write(folder, tokenizer)
  words = np.random.default_rng(0).choice(["fine", "dull", "film", "joy", "plot", "old"], 4000)
  rows = [{"text": " ".join(words[n : n + 20])} for n in range(0, 4000, 20)]
  (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return runpy.run_path(str(path))["get_config"]().data


def config(folder: pathlib.Path, data, text: str, **fields):
  """A config of so many arguments, and with these fields, dots in their names for dashes below."""
  found = compress.get_config(text)
  found.model.source = str(folder / "model")
  source = found.text
  source.source, source.format, source.columns = str(folder / "text.jsonl"), "jsonl", ()
  source.length, source.calibration, source.held_out = 32, 8, 4
  found.channels.mlp_width, found.value_heads.value_dim = 48, 6
  found.heads.num_kv_heads = 1
  found.factorize.targets = ("mlp",)
  found.task.data, found.task.examples = data, 8
  found.report.prompt, found.report.batches, found.report.repeats = 8, (1,), 1
  found.update_from_flattened_dict(fields)
  return found


def write_run(folder: pathlib.Path, model: str | pathlib.Path, method) -> pathlib.Path:
  """A finished run on a model, with adapters of the MLPs as if they were trained."""
  section = compress.get_config("").model
  section.source = str(model)
  found = parts.load_model(section)
  axes = parts.trace_axes(llama.Llama(found.config), found.params)
  specs = lora_jax.match(found.params, [("mlp", method)], axes)
  adapters = lora_jax.init(jax.random.key(0), found.params, specs, axes)
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype("f"), adapters)
  settings = {"adapter": {"method": "lora"}, "model": section.to_dict()}
  with workdir.open_workdir(folder, settings) as run:
    exchange.save(
      run.adapter, adapters, found.params, axes, base_model=str(model), table=found.table
    )
  return folder
