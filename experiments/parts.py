"""What the main programs share: from a run's config to its data, its model and its adapter."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax
from lora_jax import compress, sharding, tree, weights
from lora_jax.compress import storage
from lora_jax.compress.quantize import quantize_leaf
from lora_jax.data import detokenise, examples, labels, records, splits, templates
from lora_jax.io import assets, pretrained
from lora_jax.models import llama
from lora_jax.train import progress, workdir

PyTree = Any

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
  "none": None,
  "everything": jax.checkpoint_policies.everything_saveable,
  "dots": lora_jax.products_saveable,
  "nothing": jax.checkpoint_policies.nothing_saveable,
}

# Adapters that are stored as what they make of the base, and not beside it.
_SAVED_WITH_BASE = (weights.Full, weights.TokenRows)


def open_run(path: str) -> tuple[workdir.Workdir, ConfigDict]:
  """A finished run: its folder and its config.

  Raises:
    FileNotFoundError: when the folder holds no run, or one that has not come to its end.
    ValueError: when it holds a sweep, or a compression.
  """
  run = workdir.Workdir(pathlib.Path(path))
  config = ConfigDict(workdir.read_config(path))
  if "steps" in config:
    raise ValueError(
      f"{path}: holds a compression and no run; its model is {run.path / 'model'}, and an adapter "
      "beside it becomes a run by experiments.import_adapter"
    )
  if (run.path / "members").exists():
    raise ValueError(
      f"{path}: holds a sweep, whose members are runs; use {run.path / 'members' / '0'} or another"
    )
  if not run.adapter.exists():
    raise FileNotFoundError(
      f"{run.adapter}: not there, so the run has not come to its end; start the same "
      "experiments.train command again to finish it"
    )
  return run, config


def load_records(data: ConfigDict) -> dict[str, list[records.Record]]:
  """`{split: records}` of a data config, with the templates checked against them.

  With a `data.test_source` the test split is that file, and no record of `data.source` has a text
  in common with it.

  Raises:
    ValueError: when the test split is to be both that file and a share of the other.
  """
  if data.test_source and data.test:
    raise ValueError(
      f"data.test {data.test} is a share of data.source, and data.test_source names a file for the "
      "test split; set one of them to 0 or to ''"
    )
  rows = _read_records(data, data.source)
  held_out = _read_records(data, data.test_source) if data.test_source else []
  if held_out:
    rows = splits.without(rows, held_out, data.split_by)
  shares = {name: data[name] for name in ("train", "validation", "test") if data[name]}
  found = splits.split(rows, data.split_by, shares)
  return found | {"test": held_out} if held_out else found


def _read_records(data: ConfigDict, source: str) -> list[records.Record]:
  rows = records.read(assets.resolve(source), format=data.format, columns=data.columns or None)
  rows = detokenise.detokenise_columns(rows, data.detokenise)
  if data.sign_of:
    rows = labels.sign_label(rows, data.sign_of, neutral=data.neutral)
  for name in ("prompt", "completion"):
    templates.check(data[name], rows, name)
  return rows


def pick(rows: Mapping[str, list[records.Record]], split: str, field: str) -> list[records.Record]:
  """The records of one split.

  Raises:
    ValueError: when the config has no such split, by the field that asks for it.
  """
  if split not in rows:
    raise ValueError(f"{field} {split!r} is no split of the data; there are {', '.join(rows)}")
  return rows[split]


def encode(data: ConfigDict, rows: list[records.Record], tokenizer) -> list[examples.Example]:
  """The tokenised examples of some records."""
  return examples.encode(
    rows,
    tokenizer,
    prompt=data.prompt,
    completion=data.completion,
    max_length=data.max_length,
    append_eos=data.append_eos,
  )


def inspect_model(model: ConfigDict) -> pretrained.Pretrained:
  """The base that a model config names, shapes in the place of its arrays.

  A compressed one is loaded for it.
  """
  if storage.is_compressed(model.source):
    found = _load_compressed(model)
    return dataclasses.replace(found, params=jax.eval_shape(lambda: found.params))
  if model.quantize != "none":
    raise ValueError(
      f"model.quantize {model.quantize}: a plan is of a base as it is stored in model.dtype; give "
      "--config.model.quantize=none, and take the difference of the base's bytes"
    )
  return pretrained.inspect(model.source, **_model_options(model))


def load_model(model: ConfigDict, mesh: Mesh | None = None) -> pretrained.Pretrained:
  """The base that a model config names; with a mesh, each part of it where it belongs there."""
  if storage.is_compressed(model.source):
    return _load_compressed(model, mesh)
  return pretrained.load(
    model.source,
    **_model_options(model),
    constrain=sharding.keep_rows(mesh) if mesh else None,
    **_quantization(model, mesh),
    watch=functools.partial(progress.watched, what="load", disable=jax.process_index() > 0),
  )


def load_source(source: str) -> pretrained.Pretrained:
  """A model without a config, in float32: a compressed one, or a dense one from wherever it is."""
  if storage.is_compressed(source):
    return storage.load(source)
  return pretrained.load(source, scan_layers=True)


def _load_compressed(model: ConfigDict, mesh: Mesh | None = None) -> pretrained.Pretrained:
  if model.quantize != "none":
    raise ValueError(
      f"model.quantize {model.quantize}: {model.source} is compressed already; quantise it by "
      "experiments.compress, as a step"
    )
  found = storage.load(
    model.source, **_model_options(model), constrain=sharding.keep_rows(mesh) if mesh else None
  )
  if not mesh:
    return found
  params = jax.device_put(found.params, lay_out(found.params, mesh).shardings)
  return dataclasses.replace(found, params=params)


def _quantization(model: ConfigDict, mesh: Mesh | None) -> dict[str, Any]:
  """How the base is quantised as it is loaded, a parameter at a time, and where it then lies.

  Raises:
    ValueError: for an unknown format, and as `lora_jax.match` does of the targets.
  """
  if model.quantize == "gguf":
    return {"keep_blocks": weights.GGUFBlocks.of}
  laid_out = {"shardings": (lambda shapes: lay_out(shapes, mesh).shardings) if mesh else None}
  if model.quantize == "none":
    return laid_out
  if model.quantize not in compress.FORMATS:
    known = ", ".join(["none", *compress.FORMATS, "gguf"])
    raise ValueError(f"model.quantize {model.quantize!r} is unknown; use {known}")
  shapes = pretrained.inspect(model.source, **_model_options(model))
  axes = trace_axes(llama.Llama(shapes.config), shapes.params)
  format = compress.FORMATS[model.quantize]
  formats = lora_jax.match(shapes.params, [(x, format) for x in model.quantize_targets], axes)

  def each(path: str, array: jax.Array) -> Any:
    return quantize_leaf(path, array, formats[path], axes) if path in formats else array

  return laid_out | {"each": each}


def _model_options(model: ConfigDict) -> dict[str, Any]:
  if model.remat not in REMAT_POLICIES:
    raise ValueError(f"model.remat {model.remat!r} is unknown; use {', '.join(REMAT_POLICIES)}")
  return {
    "dtype": jnp.dtype(model.dtype),
    "scan_layers": model.scan_layers,
    "remat_policy": REMAT_POLICIES[model.remat],
  }


def lay_out(params: PyTree, mesh: Mesh) -> sharding.Layout:
  """Where a Llama, with or without adapters, lies on a mesh."""
  return sharding.lay_out(params, mesh, sharding.LLAMA_RULES)


def check_numbers(config: ConfigDict) -> None:
  """Raises ValueError for numbers of a config that no run can have."""
  least = {
    "seed": 0, "train.steps": 1, "train.batch_size": 1, "train.accumulate": 1, "train.keep": 1,
    "train.log_every": 1, "train.checkpoint_every": 1, "train.evaluate_every": 0,
    "train.loss_chunk": 0, "evaluation.batch_size": 1, "evaluation.examples": 0,
    "evaluation.samples": 0,
  }  # fmt: skip
  for field, value in least.items():
    section, _, name = field.rpartition(".")
    found = (config[section] if section else config)[name]
    if found < value:
      raise ValueError(f"{field} is {found}; it must be {value} or more")


def check_rows(config: ConfigDict, shares: int) -> None:
  """Raises ValueError when devices that batches are shared out over cannot have equal parts."""
  rows, accumulate = config.train.batch_size, config.train.accumulate
  if rows % (shares * accumulate):
    raise ValueError(
      f"train.batch_size {rows} is no multiple of {shares} devices on data and fsdp times "
      f"train.accumulate {accumulate}; use one, or a mesh with more devices on tensor"
    )
  if config.evaluation.batch_size % shares:
    raise ValueError(
      f"evaluation.batch_size {config.evaluation.batch_size} is no multiple of {shares} devices on "
      "data and fsdp; use one, or a mesh with more devices on tensor"
    )


def process_rows(config: ConfigDict, mesh: Mesh) -> dict[str, int]:
  """Which rows of every batch this process reads, as the datasets take it.

  Raises:
    ValueError: when a batch of the config cannot be shared out over the mesh, or cut into parts.
  """
  check_rows(config, mesh.shape["data"] * mesh.shape["fsdp"])
  rows = {
    "train.batch_size": config.train.batch_size,
    "evaluation.batch_size": config.evaluation.batch_size,
  }
  for field, count in rows.items():
    shard_index, shard_count = sharding.process_rows(mesh, count, field)
  return {"shard_index": shard_index, "shard_count": shard_count}


def gather(adapters: Mapping[str, lora_jax.Adapted], params: PyTree) -> tuple:
  """The adapters, and the base with those of its leaves that are saved with them, as numpy arrays
  that are whole on every process."""
  leaves = tree.flatten(params)
  saved = {path: leaves[path] for path, x in adapters.items() if isinstance(x, _SAVED_WITH_BASE)}
  adapters, saved = sharding.gather((dict(adapters), saved))
  return adapters, tree.replace(params, saved)


def trace_axes(model: llama.Llama, params: PyTree) -> dict[str, lora_jax.Axes]:
  """The roles of the axes of every parameter, by tracing one short call."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(weights.materialize, params)  # of a compressed model as of a dense one
  return lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), shapes, tokens)


def describe(metrics: Mapping[str, float]) -> str:
  """One line of evaluation metrics for people."""
  accuracy = f"accuracy {metrics['accuracy']:.1%}, " if "accuracy" in metrics else ""
  return f"{accuracy}loss {metrics['loss']:.3f} on {metrics['rows']} examples"
