r"""Exports a run, or a model without one, for other programs: this package is not needed any more.

    python -m experiments.export --workdir=runs/quickstart --to=merged --output=runs/merged
    python -m experiments.export --workdir=runs/quickstart --to=merged_gguf --dtype=q8_0 \
        --output=model.gguf
    python -m experiments.export --model=runs/small/model --to=artifact --output=runs/artifact
    python -m experiments.export --workdir=runs/quickstart --to=gguf --output=adapter.gguf
    python -m experiments.export --workdir=runs/dora --to=peft --rank=16 --output=runs/as_lora

--to=merged writes a model's folder for `transformers`, the adapter merged in: model.safetensors,
config.json, generation_config.json and the tokenizer's files. --to=merged_gguf writes the same
model as one file for llama.cpp, its matrices in --dtype. Both are dense: what was quantised or
factored is decoded; channels and heads that were taken out stay out. The merge is computed in
float32 and rounded once.

--to=artifact writes the forward pass as a program with its numbers, which runs with nothing but JAX
and safetensors (`lora_jax.compress.artifact` says how). There codes and factors stay what they are,
and so does an adapter on top of them; on a dense base it is merged.

--to=peft writes the adapter of a run alone, as its adapter/ has it already; with --rank, whatever
its method, as the nearest plain LoRA of that rank, and says what that loses. --to=gguf writes it as
one file that llama.cpp loads beside its base (`--lora adapter.gguf`).
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import lora_jax
from experiments import methods, parts
from lora_jax import exchange
from lora_jax.compress import artifact, merging
from lora_jax.io import export, gguf_model, pretrained
from lora_jax.models import llama

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder: its model with its adapter.")
_MODEL = flags.DEFINE_string("model", None, "Or a model alone, compressed or not, by its address.")
_FORMATS = ["peft", "gguf", "merged", "merged_gguf", "artifact"]
_TO = flags.DEFINE_enum("to", None, _FORMATS, "What is written.", required=True)
_OUTPUT = flags.DEFINE_string(
  "output", None, "What to write: a new or empty folder, or, of GGUF, a new file.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", list(gguf_model.KINDS), "Of what is merged, and of gguf's."
)
_RANK = flags.DEFINE_integer("rank", None, "Of PEFT's: convert to a plain LoRA of this rank.", 1)
_ROWS = flags.DEFINE_integer("rows", 1, "How many texts the artifact takes at once.", 1)
_LENGTH = flags.DEFINE_integer("length", 128, "How many tokens of each it takes.", 1)
_PLATFORMS = flags.DEFINE_list("platforms", "cpu", "What the artifact is for: cpu, cuda, tpu.")

_FLOATS = ("float32", "bfloat16", "float16")
_KNOWN_PLATFORMS = ("cpu", "cuda", "tpu")


def check_flags():
  """Refuses what has no meaning, before anything is loaded."""
  to = _TO.value
  if (_WORKDIR.value is None) == (_MODEL.value is None):
    raise app.UsageError("give either --workdir or --model")
  if _MODEL.value and to in ("peft", "gguf"):
    raise app.UsageError(f"--to={to} writes the adapter of a run; give its --workdir")
  meant_for = {
    "rank": ("peft",),
    "dtype": ("gguf", "merged", "merged_gguf"),
    "rows": ("artifact",),
    "length": ("artifact",),
    "platforms": ("artifact",),
  }
  for name, formats in meant_for.items():
    if flags.FLAGS[name].present and to not in formats:
      raise app.UsageError(f"--{name} has no meaning for --to={to}, only for {', '.join(formats)}")
  if to != "merged_gguf" and _DTYPE.value not in _FLOATS:
    floats = ", ".join(_FLOATS)
    raise app.UsageError(f"--dtype={_DTYPE.value} is for --to=merged_gguf alone; use {floats}")
  if unknown := sorted(set(_PLATFORMS.value) - set(_KNOWN_PLATFORMS)):
    raise app.UsageError(f"--platforms: {unknown} are not among {', '.join(_KNOWN_PLATFORMS)}")
  output = pathlib.Path(_OUTPUT.value)
  is_file = to in ("gguf", "merged_gguf")
  if output.exists() and (is_file or not output.is_dir() or any(output.iterdir())):
    raise FileExistsError(f"{output}: holds something already; name what is not there yet")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  check_flags()
  logging.set_verbosity(logging.WARNING)
  to, output, dtype = _TO.value, pathlib.Path(_OUTPUT.value), _DTYPE.value

  if _MODEL.value:
    found = parts.load_source(_MODEL.value)
    weights = found.params
  else:
    run, config = parts.open_run(_WORKDIR.value)
    if config.adapter.method == "loftq" and to in ("peft", "gguf"):
      raise ValueError(
        f"{run.path}: LoftQ's adapter belongs to the quantised base that it made, which is no "
        "model that another program has; use --to=merged"
      )
    found = methods.load_base(config)
    axes = parts.trace_axes(llama.Llama(found.config), found.params)
    adapters = exchange.load(run.adapter, found.params, axes)
    if to in ("peft", "gguf"):
      export_adapters(output, adapters, found, axes, base_model=config.model.source)
      return
    weights = methods.finish(config, found.params, adapters, axes)

  wider: dict[str, str] = {}
  if to == "merged":
    arrays = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), merging.to_arrays(weights))
    export.save(output, arrays, found.config, found.tokenizer)
  elif to == "merged_gguf":
    arrays = merging.to_arrays(weights)
    wider = gguf_model.save(output, arrays, found.config, found.tokenizer, dtype=dtype)
  else:
    # A forward pass keeps nothing for a backward pass.
    model = llama.Llama(dataclasses.replace(found.config, remat_policy=None))
    artifact.save(
      output,
      lora_jax.adapt(model.apply),
      merging.keep_smaller(weights),
      rows=_ROWS.value,
      length=_LENGTH.value,
      platforms=_PLATFORMS.value,
      tokenizer=found.tokenizer,
    )
  for stored in sorted(set(wider.values())):
    names = ", ".join(name for name in wider if wider[name] == stored)
    print(f"wider than asked, in {stored}: {names}")
  print(f"wrote the model to {output}, {size(output):,} bytes")


def export_adapters(output, adapters, found: pretrained.Pretrained, axes, *, base_model: str):
  """Writes adapters without their base, for `peft` or for llama.cpp."""
  if _TO.value == "gguf":
    exchange.save_gguf(
      output, adapters, found.params, axes, config=found.config, dtype=_DTYPE.value
    )
  else:
    if _RANK.value:
      adapters, lost = lora_jax.to_lora(adapters, found.params, rank=_RANK.value)
      worst = max(lost, key=lambda path: lost[path].max())
      print(f"of the change of a kernel at most {lost[worst].max():.2%} is lost ({worst})")
    exchange.save(output, adapters, found.params, axes, base_model=base_model)
  print(f"wrote the adapters of {len(adapters)} leaves to {output}, {size(output):,} bytes")


def size(path: pathlib.Path) -> int:
  """The bytes of a file, or of the files in a folder."""
  files = [path] if path.is_file() else path.iterdir()
  return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
  app.run(main)
