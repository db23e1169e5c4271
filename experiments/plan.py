r"""Plans a run without loading weights: parameters, arithmetic, memory, and whether it fits.

    python -m experiments.plan --config=configs/quickstart.py
    python -m experiments.plan --config=configs/quickstart.py --config.train.batch_size=256 \
        --config.mesh.fsdp=8 --device_memory=16GB
    python -m experiments.plan --config=configs/quickstart.py --topology=v5e:2x4

The program reads the model's configuration and tokenizer, and the lengths of the examples. The rest
is traced from shapes, for a mesh of any size, on any devices. The figures are those of the largest
batch. The memory is an estimate, see `lora_jax.cost`.

`--topology=v5e:2x4` has the compiler of TPUs compile the step for a slice of that name, over which
config.mesh lies, and prints what it says: no TPU is needed, but the extra `tpu`. Where it does not
fit, each change that might help is compiled too, and told with what it comes to. `--topology=all`
makes a table of a few slices, and `--topology=here` compiles for the devices that are here. Each
compilation takes from seconds to minutes.

For a sweep, the largest member is planned and multiplied by the number of members.

XLA's CPU compiler is unlike the others in two things, which the estimate leaves out: it computes
bfloat16 in float32, and it undoes rematerialization between layers that are not scanned.
"""

import re

import jax
import numpy as np
from absl import app, flags
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict, config_flags

import lora_jax
from experiments import defaults, model_options, planning, programs, topologies
from lora_jax import sharding, tables
from lora_jax.train import members, plan

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_DEVICES = flags.DEFINE_integer("devices", None, "Devices in total, for -1 in config.mesh.", 1)
_MEMORY = flags.DEFINE_string(
  "device_memory", None, "Memory per device, e.g. 16GB; detected by default."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "Where to compile the step: a TPU slice as v5e:2x2, all (several), or here."
)

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  config, count = planning.largest_member(_CONFIG.value)
  topology = _TOPOLOGY.value
  if count > 1 and topology:
    raise ValueError(
      "--topology is for one run; give --config.sweep.grid='()' --config.sweep.members='()' as well"
    )
  given = parse_memory(_MEMORY.value) if _MEMORY.value else None
  names = {"": [], topologies.ALL: topologies.TABLE}.get(topology, [topology])
  # Before anything is read, for libtpu may be missing.
  slices = {name: devices_of(name) for name in names}
  case = planning.read(config)
  print(describe_data(config, case))
  print(lora_jax.summary(case.params, case.specs, case.axes))
  if topology == topologies.ALL:
    print(tabulated(config, case, slices, given))
    return
  devices = slices.get(topology)
  case, mesh, memory = target(config, case, devices, given, _DEVICES.value)
  settings, line = defaults.choose(config, lambda: case, mesh, memory, members=count)
  config, case = settings.applied(config), settings.of_case(case)
  planned = planning.make_plan(config, case, mesh)
  planned = planned.of_members(count, in_turn=members.in_turn(case.axes))
  if count > 1:
    print(f"This is the largest of {count} members; together, on one base, they need:")
  print("\n".join(filter(None, [f"\n{planned}", verdict(planned, memory, mesh, config), line])))
  if devices:
    print(f"compiling for {topology} ...", flush=True)
    found = compile_case(config, case, mesh, devices)
    print(f"\n{found}\n{compared(found, planned, memory)}")
    if not found.fits(memory):
      for words in changes_that_help(config, case, mesh, devices, memory):
        print(words, flush=True)


def devices_of(name: str) -> list:
  """The devices to compile for, by the name of a slice, or those that are here."""
  return jax.devices() if name == topologies.HERE else topologies.devices_of(name)


def target(
  config: ConfigDict,
  case: planning.Case,
  devices: list | None,
  memory: int | None,
  count: int | None = None,
) -> tuple[planning.Case, AbstractMesh, int]:
  """The case for the platform of devices, the mesh of the config over them, and their memory.

  devices: None for those of this machine. memory: of one device, if given. count: the number of
    devices for -1 in the mesh, if given.

  Raises ValueError when the mesh does not fit the devices.
  """
  shared_out = len(devices) if devices and -1 in config.mesh.values() else None
  mesh = planning.abstract_mesh(config.mesh, count or shared_out)
  if not devices:
    return case, mesh, memory or planning.own_memory()
  if len(devices) < mesh.size:
    raise ValueError(
      f"--topology: the mesh has {mesh.size} devices, and there are {len(devices)}; name a larger "
      f"slice, and of a CPU as many as you need by JAX_NUM_CPU_DEVICES={mesh.size}"
    )
  platform = devices[0].platform
  case = case.with_model(model_options.for_platform(case.model, platform))
  if memory is None:
    memory = topologies.memory_of(devices[0]) if platform == "tpu" else planning.own_memory()
  return case, mesh, memory


def compile_case(
  config: ConfigDict, case: planning.Case, mesh: AbstractMesh, devices: list
) -> topologies.Compiled:
  """The compiler's report of a case on the first devices."""
  grid = np.asarray(devices[: mesh.size]).reshape(tuple(mesh.shape.values()))
  concrete = Mesh(grid, sharding.AXES, axis_types=mesh.axis_types)
  return topologies.compile_run(planning.whole_run(config, case, concrete))


def compared(found: topologies.Compiled, planned: plan.Plan, memory: int) -> str:
  """Whether what was compiled fits, and how near the plan is."""
  if found.refused:
    return "it does not fit"
  fits = "it fits" if found.fits(memory) else "it does not fit"
  return (
    f"{found.peak / memory:.0%} of the {memory / 1e9:,.1f} GB of each device: {fits}; the plan's "
    f"{planned.total / 1e6:,.1f} MB are {planned.total / (found.arguments + found.temporaries):.0%}"
  )


def changes_that_help(config, case, mesh: AbstractMesh, devices: list, memory: int):
  """Yields a line for each single change that might make a step fit, after compiling it."""
  yield "\nOne change at a time, each compiled:"
  for words, fields in possible_changes(config, case, mesh, len(devices)):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(fields)
    try:
      # Quantization or another sharding changes the base, so the config is read again.
      other, its_mesh, _ = target(changed, planning.read(changed), devices, memory)
      found = compile_case(changed, other, its_mesh, devices)
    except ValueError as error:
      yield f"{words}: {error}"
      continue
    if found.refused:
      yield f"{words}: does not fit"
    else:
      fits = "fits" if found.fits(memory) else "does not fit"
      yield f"{words}: {found.peak / 1e9:,.2f} GB, {fits}"


def possible_changes(
  config: ConfigDict, case: planning.Case, mesh: AbstractMesh, devices: int
) -> list[tuple[str, dict]]:
  """(words, fields) of each change that a config has room for, the cheapest first."""
  found = []
  chunk = defaults.chunk_of(config, case)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.train.batch_size // shares
  if config.train.loss_chunk == 0 and chunk:
    found.append({"train.loss_chunk": chunk})
  later = {"none": ("dots", "nothing"), "everything": ("dots", "nothing"), "dots": ("nothing",)}
  found += [{"model.remat": name} for name in later.get(config.model.remat, ())]
  if config.train.accumulate < rows:
    found.append({"train.accumulate": rows})
  if config.model.quantize == "none" and config.adapter.method not in ("full", "loftq"):
    found.append({"model.quantize": "nf4"})
  divides = config.train.batch_size % (devices * config.train.accumulate) == 0
  if devices > mesh.shape["fsdp"] and divides:
    found.append({"mesh.data": 1, "mesh.fsdp": devices, "mesh.tensor": 1})
  return [(" ".join(f"--config.{x}={y}" for x, y in fields.items()), fields) for fields in found]


def tabulated(config: ConfigDict, case: planning.Case, slices: dict, given: int | None) -> str:
  """A table of what a run comes to on several slices."""
  rows = []
  for name, devices in slices.items():
    print(f"compiling for {name} ...", flush=True)
    try:
      own, mesh, memory = target(config, case, devices, given)
      settings, _ = defaults.choose(config, lambda own=own: own, mesh, memory)
      changed = settings.applied(config)
      found = compile_case(changed, settings.of_case(own), mesh, devices)
    except ValueError as error:
      rows.append((name, "-", "-", "-", "-", str(error)))
      continue
    sizes = (
      ("-", "-") if found.refused else (f"{found.arguments / 1e9:.2f}", f"{found.peak / 1e9:.2f}")
    )
    outcome = "fits" if found.fits(memory) else "does not fit"
    chosen = f"{outcome}; remat {settings.remat}, loss_chunk {settings.loss_chunk}"
    rows.append((name, f"{memory / 1e9:.1f}", *sizes, f"{found.seconds:.0f}", chosen))
  header = ("topology", "GB a device", "arguments", "peak", "seconds", "outcome")
  return tables.rendered(header, rows)


def describe_data(config: ConfigDict, case: planning.Case) -> str:
  """Lines about the batches and the lengths of the examples."""
  data, rows = case.data, config.train.batch_size
  epochs = config.train.steps / data["batches"]
  return (
    f"data: {data['examples']:,} examples in {data['batches']:,} batches, {data['padding']:.0%} "
    f"padding; {config.train.steps:,} steps are {epochs:.2g} epochs\n"
    + "".join(f"{line}\n" for line in case.lines)
    + f"largest batch: {rows} rows of {case.task.words_of(case.largest)}\n"
  )


def verdict(planned: plan.Plan, memory: int, mesh: Mesh | AbstractMesh, config: ConfigDict) -> str:
  """Whether the plan fits in a device's memory, and what would make it smaller if not."""
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  text = f"{planned.total / memory:.0%} of the {memory / 1e9:,.1f} GB of each device ({sizes}): "
  if planned.total <= memory:
    return text + "it fits"
  if planned.activations > planned.arguments:
    remedies = ["config.train.accumulate cuts the batch"]
    if config.model.remat != "nothing":
      remedies.append("config.model.remat=nothing keeps less for the backward pass")
    if not config.train.loss_chunk:
      remedies.append("config.train.loss_chunk cuts the logits")
  else:
    remedies = ["config.mesh.fsdp or tensor shares the base out over more devices"]
    if config.model.quantize == "none":
      remedies.append("config.model.quantize=nf4 makes it smaller")
  return text + f"it does not fit; {', '.join(remedies)}"


def parse_memory(text: str) -> int:
  """Bytes of `16GB` or `16GiB`.

  Raises:
    ValueError: for anything else.
  """
  match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", text)
  if not match:
    raise ValueError(f"--device_memory={text}: a number and one of {', '.join(_UNITS)}, as 16GB")
  return round(float(match[1]) * _UNITS[match[2]])


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  programs.run(main)
