"""A random Llama, a small file of records and a config of both, for the main programs."""

import json
import pathlib

import jax
import jax.numpy as jnp

from lora_jax.io import export
from lora_jax.models import llama

_CONFIG = """
from configs import quickstart

def get_config(text=""):
  config = quickstart.get_config(text)
  config.model.source = {model!r}
  data = config.data
  data.source, data.format, data.columns, data.sign_of = {data!r}, "jsonl", (), ""
  data.train, data.validation, data.test = 0.6, 0.2, 0.2
  data.buckets = (16, 24)
  data.max_length = 25
  config.adapter.alpha = 8.0
  config.train.steps, config.train.log_every, config.train.checkpoint_every = 6, 1, 2
  config.train.batch_size = 8
  config.optimizer.warmup_steps, config.optimizer.peak_learning_rate = 1, 1e-2
  config.evaluation.batch_size = 8
  config.evaluation.examples, config.evaluation.samples = 16, 0
  config.update_from_flattened_dict({fields!r})
  return config
"""


def write(
  folder: pathlib.Path, tokenizer, *, max_length: int = 64, **sections: dict
) -> pathlib.Path:
  """Writes them into a folder; returns the config's file.

  Args:
    folder: an empty one.
    tokenizer: SmolLM2's, as `lora_jax.io.pretrained.load` gives it.
    max_length: positions of the model.
    **sections: fields of the config that are to be others, by section: `train={"steps": 20}`.
  """
  config = llama.LlamaConfig(
    vocab_size=tokenizer.vocab_size,
    width=32,
    mlp_width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=max_length,
    tie_embeddings=True,
  )
  params = llama.Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  export.save(folder / "model", params, config, tokenizer)
  rows = [
    {"text": f"{word} film number {n}", "label": label}
    for n in range(60)
    for word, label in (("fine", "positive"), ("dull", "negative"))
  ]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  fields = {
    f"{section}.{name}": value
    for section, values in sections.items()
    for name, value in values.items()
  }
  path = folder / "config.py"
  model, data = str(folder / "model"), str(folder / "data.jsonl")
  path.write_text(_CONFIG.format(model=model, data=data, fields=fields))
  return path
