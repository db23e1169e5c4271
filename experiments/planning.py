"""A run's step from shapes alone, for any mesh: what `lora_jax.train.plan` and a compiler take.

case = read(config)                              # no weight is loaded
planned = make_plan(config, case, abstract_mesh(config.mesh, 8))
run = whole_run(config, case, mesh)              # run.train_step.lower(run.state, …)
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

import lora_jax
from experiments import config_checks, methods, model_options, parts, sweep_config, teachers
from lora_jax import families, sharding
from lora_jax.io import pretrained
from lora_jax.tasks import Task
from lora_jax.train import plan, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A config's model and data, as far as a plan needs them.

  Attributes:
    task: on the model.
    model: the configuration of the base.
    params: the base, shapes alone.
    axes: the roles of its axes.
    specs: what is adapted, and how.
    adapters: `{path: adapter}`, shapes alone.
    data: the summary of a pass over the task's examples.
    lines: about the examples, for people.
  """

  task: Task
  model: families.Config
  params: plan.PyTree
  axes: Mapping[str, lora_jax.Axes]
  specs: Mapping[str, lora_jax.adapters.Method]
  adapters: Mapping[str, lora_jax.Adapted]
  data: Mapping
  lines: Sequence[str]

  def with_model(self, model: families.Config) -> "Case":
    """The case of a model that computes otherwise."""
    return dataclasses.replace(self, model=model)

  @property
  def weights(self) -> plan.PyTree:
    return lora_jax.attach(self.params, self.adapters)

  @property
  def largest(self) -> Any:
    """The shape of the largest batch."""
    return max(self.data["shapes"])


def largest_member(config: ConfigDict) -> tuple[ConfigDict, int]:
  """The config of the member of a sweep that has the largest rank, and how many members there are;
  of a single run its own."""
  if not sweep_config.is_sweep(config):
    return config, 1
  configs = sweep_config.member_configs(config, sweep_config.list_members(config))
  ranks = [each.adapter.rank if "rank" in each.adapter else 0 for each in configs]
  return configs[ranks.index(max(ranks))], len(configs)


def read(config: ConfigDict) -> Case:
  """Reads what a config names, without a weight.

  Raises the errors of training with the config, as far as they are known without weights.
  """
  if teachers.is_taught(config):
    raise ValueError(
      "a plan is of one model; give --config.distill.teacher=none, and add the teacher's bytes and "
      "the FLOPs of its forward pass"
    )
  config_checks.check_run(config)
  task = parts.make_task(config)
  rules = methods.all_rules(config.adapter, task)
  records = parts.pick(parts.load_records(config.data, task), "train", "data.train")
  base = parts.extend(parts.inspect_model(config.model), task, config)
  task = task.of_model(base)
  examples = task.examples(records)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  specs = methods.specs_of(base, config.model, rules, axes)
  return make_case(config, task, base, axes, specs, examples)


def make_case(
  config: ConfigDict,
  task: Task,
  base: pretrained.Pretrained,
  axes: Mapping[str, lora_jax.Axes],
  specs: Mapping[str, lora_jax.adapters.Method],
  examples: Sequence[Any],
) -> Case:
  """The case of a run whose model and examples are known; of the model the shapes are enough."""
  base = model_options.for_dropout(base, [specs])
  params = methods.shapes_of_base(config.adapter, base.params, specs, axes)
  adapters = methods.init_shapes(params, specs, axes)
  return Case(
    task=task,
    model=base.config,
    params=params,
    axes=axes,
    specs=specs,
    adapters=adapters,
    data=task.summary(examples, config.train.batch_size),
    lines=task.lines(task.describe(training=examples)),
  )


def make_plan(config: ConfigDict, case: Case, mesh: Mesh | AbstractMesh) -> plan.Plan:
  """The needs of one device, by tracing."""
  return plan.make_plan(whole_run(config, case, mesh), share_of_a_device(config, case, mesh))


def abstract_mesh(sizes: Mapping[str, int], devices: int | None) -> AbstractMesh:
  """The mesh of a config without its devices.

  Args:
    sizes: as `lora_jax.sharding.make_mesh` takes them.
    devices: how many there are to be; None for as many as are here.

  Raises:
    ValueError: when the sizes do not fit them.
  """
  fixed = math.prod(size for size in sizes.values() if size != -1)
  count = devices or (jax.device_count() if -1 in sizes.values() else fixed)
  shape = tuple(count // fixed if sizes[name] == -1 else sizes[name] for name in sharding.AXES)
  if min(shape) < 1 or math.prod(shape) != count:
    asked = ", ".join(f"{name}={sizes[name]}" for name in sharding.AXES)
    raise ValueError(f"config.mesh {asked} does not fit {count} devices; see --devices")
  return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def whole_run(config: ConfigDict, case: Case, mesh: Mesh | AbstractMesh) -> plan.Run:
  """The training step of all devices; its arrays say how they lie on the mesh."""
  tx, _ = methods.make_optimizer(config)
  model = case.model
  if isinstance(mesh, Mesh):
    model = dataclasses.replace(model, constrain=sharding.keep_rows(mesh))
    model = model_options.on_mesh(model, mesh)
  layout = parts.lay_out(case.weights, model, mesh)
  trainable, frozen = _split(placed(case.weights, layout.shardings))
  state = jax.eval_shape(lambda trainable: step.init_state(trainable, tx), trainable)
  places = layout.follow(state)
  apply = methods.make_apply(
    config, case.task.forward(parts.make_model(model)), case.params, case.axes
  )
  train_step = methods.make_train_step(
    config, case.task, apply, tx, case.adapters, places if isinstance(mesh, Mesh) else None
  )
  batch = case.task.batch_of(case.largest, config.train.batch_size)
  rows = jax.tree.map(lambda _: NamedSharding(mesh, sharding.ROWS), batch)
  return plan.Run(train_step, placed(state, places), frozen, placed(batch, rows))


def smaller_model(model: families.Config, count: int) -> families.Config:
  """The model with the heads, the width of the MLP and the vocabulary of one of `count` devices."""
  heads = [x for x in ("num_heads", "num_kv_heads", "full_kv_heads") if hasattr(model, x)]
  cuts_heads = all(getattr(model, x) % count == 0 for x in heads)
  sizes = (*(heads if cuts_heads else ()), "mlp_width", "vocab_size", "per_layer_vocab")
  fields = [x for x in sizes if (size := getattr(model, x, None)) and size % count == 0]
  changes = {x: getattr(model, x) // count for x in fields}
  experts = getattr(model, "experts", None)
  if experts and experts.width % count == 0:
    changes["experts"] = dataclasses.replace(experts, width=experts.width // count)
  return dataclasses.replace(model, **changes)


def _cuts(model: families.Config, smaller: families.Config) -> sharding.Rules:
  """Rules that cut the leaves of a model to the shapes of a smaller one.

  The rules of its family are not enough. They replicate biases, attention sinks and the norms of
  all heads together, and the smaller model has a part of each.
  """
  if model == smaller:
    return ((".*", jax.P()),)
  shapes = families.param_shapes(smaller)
  rules = []
  for path, shape in families.param_shapes(model).items():
    cut = [None if x == y else "tensor" for x, y in zip(shape, shapes[path], strict=True)]
    rules.append((re.escape(path), jax.P(*cut)))
  return (*rules, (".*", jax.P()))  # a head of classes, for example, is whole


def share_of_a_device(config: ConfigDict, case: Case, mesh: Mesh | AbstractMesh) -> plan.Run:
  """The step as one device computes it: a smaller model, on its part of the rows.

  Over `tensor` a device has some of the heads, of the width of the MLP and of the vocabulary; what
  is cut over `fsdp` it gathers where it is used.
  """
  tx, _ = methods.make_optimizer(config)
  count = mesh.shape["tensor"]
  model = smaller_model(case.model, count)
  alone = AbstractMesh((1, 1, count), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  layout = sharding.lay_out(case.weights, alone, _cuts(case.model, model))
  weights = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(place.shard_shape(x.shape), x.dtype),
    case.weights,
    layout.shardings,
  )
  trainable, frozen = _split(weights)
  state = jax.eval_shape(lambda trainable: step.init_state(trainable, tx), trainable)
  apply = methods.make_apply(
    config, case.task.forward(parts.make_model(model)), case.params, case.axes
  )
  train_step = methods.make_train_step(config, case.task, apply, tx, case.adapters)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  parts.check_rows(config, shares)
  return plan.Run(
    train_step, state, frozen, case.task.batch_of(case.largest, config.train.batch_size // shares)
  )


def _split(weights: plan.PyTree) -> tuple[plan.PyTree, plan.PyTree]:
  return lora_jax.partition(weights, lora_jax.trainable_mask(weights))


def placed(tree: plan.PyTree, shardings: plan.PyTree) -> plan.PyTree:
  """Returns the shapes of a tree, which say how each array lies on the devices."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
  )


def own_memory() -> int:
  """Bytes of a device here; CPU devices share the machine's."""
  statistics = jax.local_devices()[0].memory_stats()
  if statistics and "bytes_limit" in statistics:
    return statistics["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
