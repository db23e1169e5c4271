"""Shared parts of the main programs: from a run's config to its data, model and adapter."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax
from experiments import config_checks, field_rules, model_options
from lora_jax import checks, compress, families, new_tokens, sharding, tasks, tree, weights
from lora_jax.compress import storage
from lora_jax.compress.quantization import quantize_leaf
from lora_jax.data import records, splits
from lora_jax.io import assets, pretrained
from lora_jax.run import progress, workdir
from lora_jax.tasks import tables

PyTree = Any

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
  "none": None,
  "everything": jax.checkpoint_policies.everything_saveable,
  "dots": lora_jax.products_saveable,
  "nothing": jax.checkpoint_policies.nothing_saveable,
}

# The task of earlier runs, whose configs do not name one.
_BEFORE_THE_TASK = {"name": "completion"}

# Folded into the run's seed, which the adapters use as it is.
_OF_THE_TASK = 1

# Adapters that are stored as modified leaves of the base, rather than alongside it.
_SAVED_WITH_BASE = (weights.Full, weights.TokenRows)


def open_run(
  path: str, rules: Mapping[str, field_rules.Rule] = config_checks.FINISHED
) -> tuple[workdir.Workdir, ConfigDict]:
  """A finished run: its folder and its config, whose fields are checked by the rules.

  Raises:
    FileNotFoundError: when the folder holds no run, or one that has not come to its end.
    PermissionError: when its config may not be read.
    ValueError: when it holds a sweep, or a compression, or its config is damaged.
  """
  run = workdir.Workdir(pathlib.Path(path).expanduser())
  found = workdir.read_config(path)
  try:
    config = ConfigDict(found)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{run.config}: is no config ({error}); restore it") from None
  if "steps" in config:
    raise ValueError(
      f"{path}: holds a compression and no run; its model is {run.path / 'model'}, and an adapter "
      "alongside it becomes a run by experiments.import_adapter"
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
  try:
    config_checks.check(config, rules, may_lack=config_checks.ADDED_LATER)
    if rules is config_checks.FINISHED:
      config_checks.check_task(config)
  except ValueError as error:
    raise ValueError(f"{run.config}: {error}; restore it") from None
  return run, config


def go_on(batches: Any, data_state: Mapping[str, Any], checkpoint: pathlib.Path) -> None:
  """Puts an iterator of batches where a checkpoint says.

  Raises:
    ValueError: when the checkpoint has no position of such batches.
  """
  kinds = {name: type(value) for name, value in batches.get_state().items()}
  try:
    if kinds != {name: type(value) for name, value in data_state.items()}:
      raise ValueError
    batches.set_state(dict(data_state))
  except (IndexError, KeyError, TypeError, ValueError):
    raise ValueError(
      f"{checkpoint}: {checks.shown(dict(data_state))} is no position of these data; delete this "
      "checkpoint, and the same command goes on from the one before it"
    ) from None


def make_task(config: ConfigDict) -> tasks.Task:
  """The task of a whole config; runs from before there were others name none.

  Raises:
    ValueError: as `lora_jax.tasks.make` does.
  """
  section = config.task if "task" in config else _BEFORE_THE_TASK
  chunk = config.train.loss_chunk
  # auto is resolved once the model and the examples are known.
  chunk = 0 if chunk == model_options.AUTO else chunk
  return tasks.make(section, config.data, loss_chunk=chunk)


def load_records(data: ConfigDict, task: tasks.Task) -> dict[str, list[records.Record]]:
  """`{split: records}` of a data config, checked for the task.

  With a `data.test_source` the test split is that file, and no record of `data.source` has a text
  in common with it. The records of several files follow each other.

  Raises:
    ValueError: when the test split is to be both that file and a fraction of the other.
  """
  if data.test_source and data.test:
    raise ValueError(
      f"data.test {data.test} is a fraction of data.source, and data.test_source names a file for "
      "the test split; set one of them to 0 or to ''"
    )
  rows = _read_records(data, data.source, task, held_out=False)
  held_out = _read_records(data, data.test_source, task, held_out=True)
  if held_out:
    rows = splits.without(rows, held_out, data.split_by)
  shares = {name: data[name] for name in ("train", "validation", "test") if data[name]}
  found = splits.split(rows, data.split_by, shares)
  return found | {"test": held_out} if held_out else found


def addresses(source: str | Sequence[str]) -> tuple[str, ...]:
  """The addresses of a field that holds one, several, or "" for none."""
  return tuple(filter(None, (source,) if isinstance(source, str) else source))


def _read_records(
  data: ConfigDict, sources: str | Sequence[str], task: tasks.Task, *, held_out: bool
) -> list[records.Record]:
  return [row for source in addresses(sources) for row in _read_file(data, source, task, held_out)]


def _read_file(
  data: ConfigDict, source: str, task: tasks.Task, held_out: bool
) -> list[records.Record]:
  rows = task.open(assets.resolve(source), data, held_out=held_out)
  try:
    # Before records are left out, so that their numbers are those in the file.
    rows, words = task.read(rows)
    rows = task.derive(rows, data)
    task.check(rows)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None
  if words:
    print(f"{source}: {words}")
  return rows


def read_file(section: ConfigDict, source: str) -> list[records.Record]:
  """The records of one file of text, as `lora_jax.tasks.tables.read` reads it."""
  return tables.read(assets.resolve(source), section)


def pick(rows: Mapping[str, list[records.Record]], split: str, field: str) -> list[records.Record]:
  """The records of one split.

  Raises:
    ValueError: when the config has no such split, or none is in it, by the field that asks for it.
  """
  if split not in rows:
    raise ValueError(f"{field} {split!r} is no split of the data; there are {', '.join(rows)}")
  if not rows[split]:
    raise ValueError(
      f"{field} {split!r}: no record is in it; records that agree in data.split_by stay together, "
      "and there are too few that differ for all the splits; add some, or name a file in "
      "data.test_source"
    )
  return rows[split]


def inspect_model(model: ConfigDict) -> pretrained.Pretrained:
  """The base that a model config names, with shapes instead of arrays.

  A compressed one is loaded for it: what its parameters are made of is in its tensors.
  """
  if storage.is_compressed(model.source):
    return shapes_of(model)
  if model.quantize == "gguf":
    raise ValueError(
      "model.quantize gguf: a plan reads no tensors, and how each of the file is quantized stands "
      "with it; plan int8 or nf4 instead, whose values take 8 and 4.2 bits"
    )
  found = read_shapes(model)
  if each := _quantization(model, None).get("each"):
    found = dataclasses.replace(found, params=tree.map_with_path(each, found.params))
  return found


def shapes_of(model: ConfigDict) -> pretrained.Pretrained:
  """The base that a model config names, before any quantization, with shapes instead of arrays.

  A compressed one is loaded for it.
  """
  if not storage.is_compressed(model.source):
    return read_shapes(model)
  found = load_model(model)
  return dataclasses.replace(found, params=jax.eval_shape(lambda: found.params))


def read_shapes(model: ConfigDict) -> pretrained.Pretrained:
  """The base before any compression, with shapes instead of arrays: none of them is read."""
  inspect = storage.inspect if storage.is_compressed(model.source) else pretrained.inspect
  found = inspect(model.source, **_model_options(model))
  found = model_options.for_device(model_options.with_attention(found, model))
  return new_tokens.add(found, new_tokens_of(model))


def new_tokens_of(model: ConfigDict) -> tuple[str, ...]:
  """The texts that become tokens of the base; of a run before there was the field, none."""
  return tuple(model.new_tokens) if "new_tokens" in model else ()


def load_model(model: ConfigDict, mesh: Mesh | None = None) -> pretrained.Pretrained:
  """The base that a model config names; with a mesh, each part of it where it belongs there."""
  if storage.is_compressed(model.source):
    found = _load_compressed(model, mesh)
  else:
    found = pretrained.load(
      model.source,
      **_model_options(model),
      constrain=sharding.keep_rows(mesh) if mesh else None,
      **_quantization(model, mesh),
      watch=functools.partial(progress.watched, what="load", disable=jax.process_index() > 0),
    )
  found = model_options.for_device(model_options.with_attention(found, model, mesh))
  if not new_tokens_of(model):
    return found
  found = new_tokens.add(found, new_tokens_of(model))
  return _laid_out(found, mesh) if mesh else found


def extend(
  found: pretrained.Pretrained, task: tasks.Task, config: ConfigDict
) -> pretrained.Pretrained:
  """A run's base with the leaves that its task adds, which start from the run's seed."""
  return task.extend(found, jax.random.fold_in(jax.random.key(config.seed), _OF_THE_TASK))


def task_of_model(task: tasks.Task, config: ConfigDict) -> tasks.Task:
  """The task on a run's base. Reads the base's configuration and tokenizer only."""
  return task.of_model(extend(read_shapes(config.model), task, config))


def inspect_source(source: str) -> pretrained.Pretrained:
  """The result of `load_source`, with shapes instead of arrays: none of them is read."""
  if storage.is_compressed(source):
    return storage.inspect(source)
  return pretrained.inspect(source, scan_layers=None)


def load_source(source: str) -> pretrained.Pretrained:
  """A model without a config, in float32: a compressed one, or a dense one from wherever it is."""
  if storage.is_compressed(source):
    return storage.load(source)
  return pretrained.load(source, scan_layers=None)


def check_writes(found: pretrained.Pretrained, instead: str) -> None:
  """Raises ValueError for a model that writes no texts; shapes are enough for it. `instead` is
  the remedy."""
  if found.family.init_cache is None:
    raise ValueError(f"{found.source}: a {found.config.family!r} generates no text; {instead}")


def _load_compressed(model: ConfigDict, mesh: Mesh | None = None) -> pretrained.Pretrained:
  if model.quantize != "none":
    raise ValueError(
      f"model.quantize {model.quantize}: {model.source} is compressed already; quantize it by "
      "experiments.compress, as a step"
    )
  found = storage.load(
    model.source, **_model_options(model), constrain=sharding.keep_rows(mesh) if mesh else None
  )
  return _laid_out(found, mesh) if mesh else found


def _laid_out(found: pretrained.Pretrained, mesh: Mesh) -> pretrained.Pretrained:
  params = jax.device_put(found.params, lay_out(found.params, found.config, mesh).shardings)
  return dataclasses.replace(found, params=params)


def _quantization(model: ConfigDict, mesh: Mesh | None) -> dict[str, Any]:
  """How the base is quantized as it is loaded, a parameter at a time, and where it then lies.

  Raises:
    ValueError: for an unknown format, and as `lora_jax.match` does of the targets.
  """
  if model.quantize == "gguf":
    return {"keep_blocks": weights.GGUFBlocks.of}

  def shardings(shapes: PyTree, rules: families.Rules) -> PyTree:
    return sharding.lay_out(shapes, mesh, rules).shardings

  laid_out = {"shardings": shardings if mesh else None}
  if model.quantize == "none":
    return laid_out
  if model.quantize not in compress.FORMATS:
    known = ", ".join(["none", *compress.FORMATS, "gguf"])
    raise ValueError(f"model.quantize {model.quantize!r} is unknown; use {known}")
  shapes = pretrained.inspect(model.source, **_model_options(model))
  axes = trace_axes(make_model(shapes.config), shapes.params)
  format = compress.FORMATS[model.quantize]
  formats = lora_jax.match(shapes.params, [(x, format) for x in model.quantize_targets], axes)

  def each(path: str, array: jax.Array) -> Any:
    return quantize_leaf(path, array, formats[path], axes) if path in formats else array

  return laid_out | {"each": each}


def _model_options(model: ConfigDict) -> dict[str, Any]:
  if model.remat not in (model_options.AUTO, *REMAT_POLICIES):
    known = ", ".join([model_options.AUTO, *REMAT_POLICIES])
    raise ValueError(f"model.remat {model.remat!r} is unknown; use {known}")
  return {
    "dtype": jnp.dtype(model.dtype),
    "scan_layers": model.scan_layers,
    "remat_policy": REMAT_POLICIES.get(model.remat),  # auto: none, until it is chosen
  }


def lay_out(params: PyTree, config: families.Config, mesh: Mesh) -> sharding.Layout:
  """Where a model, with or without adapters, lies on a mesh."""
  return sharding.lay_out(params, mesh, families.family_of(config).sharding)


def check_rows(config: ConfigDict, shares: int) -> None:
  """Raises ValueError when batches cannot be sharded equally over the devices."""
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
    ValueError: when a batch of the config cannot be sharded over the mesh, or cut into parts.
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
  leaves = tree.flatten(params, is_leaf=weights.is_weight)
  saved = {path: leaves[path] for path, x in adapters.items() if isinstance(x, _SAVED_WITH_BASE)}
  adapters, saved = sharding.gather((dict(adapters), saved))
  return adapters, tree.map_with_path(
    lambda path, leaf: saved.get(path, leaf), params, is_leaf=weights.is_weight
  )


def make_model(config: families.Config) -> nn.Module:
  """The module of a model's config."""
  return families.family_of(config).make_model(config)


def trace_axes(model: nn.Module, params: PyTree) -> dict[str, lora_jax.Axes]:
  """The roles of the axes of every parameter, by tracing one short call."""
  model = make_model(model_options.traceable(model.config))
  inputs = families.family_of(model.config).example_inputs(model.config)
  shapes = jax.eval_shape(weights.materialize, params)  # of a compressed model as of a dense one
  return lora_jax.trace_axes(
    lambda p, *inputs: model.apply({"params": p}, *inputs), shapes, *inputs
  )
