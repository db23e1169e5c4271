"""From one device to many: a mesh, and rules that shard the arrays of a tree.

    mesh = make_mesh(data=-1, fsdp=1, tensor=2)
    layout = lay_out(weights, mesh, families.family_of(config).sharding)
    print(layout)                                  # every array's sharding, with exceptions
    weights = jax.device_put(weights, layout.shardings)
    state = jax.device_put(state, layout.follow(state))

The mesh has three axes. The rows of a batch are sharded over `data` and `fsdp`. The base is sharded
over `fsdp`, where it is gathered layer by layer at its use, and over `tensor`, where each device
multiplies by its own columns or rows and no kernel is gathered. `jax.jit` does the rest: it reads
the shardings of its arguments and inserts the communication.

Sources: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3, for the choice between
columns and rows; Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, for `fsdp`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax import tables, tree
from lora_jax.weights import NotFactored, is_weight

PyTree = Any
Rules = Sequence[tuple[str, jax.P]]

AXES = ("data", "fsdp", "tensor")
ROWS = jax.P(("data", "fsdp"))
"""The sharding of a batch's rows."""


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
  """Returns the mesh of all devices of all processes.

  Args:
    data: the size of the axis `data`; -1, for one of the axes, takes the remaining devices.
    fsdp: the size of the axis `fsdp`.
    tensor: the size of the axis `tensor`, whose devices are nearest neighbors, as `jax.make_mesh`
      arranges them.

  Raises:
    ValueError: if the sizes do not fit the devices. A single process may leave some unused.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
  left = [name for name, size in sizes.items() if size == -1]
  fixed = [size for size in sizes.values() if size != -1]
  if len(left) > 1 or min(fixed, default=1) < 1:
    raise ValueError(f"mesh {asked}: sizes are at least 1; one may be -1 for the remaining devices")
  devices = jax.devices()
  if left:
    sizes[left[0]] = len(devices) // math.prod(fixed)
  count = math.prod(sizes.values())
  may_leave_some = not left and jax.process_count() == 1
  if not 0 < count <= len(devices) or (count < len(devices) and not may_leave_some):
    raise ValueError(
      f"mesh {asked} does not fit the {len(devices)} devices of {jax.process_count()} processes; "
      "choose sizes whose product is that number"
    )
  shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:count])


# ---- the shardings of a tree


@dataclasses.dataclass(frozen=True)
class Placement:
  """One array: path, shape, dtype, spec, and the reason if the spec is not the requested one."""

  path: str
  shape: tuple[int, ...]
  dtype: Any
  spec: jax.P
  why: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
  """The shardings of every array of a tree; its `str` is a table.

  Attributes:
    mesh: the devices.
    shardings: the tree with a NamedSharding in place of every array.
    placements: one per array, in the tree's order.
    unused: the patterns of the rules that matched no leaf.
  """

  mesh: Mesh
  shardings: PyTree
  placements: tuple[Placement, ...]
  unused: tuple[str, ...]

  def __str__(self) -> str:
    rows = tables.grouped(
      (p.path, (p.shape, str(p.dtype), p.spec, self._bytes_per_device(p), p.why))
      for p in self.placements
    )
    table = tables.rendered(
      ("path", "arrays", "shape", "dtype", "over", "MB a device", ""),
      [
        (path, f"{n}", "×".join(map(str, shape)), dtype, _names(spec), f"{n * size / 1e6:.2f}", why)
        for (path, shape, dtype, spec, size, why), n in rows.items()
      ],
    )
    sizes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
    total = sum(map(self._bytes_per_device, self.placements))
    lines = [table, f"mesh: {sizes}; {total / 1e6:,.1f} MB a device"]
    if self.unused:
      lines.append(f"rules that decided nothing: {', '.join(self.unused)}")
    return "\n".join(lines)

  def follow(self, state: PyTree) -> PyTree:
    """Returns shardings for an optimizer's state: a moment is sharded like its parameter.

    An array gets the sharding of an array of this layout if its path ends with that array's whole
    path and the shapes are equal. All others (counters, factored moments) are replicated. So any
    optimizer works: `1/0/mu/blocks/attn/query/kernel/a` is a moment of `a`.

    Args:
      state: any pytree of arrays, such as a whole `lora_jax.train.step.State`.
    """
    owners = {placement.path: placement for placement in self.placements}

    def sharding_of(path: str, leaf: Any) -> NamedSharding:
      names = path.split("/")
      for start in range(len(names)):
        owner = owners.get("/".join(names[start:]))
        if owner is not None and owner.shape == tuple(leaf.shape):
          return NamedSharding(self.mesh, owner.spec)
      return NamedSharding(self.mesh, jax.P())

    return tree.map_with_path(sharding_of, state)

  def _bytes_per_device(self, placement: Placement) -> int:
    local = NamedSharding(self.mesh, placement.spec).shard_shape(placement.shape)
    return math.prod(local) * placement.dtype.itemsize


def lay_out(params: PyTree, mesh: Mesh, rules: Rules) -> Layout:
  """Chooses a sharding on a mesh for every array of a tree.

  A Weight derives the shardings of its parts from its base: each axis of a part is sharded like the
  axis of the base that it is; the rank is not sharded. Axes that do not divide evenly are not
  sharded, and the layout gives the reason.

  Args:
    params: a pytree of arrays, Weights or `jax.ShapeDtypeStruct`s of them.
    mesh: the devices, as `make_mesh` returns them.
    rules: ordered (pattern, spec) pairs; the first whose pattern matches a leaf's whole path
      decides. A spec refers to a leaf's last axes; those before them (layers stacked by a scan)
      are not sharded. Every leaf must match a rule, so the last pattern is usually ".*".

  Raises:
    ValueError: if no rule matches a leaf, a spec has more axes than its leaf, or a spec names an
      axis that the mesh does not have.
  """
  placements, used = [], set()

  def shardings_of(path: str, leaf: Any) -> PyTree:
    pattern, spec = _rule(path, leaf, rules, mesh)
    used.add(pattern)
    specs = _specs_of(leaf, spec)

    def sharding_of(part_path: str, part: Any, asked: jax.P | None) -> NamedSharding:
      spec, why = _fitted(part, asked, mesh)
      full_path = "/".join(filter(None, (path, part_path)))
      placements.append(Placement(full_path, tuple(part.shape), part.dtype, spec, why))
      return NamedSharding(mesh, spec)

    flat = tree.flatten(specs, is_leaf=lambda x: isinstance(x, jax.P))
    return tree.map_with_path(lambda name, part: sharding_of(name, part, flat.get(name)), leaf)

  shardings = tree.map_with_path(shardings_of, params, is_leaf=is_weight)
  unused = tuple(pattern for pattern, _ in rules if pattern not in used and pattern != ".*")
  return Layout(mesh, shardings, tuple(placements), unused)


# ---- the rows of a batch, and whole arrays for every process


def process_rows(mesh: Mesh, rows: int, field: str = "the batch") -> tuple[int, int]:
  """Returns (index, count) of the block of a batch's rows that this process reads.

  Processes whose devices hold the same rows, as over `tensor`, read the same block.

  Args:
    mesh: the devices.
    rows: the number of rows of the whole batch.
    field: the name of the batch, for errors.

  Raises:
    ValueError: if the rows do not divide evenly, or if the processes' blocks overlap.
  """
  sharding = NamedSharding(mesh, ROWS)
  count = math.prod(mesh.shape[name] for name in _axis_names(ROWS))
  if rows % count:
    raise ValueError(
      f"{field} has {rows} rows, which the mesh divides over {count} devices "
      f"({', '.join(f'{name} {mesh.shape[name]}' for name in _axis_names(ROWS))}); "
      f"use a multiple of {count}, or a mesh with more devices on tensor"
    )
  held: dict[int, set[int]] = {}  # for each process, the blocks of rows on its devices
  for device, (block,) in sharding.devices_indices_map((count,)).items():
    held.setdefault(device.process_index, set()).add(block.indices(count)[0])
  blocks = sorted({tuple(sorted(numbers)) for numbers in held.values()})
  if len({len(block) for block in blocks}) > 1 or sum(map(len, blocks)) != count:
    raise ValueError(
      f"{field}: the mesh gives the processes rows that overlap, {held}; choose a mesh where data "
      "times fsdp is a multiple of the number of processes, or divides it"
    )
  return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)


def put_rows(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
  """Puts a batch on the mesh with sharded rows; this process passes its own block of each array.

  Rows run along `axis`, the first by default.
  """
  sharding = NamedSharding(mesh, jax.P(*[None] * axis, *ROWS))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def keep_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Returns a constraint for activations: rows like those of the batch, other axes replicated."""
  sharding = NamedSharding(mesh, ROWS)
  return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def gather(params: PyTree) -> PyTree:
  """Returns the tree as whole numpy arrays on every process; all processes must call it."""

  def whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, params)


def _rule(path: str, leaf: Any, rules: Rules, mesh: Mesh) -> tuple[str, jax.P]:
  """The pattern that matches a leaf, and its spec with an entry for each axis."""
  for pattern, spec in rules:
    if not re.fullmatch(pattern, path):
      continue
    ndim = len(leaf.shape)
    unknown = set(_axis_names(spec)) - set(mesh.shape)
    if unknown:
      raise ValueError(
        f"{path}: the rule {pattern!r} shards it over {', '.join(sorted(unknown))}, which the mesh "
        f"does not have; its axes are {', '.join(mesh.shape)}"
      )
    if len(spec) > ndim:
      raise ValueError(
        f"{path}: the rule {pattern!r} has {len(spec)} axes, {spec}; the leaf's shape "
        f"{tuple(leaf.shape)} has {ndim}"
      )
    return pattern, jax.P(*[None] * (ndim - len(spec)), *spec)
  raise ValueError(f'{path}: no rule says how it is sharded; end the rules with (".*", jax.P())')


def _specs_of(leaf: Any, spec: jax.P) -> PyTree:
  """The specs of a leaf's arrays; empty for a Weight that does not define them."""
  if not is_weight(leaf):
    return spec
  try:
    return leaf.partition_specs(spec)
  except NotFactored:
    return {}


def _fitted(array: Any, spec: jax.P | None, mesh: Mesh) -> tuple[jax.P, str]:
  """The spec without axes that do not divide evenly, and the reason."""
  if spec is None:
    return jax.P(), "whole: its kind does not say how it is sharded"
  axes, reasons = [], []
  for size, entry in zip(array.shape, (*spec, *[None] * (array.ndim - len(spec))), strict=True):
    names = [name for name in _axis_names((entry,)) if mesh.shape[name] > 1]
    count = math.prod(mesh.shape[name] for name in names)
    if size % count:
      reasons.append(f"{size} does not divide over {'+'.join(names)}, {count} devices")
      names = []
    axes.append(tuple(names) if len(names) > 1 else names[0] if names else None)
  while axes and axes[-1] is None:  # as JAX itself writes a spec
    axes.pop()
  return jax.P(*axes), "; ".join(reasons)


def _axis_names(spec) -> list[str]:
  """The mesh axes that a spec names."""
  return [
    name
    for names in spec
    if names is not None
    for name in (names if isinstance(names, tuple) else (names,))
  ]


def _names(spec) -> str:
  """`·, fsdp, tensor` of P(None, "fsdp", "tensor"); empty for an array that is not sharded."""
  if not _axis_names(spec):
    return ""
  return ", ".join("·" if names is None else "+".join(_axis_names((names,))) for names in spec)
