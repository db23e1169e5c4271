"""From one device to many: a mesh, and rules that say how the arrays of a tree lie on it.

    mesh = make_mesh(data=-1, fsdp=1, tensor=2)
    layout = lay_out(weights, mesh, families.family_of(config).sharding)
    print(layout)                                  # where every array lies, and what could not
    weights = jax.device_put(weights, layout.shardings)
    state = jax.device_put(state, layout.follow(state))

The mesh has three axes. The rows of a batch are shared out over `data` and `fsdp`. The base is cut
over `fsdp`, to be gathered layer by layer as it is used, and over `tensor`, where each device
multiplies by its own columns or rows and no kernel is ever gathered. The engine is `jax.jit`: it
reads the shardings of its arguments and puts in the communication.

Sources: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3, for which kernel is cut by
columns and which by rows; Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, for `fsdp`.
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
"""How the rows of a batch are shared out."""


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
  """The mesh of all devices, of all processes.

  Args:
    data, fsdp, tensor: how many devices each axis has; -1, for one of them, is what the others
      leave. The last axis has the nearest neighbours, as `jax.make_mesh` knows them.

  Raises:
    ValueError: when the sizes do not fit the devices. A single process may leave some unused.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
  left = [name for name, size in sizes.items() if size == -1]
  fixed = [size for size in sizes.values() if size != -1]
  if len(left) > 1 or min(fixed, default=1) < 1:
    raise ValueError(f"mesh {asked}: sizes are at least 1, and one of them may be -1, what is left")
  devices = jax.devices()
  if left:
    sizes[left[0]] = len(devices) // math.prod(fixed)
  count = math.prod(sizes.values())
  may_leave_some = not left and jax.process_count() == 1
  if not 0 < count <= len(devices) or (count < len(devices) and not may_leave_some):
    raise ValueError(
      f"mesh {asked} does not fit the {len(devices)} devices of {jax.process_count()} processes; "
      "choose sizes whose product is their number"
    )
  shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:count])


# ---- where the arrays of a tree lie


@dataclasses.dataclass(frozen=True)
class Placement:
  """One array: its path, shape, dtype and spec, and why the spec is not the one that was asked."""

  path: str
  shape: tuple[int, ...]
  dtype: Any
  spec: jax.P
  why: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where every array of a tree lies; `str` of it is a table.

  Attributes:
    mesh: the devices.
    shardings: the tree with a NamedSharding in the place of every array.
    placements: one for each array, in the tree's order.
    unused: the patterns of the rules that decided no leaf.
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
    """The shardings of what an optimizer keeps: a moment lies where its parameter lies.

    An array whose path ends with the whole path of an array of this layout, and that has its shape,
    gets its sharding; everything else (counters, factored moments) is whole on every device. No
    optimizer has to be known for this: `1/0/mu/blocks/attn/query/kernel/a` is a moment of `a`.

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
  """Lays the arrays of a tree out on a mesh.

  A Weight says itself how its parts follow its base: each axis of a part is cut as the axis of the
  base that it is, and the rank is not. What does not divide evenly stays whole, and the layout says
  so.

  Args:
    params: a pytree of arrays, Weights or `jax.ShapeDtypeStruct`s of them.
    mesh: the devices, as `make_mesh` makes it.
    rules: ordered (pattern, spec) pairs; the first whose pattern matches a leaf's whole path
      decides. A spec speaks of a leaf's last axes: those before them (layers stacked by a scan)
      stay whole. Every leaf must be decided, so the last pattern is usually ".*".

  Raises:
    ValueError: when no rule decides a leaf, a spec has more axes than its leaf, or a spec names an
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


# ---- the rows of a batch, and what every process needs whole


def process_rows(mesh: Mesh, rows: int, field: str = "the batch") -> tuple[int, int]:
  """Which block of a batch's rows this process reads: (its number, of how many).

  Processes whose devices hold the same rows, as over `tensor`, read the same block.

  Args:
    mesh: the devices.
    rows: of the whole batch.
    field: what the error calls the batch.

  Raises:
    ValueError: when the rows do not divide, or the processes' blocks are not alike.
  """
  sharding = NamedSharding(mesh, ROWS)
  count = math.prod(mesh.shape[name] for name in _axis_names(ROWS))
  if rows % count:
    raise ValueError(
      f"{field} has {rows} rows, which the mesh shares out over {count} devices "
      f"({', '.join(f'{name} {mesh.shape[name]}' for name in _axis_names(ROWS))}); "
      f"use a multiple of {count}, or a mesh with more devices on tensor"
    )
  held: dict[int, set[int]] = {}  # of each process, the blocks of rows on its devices
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
  """The batch on the mesh, its rows shared out; of each array this process gives its own block.

  The rows are along one axis, the first unless it is said.
  """
  sharding = NamedSharding(mesh, jax.P(*[None] * axis, *ROWS))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def keep_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """A constraint for activations: rows as those of the batch, every other axis whole."""
  sharding = NamedSharding(mesh, ROWS)
  return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def gather(params: PyTree) -> PyTree:
  """The tree as numpy arrays, whole, on every process; all processes must call it."""

  def whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, params)


def _rule(path: str, leaf: Any, rules: Rules, mesh: Mesh) -> tuple[str, jax.P]:
  """The pattern that decides a leaf, and its spec with an entry for each axis."""
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
  """The specs of a leaf's arrays; empty for a Weight that does not say them."""
  if not is_weight(leaf):
    return spec
  try:
    return leaf.partition_specs(spec)
  except NotFactored:
    return {}


def _fitted(array: Any, spec: jax.P | None, mesh: Mesh) -> tuple[jax.P, str]:
  """The spec without what does not divide, and what that was."""
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
  """`·, fsdp, tensor` of P(None, "fsdp", "tensor"); nothing for an array that stays whole."""
  if not _axis_names(spec):
    return ""
  return ", ".join("·" if names is None else "+".join(_axis_names((names,))) for names in spec)
