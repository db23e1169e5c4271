r"""Exports a run, or a model without a run, for programs that do not use this package.

    python -m experiments.export --workdir=runs/quickstart --to=merged --output=runs/merged
    python -m experiments.export --workdir=runs/quickstart --to=merged_gguf --dtype=q8_0 \
        --output=model.gguf
    python -m experiments.export --model=runs/small/model --to=artifact --output=runs/artifact
    python -m experiments.export --workdir=runs/cifar --to=onnx --output=runs/onnx
    python -m experiments.export --workdir=runs/quickstart --to=gguf --output=adapter.gguf
    python -m experiments.export --workdir=runs/dora --to=peft --rank=16 --output=runs/as_lora

--to=merged writes a model's folder for `transformers`, the adapter merged in: model.safetensors,
config.json, generation_config.json and the tokenizer's files. --to=merged_gguf writes the same
model as one file for llama.cpp. Both have --dtype, by default that of the base's own files, float32
where these are quantized. Both are dense: quantized and factored weights are materialized; removed
channels and heads stay removed. The merge is computed in float32 and rounded once.

--to=artifact writes the forward pass as a program with its parameters, which needs only JAX and
safetensors (see `lora_jax.compress.artifact`). Quantized values and factors are kept, and so is an
adapter on them; an adapter on a dense base is merged. --to=onnx writes the same as one ONNX file,
which needs only onnxruntime (see `lora_jax.compress.onnx_program`; `pip install -e ".[onnx]"`). It
runs the file once and compares the outputs.

--to=peft writes only the adapter of a run, as in its adapter/. With --rank it writes the nearest
plain LoRA of that rank, for any method, and reports the error. --to=gguf writes it as one file that
llama.cpp loads with its base (`--lora adapter.gguf`). The default dtype is float32, as in training.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
from absl import app, flags, logging

import lora_jax
from experiments import inputs, methods, model_options, parts, programs
from lora_jax import exchange, tree
from lora_jax.compress import artifact, merging, onnx_program
from lora_jax.io import casting, export, gguf_model, outputs, pretrained
from lora_jax.models import layers

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder: its model with its adapter.")
_MODEL = flags.DEFINE_string("model", None, "Or a model alone, compressed or not, by its address.")
_FORMATS = ["peft", "gguf", "merged", "merged_gguf", "artifact", "onnx"]
_TO = flags.DEFINE_enum("to", None, _FORMATS, "The format of the output.", required=True)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The output: a new or empty folder, or for GGUF a new file.", required=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, list(gguf_model.KINDS), "The dtype of a merge (by default the base's) and of gguf."
)
_RANK = flags.DEFINE_integer("rank", None, "For peft: convert to a plain LoRA of this rank.", 1)
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download what the run's config.json names, where it is not on this machine."
)
_ROWS = flags.DEFINE_integer("rows", 1, "How many texts or images the program takes at once.", 1)
_LENGTH = flags.DEFINE_integer(
  "length", None, "Tokens of each text (128 by default), or pixels of a side of each image.", 1
)
_PLATFORMS = flags.DEFINE_list("platforms", "cpu", "The platforms of the artifact: cpu, cuda, tpu.")

_FLOATS = ("float32", "bfloat16", "float16")
_KNOWN_PLATFORMS = ("cpu", "cuda", "tpu")


def check_flags():
  """Refuses meaningless flags, before anything is loaded."""
  to = _TO.value
  if (_WORKDIR.value is None) == (_MODEL.value is None):
    raise app.UsageError("give either --workdir or --model")
  if _MODEL.value and _FETCH.value:
    raise app.UsageError("--fetch is for a --workdir; a --model is fetched as it stands")
  if _MODEL.value and to in ("peft", "gguf"):
    raise app.UsageError(f"--to={to} writes the adapter of a run; give its --workdir")
  meant_for = {
    "rank": ("peft",),
    "dtype": ("gguf", "merged", "merged_gguf"),
    "rows": ("artifact", "onnx"),
    "length": ("artifact", "onnx"),
    "platforms": ("artifact",),
  }
  for name, formats in meant_for.items():
    if flags.FLAGS[name].present and to not in formats:
      raise app.UsageError(f"--{name} has no meaning for --to={to}, only for {', '.join(formats)}")
  if to != "merged_gguf" and _DTYPE.value not in (None, *_FLOATS):
    floats = ", ".join(_FLOATS)
    raise app.UsageError(f"--dtype={_DTYPE.value} is for --to=merged_gguf alone; use {floats}")
  if unknown := sorted(set(_PLATFORMS.value) - set(_KNOWN_PLATFORMS)):
    raise app.UsageError(f"--platforms: {unknown} are not among {', '.join(_KNOWN_PLATFORMS)}")
  if to == "onnx":
    onnx_program.require_jax2onnx()
  is_file = to in ("gguf", "merged_gguf")
  (outputs.new_file if is_file else outputs.new_folder)(_OUTPUT.value)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  check_flags()
  logging.set_verbosity(logging.WARNING)
  to, output = _TO.value, outputs.absolute(_OUTPUT.value)

  if _MODEL.value:
    found = parts.load_source(_MODEL.value)
    weights = found.params
  else:
    run, config = parts.open_run(_WORKDIR.value)
    inputs.require_of(run, config, ["model.source"], fetch=_FETCH.value)
    inputs.warn_of_changes(run, config, ["model.source"])
    if config.adapter.method == "loftq" and to in ("peft", "gguf"):
      raise ValueError(
        f"{run.path}: LoftQ's adapter belongs to the quantized base that it made, which is no "
        "model that another program has; use --to=merged"
      )
    found = methods.load_base(config)
    axes = parts.trace_axes(parts.make_model(found.config), found.params)
    table = found.table
    adapters = exchange.load(run.adapter, found.params, axes, table=table)
    if to in ("peft", "gguf"):
      export_adapters(output, adapters, found, axes, base_model=config.model.source)
      if to == "peft" and parts.new_tokens_of(config.model):
        found.tokenizer.save(output)  # the base's own has not the tokens that these rows are of
      return
    weights = methods.finish(config, found.params, adapters, axes)

  if to not in ("artifact", "onnx") and (line := model_options.exact_elsewhere(found.config)):
    print(line)
  wider: dict[str, str] = {}
  dtype = _DTYPE.value or found.stored_dtype
  if to == "merged":
    arrays = merging.to_arrays(weights)
    cast = casting.cast(tree.flatten(arrays), jnp.dtype(dtype))
    export.save(output, tree.replace(arrays, cast), found.config, found.tokenizer)
  elif to == "merged_gguf":
    arrays = merging.to_arrays(weights)
    wider = gguf_model.save(output, arrays, found.config, found.tokenizer, dtype=dtype)
  else:
    export_program(output, weights, found)
  for stored in sorted(set(wider.values())):
    listed = ", ".join(name for name in wider if wider[name] == stored)
    print(f"wider than asked, in {stored}: {listed}")
  described = "" if to in ("artifact", "onnx") else f" in {dtype}"
  print(f"wrote the model{described} to {output}, {size(output):,} bytes")


def export_program(output: pathlib.Path, weights, found: pretrained.Pretrained):
  """Writes the forward pass and its parameters, for JAX alone or for ONNX Runtime."""
  smaller = merging.keep_smaller(weights)
  casting.check_finite(tree.flatten(smaller))
  # A forward pass keeps nothing for a backward pass.
  platforms = _PLATFORMS.value if _TO.value == "artifact" else ()
  how = dataclasses.replace(model_options.for_export(found.config, platforms), remat_policy=None)
  given = {
    "inputs": found.family.inputs(found.config, _ROWS.value, _LENGTH.value),
    "options": found.family.options(found.config),
    "tokenizer": found.tokenizer,
  }
  if _TO.value == "onnx" and how.scan_layers:  # ONNX Runtime fuses nothing across a loop's steps
    how, smaller = dataclasses.replace(how, scan_layers=False), layers.unstack_layers(smaller)
  apply = lora_jax.adapt(parts.make_model(how).apply)
  if _TO.value == "artifact":
    artifact.save(output, apply, smaller, platforms=platforms, **given)
    return
  tokens = found.config.vocab_size if found.family.has_tokenizer else 2
  error = onnx_program.save(output, apply, smaller, tokens=tokens, **given)
  print(f"ONNX Runtime's outputs differ by {error:.1e} of the largest")


def export_adapters(output, adapters, found: pretrained.Pretrained, axes, *, base_model: str):
  """Writes adapters without their base, for `peft` or for llama.cpp."""
  if _TO.value == "gguf":
    exchange.save_gguf(
      output, adapters, found.params, axes, config=found.config, dtype=_DTYPE.value or "float32"
    )
  else:
    if _RANK.value:
      adapters, lost = lora_jax.to_lora(adapters, found.params, rank=_RANK.value)
      worst = max(lost, key=lambda path: lost[path].max())
      print(f"of the change of a kernel at most {lost[worst].max():.2%} is lost ({worst})")
    exchange.save(
      output,
      adapters,
      found.params,
      axes,
      base_model=base_model,
      table=found.table,
      task_type=found.peft_task,
    )
  print(f"wrote the adapters of {len(adapters)} leaves to {output}, {size(output):,} bytes")


def size(path: pathlib.Path) -> int:
  """The bytes of a file, or of the files in a folder."""
  files = [path] if path.is_file() else path.iterdir()
  return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
  programs.run(main)
