r"""What a run will need, before a weight is loaded: parameters, arithmetic, memory, and if it fits.

    python -m experiments.plan --config=configs/quickstart.py
    python -m experiments.plan --config=configs/quickstart.py --config.train.batch_size=256 \
        --config.mesh.fsdp=8 --device_memory=16GB

Of the model its configuration and its tokenizer are read, of the data the lengths of its examples;
the rest is traced from shapes, for a mesh of any size, whatever devices are here. The figures are
those of the largest batch. The memory is an estimate, see `lora_jax.cost`; where it matters,
`--compile=here` has XLA compile the step, which is slow, and prints what it reports beside it, and
`--compile=v5e:2x4` does so for a TPU slice of that shape (with `libtpu` installed; no TPU needed).
Of a sweep the largest member is planned, and taken as often as there are members.

XLA's CPU compiler is unlike the others in two things, which the estimate leaves out: it computes
bfloat16 in float32, and it undoes rematerialisation between layers that are not scanned.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict, config_flags

import lora_jax
from experiments import config_checks, methods, parts, programs, sweep_config, teachers
from lora_jax import families, sharding
from lora_jax.tasks import Task
from lora_jax.train import members, plan, step

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_DEVICES = flags.DEFINE_integer("devices", None, "Devices that -1 in config.mesh shares out.", 1)
_MEMORY = flags.DEFINE_string("device_memory", None, "Of one device, as in 16GB; of those here.")
_COMPILE = flags.DEFINE_string("compile", "", "Where to compile the step: here, or a TPU slice.")

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  config, count = largest_member(_CONFIG.value)
  if count > 1 and _COMPILE.value:
    raise ValueError(
      "--compile is for one run; give --config.sweep.grid='()' --config.sweep.members='()' as well"
    )
  memory = parse_memory(_MEMORY.value) if _MEMORY.value else own_memory()
  mesh = abstract_mesh(config.mesh, _DEVICES.value)
  case = read(config)
  print(describe_data(config, case))
  print(lora_jax.summary(case.params, case.specs, case.axes))
  planned = plan.make_plan(whole_run(config, case, mesh), share_of_a_device(config, case, mesh))
  if count > 1:
    planned = planned.of_members(count, in_turn=members.in_turn(case.axes))
    print(f"This is the largest of {count} members; together, on one base, they need:")
  print(f"\n{planned}\n{verdict(planned, memory, mesh)}")
  if _COMPILE.value:
    print(compile_step(config, case, mesh, planned, _COMPILE.value))


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
  parts.make_task(config).check_stackable()
  configs = sweep_config.member_configs(config, sweep_config.list_members(config))
  ranks = [each.adapter.rank if "rank" in each.adapter else 0 for each in configs]
  return configs[ranks.index(max(ranks))], len(configs)


def read(config: ConfigDict) -> Case:
  """Reads what a config names, without a weight.

  Raises what training with the config would, as far as it can be told.
  """
  if config.adapter.method == "loftq":
    raise ValueError(
      "a plan is of a base as it is stored in model.dtype, and LoftQ makes another; plan LoRA, and "
      "take the difference of the base's bytes"
    )
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
  adapters = jax.eval_shape(
    lambda key, params: lora_jax.init(key, params, specs, axes), jax.random.key(0), base.params
  )
  return Case(
    task=task, model=base.config, params=base.params, axes=axes, specs=specs, adapters=adapters,
    data=task.summary(examples, config.train.batch_size),
    lines=task.lines(task.describe(training=examples)),
  )  # fmt: skip


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
  layout = parts.lay_out(case.weights, model, mesh)
  trainable, frozen = _split(_placed(case.weights, layout.shardings))
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
  return plan.Run(train_step, _placed(state, places), frozen, _placed(batch, rows))


def share_of_a_device(config: ConfigDict, case: Case, mesh: Mesh | AbstractMesh) -> plan.Run:
  """The step as one device computes it: a smaller model, on its share of the rows.

  Over `tensor` a device has some of the heads, of the width of the MLP and of the vocabulary; what
  is cut over `fsdp` it gathers where it is used.
  """
  tx, _ = methods.make_optimizer(config)
  count, model = mesh.shape["tensor"], case.model
  heads = [x for x in ("num_heads", "num_kv_heads", "full_kv_heads") if hasattr(model, x)]
  cuts_heads = all(getattr(model, x) % count == 0 for x in heads)
  sizes = (*(heads if cuts_heads else ()), "mlp_width", "vocab_size", "per_layer_vocab")
  fields = [x for x in sizes if (size := getattr(model, x, None)) and size % count == 0]
  model = dataclasses.replace(model, **{x: getattr(model, x) // count for x in fields})
  alone = AbstractMesh((1, 1, count), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  whole_heads = () if cuts_heads else ((r"(.*/)?attn/.*", jax.P()),)
  # Whole on a device of the mesh, but of a smaller model it has those of its own outputs.
  biases = (r"(.*/)?(attn/(query|key|value|qkv)|mlp/(gate|up))/bias", jax.P("tensor"))
  # Nor are classes sizes of the model; a head of them is small.
  classes = (("head/.*", jax.P()),) if getattr(model, "classes", ()) else ()
  rules = (*whole_heads, *classes, biases, *families.family_of(model).sharding)
  layout = sharding.lay_out(case.weights, alone, rules)
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


def _placed(tree: plan.PyTree, shardings: plan.PyTree) -> plan.PyTree:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
  )


def compile_step(
  config: ConfigDict, case: Case, mesh: AbstractMesh, planned: plan.Plan, where: str
) -> str:
  """Compiles the step for the devices here or for a TPU slice; says what the compiler reports.

  Raises:
    ValueError: when the mesh has more devices.
  """
  devices = jax.devices()
  if where != "here":
    devices = topologies.get_topology_desc(where, platform="tpu").devices
  if len(devices) < mesh.size:
    raise ValueError(
      f"--compile={where}: the mesh has {mesh.size} devices, and there are {len(devices)}; a CPU "
      f"stands for as many as JAX_NUM_CPU_DEVICES={mesh.size} says"
    )
  grid = np.asarray(devices[: mesh.size]).reshape(tuple(mesh.shape.values()))
  run = whole_run(config, case, Mesh(grid, sharding.AXES, axis_types=mesh.axis_types))
  print("compiling ...", flush=True)
  report = run.train_step.lower(run.state, run.frozen, run.batch).compile().memory_analysis()
  given, made = report.argument_size_in_bytes, report.temp_size_in_bytes
  return (
    f"compiled: {given / 1e6:,.1f} MB of arguments and {made / 1e6:,.1f} MB beside them on a "
    f"device; the plan's {planned.total / 1e6:,.1f} MB are {planned.total / (given + made):.0%}"
  )


def describe_data(config: ConfigDict, case: Case) -> str:
  """Lines about the batches and the lengths of the examples."""
  data, rows = case.data, config.train.batch_size
  epochs = config.train.steps / data["batches"]
  return (
    f"data: {data['examples']:,} examples in {data['batches']:,} batches, {data['padding']:.0%} "
    f"padding; {config.train.steps:,} steps are {epochs:.2g} epochs\n"
    + "".join(f"{line}\n" for line in case.lines)
    + f"largest batch: {rows} rows of {case.task.words_of(case.largest)}\n"
  )


def verdict(planned: plan.Plan, memory: int, mesh: Mesh | AbstractMesh) -> str:
  """Whether the plan fits in a device's memory, and what would make it smaller if not."""
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  text = f"{planned.total / memory:.0%} of the {memory / 1e9:,.1f} GB of each device ({sizes}): "
  if planned.total <= memory:
    return text + "it fits"
  if planned.activations > planned.arguments:
    return text + (
      "it does not fit; config.model.remat=dots or nothing keeps less for the backward pass, "
      "config.train.accumulate cuts the batch, config.train.loss_chunk the logits"
    )
  return text + (
    "it does not fit; config.mesh.fsdp or tensor shares the base out over more devices, "
    "config.model.dtype=bfloat16 halves it"
  )


def parse_memory(text: str) -> int:
  """Bytes of `16GB` or `16GiB`.

  Raises:
    ValueError: for anything else.
  """
  match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", text)
  if not match:
    raise ValueError(f"--device_memory={text}: a number and one of {', '.join(_UNITS)}, as 16GB")
  return round(float(match[1]) * _UNITS[match[2]])


def own_memory() -> int:
  """Bytes of a device here; CPU devices share the machine's."""
  statistics = jax.local_devices()[0].memory_stats()
  if statistics and "bytes_limit" in statistics:
    return statistics["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  programs.run(main)
