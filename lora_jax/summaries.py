"""A table of the adapted leaves and of the fraction of the model that trains, from shapes alone."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tables, tree
from lora_jax.adapters import Method
from lora_jax.axes import Axes, roles_of
from lora_jax.targets import Targets, axes_of
from lora_jax.weights import is_weight

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Row:
  """One adapted leaf: its path, shape, spec and size, and its number of trained parameters."""

  path: str
  shape: tuple[int, ...]
  spec: Method
  parameters: int
  trainable: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """The result of `summary`; its `str` is the table.

  Attributes:
    rows: the adapted leaves, in the tree's order.
    parameters: the number of parameters of the base.
    trainable: the number of parameters of the adapters.
    left_out: `{path: reason}` for leaves that look like kernels but were left out by the presets of
      `match`.
  """

  rows: tuple[Row, ...]
  parameters: int
  trainable: int
  left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def share(self) -> float:
    """The trained parameters as a fraction of the base's parameters."""
    return self.trainable / self.parameters

  def __str__(self) -> str:
    kinds = tables.grouped((row.path, (row.shape, row.spec, row.trainable)) for row in self.rows)
    table = tables.rendered(
      ("path", "leaves", "shape", "spec", "trainable"),
      [
        (path, f"{n}", "×".join(map(str, shape)), _spec(spec), f"{n * trainable:,}")
        for (path, shape, spec, trainable), n in kinds.items()
      ],
    )
    lost = tables.grouped((path, (reason,)) for path, reason in self.left_out.items())
    left_out = [f"left out: {path} ({n}): {reason}\n" for (path, reason), n in lost.items()]
    total = f"{self.trainable:,} of {self.parameters:,} parameters train ({self.share:.2%})"
    return f"{table}\n{''.join(left_out)}{total}"


def summary(
  params: PyTree, specs: Mapping[str, Method], axes: Mapping[str, Axes] | None = None
) -> Summary:
  """Counts the trained parameters exactly, without allocating memory.

  Args:
    params: the base; `jax.ShapeDtypeStruct`s suffice.
    specs: the result of `match`. A copy of it as a plain dict does not know the leaves left out.
    axes: the result of `trace_axes`; by default the axes that `match` was given.

  Raises:
    ValueError: as `init` does.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  axes = axes_of(specs, axes, leaves)
  trainable: dict[tuple, int] = {}  # per kind of leaf: a model has thousands of a few kinds
  rows = []
  for path, spec in specs.items():
    leaf = leaves[path]
    roles = roles_of(path, leaves, axes) if spec.NEEDS_ROLES else ""
    kind = spec, tuple(leaf.shape), roles
    if kind not in trainable:
      trainable[kind] = _trainable(spec, path, leaf, roles)
    rows.append(Row(path, tuple(leaf.shape), spec, _size(leaf), trainable[kind]))
  return Summary(
    tuple(rows),
    sum(map(_size, leaves.values())),
    sum(row.trainable for row in rows),
    specs.left_out if isinstance(specs, Targets) else {},
  )


def _trainable(spec: Method, path: str, leaf, roles: str) -> int:
  """The number of trained parameters of a leaf's adapter."""
  key = jax.random.key(0)
  adapter = jax.eval_shape(lambda key, w: spec.init(key, path, w, roles), key, leaf)
  train, _ = tree.partition(adapter, adapter.trainable())
  return sum(math.prod(part.shape) for part in jax.tree.leaves(train))


def _size(x) -> int:
  """The number of values in an array, a Weight or a tree."""
  if hasattr(x, "shape"):
    return math.prod(x.shape)
  return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(x))


def _spec(spec) -> str:
  """The spec with the fields that differ from their defaults."""
  shown = [
    f"{field.name}={getattr(spec, field.name)}"
    for field in dataclasses.fields(spec)
    if getattr(spec, field.name) != field.default
  ]
  return f"{type(spec).__name__}({', '.join(shown)})"
