"""One step per primitive for `axes.STEPS`: how a primitive changes the views of leaves.

A step takes an equation, the known facts about its operands (at least one of them is a view of a
leaf) and the notes of uses. It returns the facts about the results, or nothing if they are not
views. It raises `NotFollowed` if it cannot tell.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax.core
import jax.extend.core as jex
from jax.extend.core import primitives

from lora_jax.views import PLAIN, Source, Value, View, either, together


class NotFollowed(Exception):
  """An unknown primitive or parameter; the text is appended to the primitive's name."""


def parameter(eqn: jex.JaxprEqn, name: str) -> Any:
  if name not in eqn.params:
    raise NotFollowed(f" (it has no parameter {name!r})")
  return eqn.params[name]


def _shapes(eqn: jex.JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of the first operand and the first result."""
  before, after = eqn.invars[0].aval, eqn.outvars[0].aval
  assert isinstance(before, jax.core.ShapedArray) and isinstance(after, jax.core.ShapedArray)
  return before.shape, after.shape


# ---- products and look-ups: a step without a return value has results that are not views


def dot_general(eqn, ins, notes):
  contracting, batch = parameter(eqn, "dimension_numbers")
  for n, (value, contracted, stacks) in enumerate(zip(ins, contracting, batch, strict=True)):
    other = eqn.invars[1 - n].aval
    paired = (*contracting[1 - n], *batch[1 - n])
    rows = other.size // (math.prod(other.shape[axis] for axis in paired) or 1)
    notes.use(value, "dot_general", contracted, stacks, rows, ins[1 - n].source)


def ragged_dot_general(eqn, ins, notes):
  d = parameter(eqn, "ragged_dot_dimension_numbers")
  (_, contracted), (_, stacks) = d.dot_dimension_numbers
  groups = (*stacks, *d.rhs_group_dimensions)
  lhs, rhs = (v.aval for v in eqn.invars[:2])
  # Each row is multiplied by one group's matrix, so a matrix meets its fraction of the rows.
  rows = lhs.size // lhs.shape[-1] // math.prod(rhs.shape[axis] for axis in groups)
  notes.use(ins[1], "ragged_dot_general", contracted, groups, rows, ins[0].source)
  notes.stop([ins[0], *ins[2:]], "ragged_dot_general, whose rows it is")


def gather(eqn, ins, notes):
  numbers, sizes = parameter(eqn, "dimension_numbers"), parameter(eqn, "slice_sizes")
  operand, indices = (v.aval for v in eqn.invars)
  picked = [n for n in numbers.start_index_map if sizes[n] < operand.shape[n]]
  rows = math.prod(indices.shape[:-1])
  # A look-up is a table's purpose, wherever the ids come from.
  notes.use(ins[0], "gather", picked, numbers.operand_batching_dims, rows, Source.INPUTS)
  notes.stop(ins[1:], "gather, as an index")


def conv_general_dilated(eqn, ins, notes):
  numbers, out = parameter(eqn, "dimension_numbers"), eqn.outvars[0].aval
  rows = out.size // out.shape[numbers.out_spec[1]]
  inputs = numbers.rhs_spec[1:]
  groups = parameter(eqn, "feature_group_count")
  notes.use(ins[1], "conv_general_dilated", inputs, (), rows, ins[0].source, groups)
  notes.stop(ins[:1], "conv_general_dilated, as its input")


# ---- steps that move or slice axes


def each(f: Callable[[jex.JaxprEqn], Callable[[View], View]]):
  """A step that applies `f(eqn)` to every view of the first operand; other operands are scalars."""

  def step(eqn, ins, notes):
    notes.stop(ins[1:], f"{eqn.primitive.name}, as an index")
    source = max(x.source for x in ins)
    return [dataclasses.replace(ins[0].map(f(eqn)), source=source)]

  return step


def transpose(eqn):
  order = parameter(eqn, "permutation")
  return lambda view: view.pick(order)


def squeeze(eqn):
  gone = parameter(eqn, "dimensions")
  return lambda view: view.without(gone)


def reshape(eqn):
  before, after = _shapes(eqn)
  if eqn.params.get("dimensions") is not None:
    raise NotFollowed(" that transposes as well")
  return lambda view: view.reshaped(before, after)


def broadcast_in_dim(eqn):
  places, (before, after) = parameter(eqn, "broadcast_dimensions"), _shapes(eqn)
  return lambda view: view.broadcast(before, after, places)


def tile(eqn):
  before, after = _shapes(eqn)
  if len(before) != len(after):
    raise NotFollowed(" to more axes")
  return lambda view: view.broadcast(before, after, range(len(after)))


def cut(eqn):
  before, after = _shapes(eqn)
  return lambda view: view.cut(before, after)


def same(eqn, ins, notes):
  """Each result is the operand in its place."""
  return ins


def split(eqn, ins, notes):
  before = eqn.invars[0].aval.shape
  return [ins[0].map(lambda view, after=v.aval.shape: view.cut(before, after)) for v in eqn.outvars]


def unstack(eqn, ins, notes):
  axis, parts = parameter(eqn, "axis"), len(eqn.outvars)
  return [ins[0].map(lambda view: view.without((axis,)).repeated(Fraction(1, parts)))] * parts


# ---- steps that combine several values into one


def stack(eqn, ins, notes):
  axis = parameter(eqn, "axis")
  return _kept(eqn, [x.map(lambda view: view.inserted(axis)) for x in ins], notes, together)


def concatenate(eqn, ins, notes):
  return _kept(eqn, ins, notes, together)


def update(eqn, ins, notes):
  notes.stop(ins[2:], f"{eqn.primitive.name}, as an index")
  return _kept(eqn, ins[:2], notes, together)


def elementwise(eqn, ins, notes):
  """Any operation whose operands have the shape of its result, or are scalars."""
  after = eqn.outvars[0].aval.shape
  if eqn.outvars[0].aval.dtype == bool or not all(
    _fits(v.aval.shape, after) for v in (*eqn.invars, *eqn.outvars)
  ):
    raise NotFollowed
  full = [
    x.map(lambda view, shape=v.aval.shape: view.broadcast(shape, after, range(len(shape))))
    for x, v in zip(ins, eqn.invars, strict=True)
  ]
  return _kept(eqn, full, notes, either) * len(eqn.outvars)


def _fits(shape, after) -> bool:
  """True if an operand is a scalar, or has the result's shape except for axes of size one."""
  return not shape or (
    len(shape) == len(after) and all(a in (1, b) for a, b in zip(shape, after, strict=True))
  )


def _kept(eqn, ins, notes, joined: Callable[[Sequence[Value]], Value]) -> list[Value]:
  """The joined value: a view of its leaves as long as it depends on parameters alone.

  A position embedding that is added to activations is not part of the next kernel's inputs. Scalars
  may come from anywhere. So may an array that is closed over if it acts as a mask (it multiplies
  axes of the leaf and no others).
  """
  new_axes = any(() in view.axes for value in ins for view in value.views)
  masks = _MASKS.get(eqn.primitive, ())
  for n, (x, v) in enumerate(zip(ins, eqn.invars, strict=False)):
    if x.views or not v.aval.shape or x.source == Source.PARAMETERS:
      continue
    if x.source == Source.INPUTS or n not in masks or new_axes:
      notes.join(ins, eqn.primitive.name)
      return [PLAIN[max(x.source for x in ins)]]
  return [joined(ins)]


# The operations with which a closed-over array masks or scales a leaf.
_MASKS = {primitives.mul_p: (0, 1), primitives.div_p: (1,), primitives.select_n_p: (0,)}
