r"""Exports a run, for `transformers`, for `peft` or for llama.cpp.

    python -m experiments.export --workdir=runs/quickstart --to=merged --output=runs/merged
    python -m experiments.export --workdir=runs/quickstart --to=gguf --output=adapter.gguf
    python -m experiments.export --workdir=runs/dora --to=peft --rank=16 --output=runs/as_lora

--to=merged writes a model's folder with the adapter merged in: model.safetensors, config.json,
generation_config.json and the tokenizer's files. The merge is computed in float32 and rounded once,
to --dtype. --to=peft writes the adapter alone, as the run's adapter/ has it already; with --rank,
whatever its method, as the nearest plain LoRA of that rank, and says what that loses. --to=gguf
writes the adapter as one file that llama.cpp loads beside its base (`--lora adapter.gguf`).
"""

import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import lora_jax
from experiments import methods, parts
from lora_jax import exchange
from lora_jax.io import export
from lora_jax.models import llama

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
_TO = flags.DEFINE_enum("to", None, ["peft", "merged", "gguf"], "What is written.", required=True)
_OUTPUT = flags.DEFINE_string(
  "output", None, "What to write: a new or empty folder, or, of GGUF, a new file.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"], "Of merged's and GGUF's; float32 by default."
)
_RANK = flags.DEFINE_integer("rank", None, "Of PEFT's: convert to a plain LoRA of this rank.", 1)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if _RANK.value and _TO.value != "peft":
    raise app.UsageError(f"--rank has no meaning for --to={_TO.value}")
  if _DTYPE.value and _TO.value == "peft":
    raise app.UsageError("--dtype has no meaning for --to=peft: adapters are kept in float32")
  logging.set_verbosity(logging.WARNING)
  output = pathlib.Path(_OUTPUT.value)
  if output.exists() and (not output.is_dir() or any(output.iterdir()) or _TO.value == "gguf"):
    raise FileExistsError(f"{output}: holds something already; name what is not there yet")
  run, config = parts.open_run(_WORKDIR.value)
  if config.adapter.method == "loftq" and _TO.value != "merged":
    raise ValueError(
      f"{run.path}: LoftQ's adapter belongs to the quantised base that it made, which is no model "
      "that another program has; use --to=merged"
    )
  pretrained = methods.load_base(config)
  params = pretrained.params
  axes = parts.trace_axes(llama.Llama(pretrained.config), params)
  adapters = exchange.load(run.adapter, params, axes)
  dtype = _DTYPE.value or "float32"

  if _TO.value == "merged":
    merged = lora_jax.merge(params, adapters)
    merged = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), merged)
    export.save(output, merged, pretrained.config, pretrained.tokenizer)
    print(f"merged {len(adapters)} adapted leaves into {output}")
    return
  if _TO.value == "gguf":
    exchange.save_gguf(output, adapters, params, axes, config=pretrained.config, dtype=dtype)
  else:
    if _RANK.value:
      adapters, lost = lora_jax.to_lora(adapters, params, rank=_RANK.value)
      worst = max(lost, key=lambda path: lost[path].max())
      print(f"of the change of a kernel at most {lost[worst].max():.2%} is lost ({worst})")
    exchange.save(output, adapters, params, axes, base_model=config.model.source)
  print(f"wrote the adapters of {len(adapters)} leaves to {output}")


if __name__ == "__main__":
  app.run(main)
