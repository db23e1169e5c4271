"""The memory and FLOPs of a training step, before any array is allocated.

    plan = make_plan(Run(train_step, state, frozen, batch))      # jax.ShapeDtypeStructs all
    print(plan)
    plan.total <= 16e9

The arguments of the step (the base, what trains, the optimizer, the batch) are counted exactly. Its
temporaries (activations saved for the backward pass, gradients, and workspace) are estimated from
the traced step by `lora_jax.cost`. Nothing is compiled.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lora_jax import cost, tables
from lora_jax.train.step import Batch, State

PyTree = Any


class Run(NamedTuple):
  """A training step and its arguments; every array may be a `jax.ShapeDtypeStruct`.

  Attributes:
    train_step: as `lora_jax.train.step.make_train_step` returns it.
    state, frozen, batch: its arguments. For an array with a sharding, only the shard of one device
      counts.
  """

  train_step: Callable
  state: State
  frozen: PyTree
  batch: Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The requirements of a step; its `str` is a table.

  Attributes:
    frozen, trainable: the number of frozen and of trained parameters.
    flops: floating-point operations of a step's products, over all devices.
    base, adapters, optimizer, batch: bytes of the arguments, per device.
    activations: bytes of activations, gradients and workspace, per device. If the rows are sharded,
      gradients count twice: XLA stores their sum over devices alongside them.
  """

  frozen: int
  trainable: int
  flops: int
  base: int
  adapters: int
  optimizer: int
  batch: int
  activations: int

  @property
  def arguments(self) -> int:
    """Bytes of the step's arguments, per device."""
    return self.base + self.adapters + self.optimizer + self.batch

  @property
  def total(self) -> int:
    """Bytes per device."""
    return self.arguments + self.activations

  def of_members(self, count: int, *, in_turn: bool = False) -> "Plan":
    """The plan for `count` adapters in one program, as `lora_jax.train.members` trains them.

    There is one copy of the base; everything else counts once per adapter, at the largest size.
    If members take turns in each step, activations count once. Trained parameters and
    their optimizer states then count twice, since the step keeps the old values.
    """
    shared = ("frozen", "base")
    of_each = [field.name for field in dataclasses.fields(self) if field.name not in shared]
    found = dataclasses.replace(self, **{name: count * getattr(self, name) for name in of_each})
    if not in_turn:
      return found
    activations = self.activations + found.adapters + found.optimizer
    return dataclasses.replace(found, activations=activations)

  def __str__(self) -> str:
    rows = [
      ("base", self.base),
      ("what trains", self.adapters),
      ("optimizer", self.optimizer),
      ("batch", self.batch),
      ("activations and gradients", self.activations),
      ("together", self.total),
    ]
    table = tables.rendered(
      ("memory per device", f"{'MB':>12}"),
      [(name, f"{size / 1e6:>12,.1f}") for name, size in rows],
    )
    return f"{table}\n{self.flops / 1e12:,.3f} TFLOP a step"


def make_plan(run: Run, share: Run | None = None) -> Plan:
  """Plans a training step.

  Args:
    run: the whole step.
    share: the step as one of several devices computes it, with the shapes that its arrays have
      there; None for a single device.
  """
  whole = _traced(run)
  alone = whole if share is None else _traced(share)
  return Plan(
    frozen=_count(run.frozen),
    trainable=_count(run.state.trainable),
    flops=cost.flops(whole),
    base=bytes_of_a_device(run.frozen),
    adapters=bytes_of_a_device(run.state.trainable),
    optimizer=bytes_of_a_device(run.state.opt_state) + bytes_of_a_device(run.state.step),
    batch=bytes_of_a_device(run.batch),
    activations=cost.peak_memory(alone, results_in_place=True) + _reduced(run, share),
  )


def _traced(run: Run):
  return jax.make_jaxpr(run.train_step)(run.state, run.frozen, run.batch)


def _reduced(run: Run, share: Run | None) -> int:
  """Bytes of the gradients summed over devices, per device; 0 if all devices have the same rows."""
  if share is None or _shapes(share.batch) == _shapes(run.batch):
    return 0
  return bytes_of_a_device(share.state.trainable)


def _shapes(batch: Batch) -> list[tuple[int, ...]]:
  return [leaf.shape for leaf in jax.tree.leaves(batch)]


def _count(tree: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bytes_of_a_device(tree: PyTree) -> int:
  """Returns the bytes of a tree's arrays on a device; of an array with a sharding, of its shard."""

  def size(x) -> int:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))
