r"""Exports a run's model with its adapter merged in, as a folder that `transformers` loads.

    python -m experiments.export --workdir=runs/quickstart --output=runs/quickstart/merged

The folder holds model.safetensors, config.json, generation_config.json and the tokenizer's files.
The merge is computed in float32 and rounded once, to --dtype. (The adapter alone, as `peft` loads
it, is in the run's adapter/ already.)
"""

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import lora_jax
from experiments import parts
from lora_jax import exchange
from lora_jax.io import export
from lora_jax.models import llama

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write; new or empty.", required=True)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the tensors."
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  run, config = parts.open_run(_WORKDIR.value)
  pretrained = parts.load_model(config.model)
  axes = parts.trace_axes(llama.Llama(pretrained.config), pretrained.params)
  adapters = exchange.load(run.adapter, pretrained.params, axes)
  merged = lora_jax.merge(pretrained.params, adapters)
  merged = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(_DTYPE.value)), merged)
  export.save(_OUTPUT.value, merged, pretrained.config, pretrained.tokenizer)
  print(f"merged {len(adapters)} adapted kernels into {_OUTPUT.value}")


if __name__ == "__main__":
  app.run(main)
