"""Prepares a training: reads and checks its data, model and targets.

case = prepare(config, configs, run)       # a run has one config of a member, a sweep several
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import grain
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax
from experiments import (
  config_checks,
  defaults,
  inputs,
  methods,
  model_options,
  parts,
  planning,
  processes,
  samples,
  teachers,
)
from lora_jax import sharding
from lora_jax.compress import storage
from lora_jax.io.pretrained import Pretrained
from lora_jax.run import progress, workdir
from lora_jax.tasks import Task
from lora_jax.train import evaluation

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A training, before anything of it is computed.

  Attributes:
    config: of the run.
    configs: of its members, as of a run of each; of a run that is no sweep, its own.
    mesh: of the run.
    task: on the model.
    loaded: the model before the task added its leaves. All other arrays are those of `base`.
    base: the model; its parameters are the base.
    model: the module.
    axes: the roles of the axes of the base.
    specs: of each member, what is adapted and how.
    tables: of each member, the table of what trains.
    learning_rates: of each member.
    examples: to train on.
    eval_data, validation_data: batches of a pass; the latter None where there is none to do.
    chosen: the held-out examples that people are shown.
    described: what is kept of the examples' lengths.
    own_rows: which rows of every batch this process reads.
    how: lines on how it is computed, for people.
  """

  config: ConfigDict
  configs: Sequence[ConfigDict]
  mesh: Mesh
  task: Task
  loaded: Pretrained
  base: Pretrained
  model: nn.Module
  axes: Mapping[str, lora_jax.Axes]
  specs: Sequence[Mapping[str, Any]]
  tables: Sequence[str]
  learning_rates: Sequence[optax.Schedule]
  examples: Sequence[Any]
  eval_data: grain.MapDataset
  validation_data: grain.MapDataset | None
  chosen: Sequence[Any]
  described: Mapping[str, Any]
  own_rows: Mapping[str, int]
  how: Sequence[str]

  @property
  def quiet(self) -> bool:
    """Whether this process shows no progress."""
    return not processes.is_first()

  @property
  def evaluate_every(self) -> int:
    """The steps between validations; 0 where there is nothing to validate on."""
    return 0 if self.validation_data is None else self.config.train.evaluate_every

  @property
  def forward(self) -> Callable:
    """The function that is adapted."""
    return self.task.forward(self.model)

  @property
  def table(self) -> Mapping[str, str | None]:
    """The tensor names of adapters."""
    return self.base.table

  def train_batches(self, seed: int, **rows: int) -> grain.MapDataset:
    """The training batches by a seed, or some rows of each."""
    return self.task.train_batches(self.examples, self.config.train.batch_size, seed=seed, **rows)

  def iterate(self, batches: grain.MapDataset, axis: int = 0) -> grain.DatasetIterator:
    """Batches that another thread makes and puts on the devices, some steps ahead.

    axis: that of the rows.
    """
    put_rows = functools.partial(sharding.put_rows, mesh=self.mesh, axis=axis)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(batches.map(put_rows).to_iter_dataset(options))

  def evaluate(
    self, eval_step: Callable, weights: PyTree, data: grain.MapDataset, what: str, **bar: Any
  ) -> dict[str, float]:
    """The figures of weights on batches, with a bar of progress."""
    shown = progress.watched(
      data,
      what,
      compiled=set(),
      shape_of=self.task.shape_of,
      unit=self.task.UNIT,
      disable=self.quiet,
      **bar,
    )
    return evaluation.evaluate(eval_step, weights, shown, self.task.metrics)


def prepare(config: ConfigDict, configs: Sequence[ConfigDict], run: workdir.Workdir) -> Case:
  """Reads and checks what a training needs.

  Errors are found before the model is loaded or, if they depend on the model's shapes, before
  anything is computed.
  """
  for each in configs:
    config_checks.check_run(each)
  task = parts.make_task(config)
  mesh = sharding.make_mesh(**config.mesh)
  own_rows = parts.process_rows(config, mesh)
  rules = [methods.all_rules(each.adapter, task) for each in configs]
  teachers.check(config, task)
  methods.merge_format(config)
  learning_rates = [methods.make_optimizer(each)[1] for each in configs]
  stage = functools.partial(progress.stage, disable=not processes.is_first())
  with stage("look for changes of what is read"):
    if processes.is_first():
      workdir.settle_inputs(run, inputs.of_run(config))
  with stage("read the data"):
    records = parts.load_records(config.data, task)
  train_records = parts.pick(records, "train", "data.train")
  held_out_records = parts.pick(records, config.evaluation.split, "evaluation.split")
  validation_records = []
  if config.train.evaluate_every and records.get("validation", True):
    validation_records = parts.pick(records, "validation", "train.evaluate_every")
  elif config.train.evaluate_every:
    print("validation: left out, for there are too few different records to hold some out for it")
  shapes = parts.read_shapes(config.model)
  how = [model_options.attention_line(shapes.config, config.data)]
  with stage("make the examples"):
    # Before the weights are loaded, for a record may still be refused.
    task = task.of_model(parts.extend(shapes, task, config))
    examples = task.examples(train_records)
    held_out = task.examples(held_out_records)[: config.evaluation.examples or None]
    validation = task.examples(validation_records) if validation_records else []
  described = task.describe(training=examples, held_out=held_out)
  print(f"data: {len(examples):,} to train on, {len(held_out):,} held out")
  with stage("choose what the forward pass keeps"):
    settings, line = _settings(config, task, shapes, examples, mesh)
  config, task = settings.applied(config), settings.of_task(task)
  how = [each for each in (*how, line) if each]
  print("\n".join([*task.lines(described), *how]))

  loaded = parts.load_model(config.model, mesh)
  base = settings.of_model(parts.extend(loaded, task, config))
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  specs = [methods.specs_of(base, config.model, each, axes) for each in rules]
  base = model_options.for_dropout(base, specs)

  def one_pass(examples: Sequence[Any]) -> grain.MapDataset:
    found = task.eval_batches(examples, config.evaluation.batch_size, **own_rows)
    return found.map(functools.partial(sharding.put_rows, mesh=mesh))

  return Case(
    config=config,
    configs=configs,
    mesh=mesh,
    task=task,
    loaded=loaded,
    base=base,
    model=parts.make_model(base.config),
    axes=axes,
    specs=specs,
    tables=[str(lora_jax.summary(base.params, each, axes)) for each in specs],
    learning_rates=learning_rates,
    examples=examples,
    eval_data=one_pass(held_out),
    validation_data=one_pass(validation) if validation else None,
    chosen=samples.choose(held_out, config.evaluation.samples),
    described=described,
    own_rows=own_rows,
    how=how,
  )


def _settings(
  config: ConfigDict,
  task: Task,
  base: Pretrained,
  examples: Sequence[Any],
  mesh: Mesh,
) -> tuple[defaults.Settings, str]:
  """The settings of a training, and a line about them; `base` has dense shapes."""
  member, count = planning.largest_member(config)

  def make_case() -> planning.Case:
    is_known = storage.is_compressed(config.model.source) or config.model.quantize == "gguf"
    found = base if is_known else parts.inspect_model(config.model)
    found = parts.extend(found, task, config)
    axes = parts.trace_axes(parts.make_model(found.config), found.params)
    specs = methods.specs_of(found, config.model, methods.all_rules(member.adapter, task), axes)
    return planning.make_case(member, task, found, axes, specs, examples)

  bound = None
  if defaults.is_asked(config):
    batch = task.batch_of(
      max(task.summary(examples, config.train.batch_size)["shapes"]), config.train.batch_size
    )
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    bound = defaults.bound_of(config, base.config, base.params, batch, shares)
  return defaults.choose(
    member,
    make_case,
    mesh,
    planning.own_memory(),
    members=count,
    bound=bound,
    agree=processes.agree,
  )
