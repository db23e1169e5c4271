"""Which axis of a parameter is which, found by tracing the function that uses it.

A shape does not say it: (512, 8, 64) may be a query projection (in; out, out), an output
projection (in, in; out), or eight stacked layers. The function does: `dot_general` contracts the
inputs of a leaf and batches over its stacks, `scan` slices stacks, `gather` picks rows by an
input, a convolution's dimension numbers say the rest. So the function is traced once, abstractly
(no FLOPs, no memory), and every leaf is followed from the arguments to its uses.

    >>> axes = trace_axes(lambda p, x: x @ p["kernel"], params, x)
    >>> axes["kernel"]
    Axes(roles='io', uses=('dot_general',), rows=32)
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.extend.core import primitives

from lora_jax import compat, tables, tree
from lora_jax.weights import is_weight

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Axes:
  """The roles of a leaf's axes.

  Attributes:
    roles: a letter an axis: `i` input, `o` output, `s` stack. Empty where the function never
      contracts or gathers the leaf (biases, norm scales), or leaves it no input or no output.
    uses: the primitives that contract or gather the leaf, in order of first use.
    rows: how many rows meet each of its matrices, over all uses: tokens for a linear layer,
      positions of the result for a convolution, ids for a lookup. So the products of a leaf cost
      2 · rows · its size FLOPs forward. A loop of unknown length counts once, a cond each branch.
  """

  roles: str
  uses: tuple[str, ...]
  rows: int = 0


class AxesReport(dict[str, Axes]):
  """What `trace_axes` returns, `{path: Axes}`; `str` of it is a table."""

  def __str__(self) -> str:
    kinds = tables.grouped((path, (axes,)) for path, axes in self.items())
    return tables.rendered(
      ("path", "leaves", "axes", "used by", "rows"),
      [
        (
          path,
          f"{n}",
          ", ".join(_NAMES[role] for role in axes.roles) or "-",
          ", ".join(axes.uses) or "-",
          f"{axes.rows:,}",
        )
        for (path, axes), n in kinds.items()
      ],
    )


_NAMES = {"s": "stack", "i": "in", "o": "out"}


def trace_axes(f: Callable, params: PyTree, *args, **kwargs) -> AxesReport:
  """Returns `{path: Axes}` for every leaf of `params`, by tracing `f(params, *args, **kwargs)`.

  `print` it for a table.

  Where a leaf is used more than once (tied embeddings are gathered, then used transposed as the
  head) the first use gives the roles.

  Args:
    f: the function that uses the parameters.
    params: a pytree of arrays, `jax.ShapeDtypeStruct`s or Weights, of which the shape is looked at.
    *args, **kwargs: what `f` takes besides; arrays may be `jax.ShapeDtypeStruct`s.
  """
  params = jax.tree.map(lambda x: x.aval if is_weight(x) else x, params, is_leaf=is_weight)
  leaves = tree.flatten(params)
  dynamic, static = _split_arguments((args, kwargs))

  def g(params, dynamic):
    args, kwargs = tree.join(dynamic, static)
    return f(params, *args, **kwargs)

  jaxpr = jax.make_jaxpr(g)(params, dynamic)
  found = {path: _Found({}) for path in leaves}
  views = [_View(path, tuple((n,) for n in range(len(x.shape)))) for path, x in leaves.items()]
  rest = [None] * (len(jaxpr.jaxpr.invars) - len(views))
  _follow(jaxpr, [*views, *rest], found)
  return AxesReport({path: _axes(len(leaf.shape), found[path]) for path, leaf in leaves.items()})


@dataclasses.dataclass(frozen=True)
class _View:
  """A value that is a leaf with some of its axes moved or sliced away.

  Attributes:
    path: the leaf.
    axes: the leaf's axes behind each axis of the value: one as a rule, none for a new axis, several
      for axes that were joined.
    stacks: the leaf's axes that a scan or an index has sliced away.
    times: how often the loops around it use the value.
  """

  path: str
  axes: tuple[tuple[int, ...], ...]
  stacks: tuple[int, ...] = ()
  times: int = 1

  def pick(self, order) -> "_View":
    return dataclasses.replace(self, axes=tuple(self.axes[n] for n in order))

  def without(self, gone) -> "_View":
    """The view of one slice: the axes that are gone are stacks."""
    kept = self.pick([n for n in range(len(self.axes)) if n not in gone])
    stacks = tuple(axis for n in gone for axis in self.axes[n])
    return dataclasses.replace(kept, stacks=(*self.stacks, *stacks))


@dataclasses.dataclass
class _Found:
  """How a leaf is used: the roles of its axes by primitive, and how many rows meet it."""

  uses: dict[str, dict[int, str]]
  rows: int = 0


def _split_arguments(arguments):
  is_array = jax.tree.map(lambda x: hasattr(x, "shape") and hasattr(x, "dtype"), arguments)
  return tree.partition(arguments, is_array)


def _axes(ndim: int, found: _Found) -> Axes:
  first = next(iter(found.uses.values()), {})
  roles = "".join(first.get(n, "o") for n in range(ndim))
  return Axes(roles if {"i", "o"} <= set(roles) else "", tuple(found.uses), found.rows)


def _follow(jaxpr: jex.ClosedJaxpr, views: list, found: dict[str, _Found]) -> list:
  """Follows views through a jaxpr, noting in `found` how each leaf is used."""
  env = dict(zip(jaxpr.jaxpr.invars, views, strict=True))
  for eqn in jaxpr.jaxpr.eqns:
    ins = [None if compat.is_literal(v) else env.get(v) for v in eqn.invars]
    if any(ins):
      outs = _step(eqn, ins, found)
      env.update(zip(eqn.outvars, outs, strict=False))
  return [None if compat.is_literal(v) else env.get(v) for v in jaxpr.jaxpr.outvars]


def _step(eqn, ins, found) -> list:
  """What the results of one equation are views of; notes uses."""
  params = eqn.params
  if eqn.primitive in _SAME_AXES:
    return [ins[0]]
  if eqn.primitive in _PRODUCTS and any(v.aval.ndim == 0 for v in eqn.invars):
    return [ins[0] or ins[1]]  # times or by a single number
  if eqn.primitive is primitives.transpose_p:
    return [ins[0].pick(params["permutation"])]
  if eqn.primitive is primitives.squeeze_p:
    return [ins[0].without(params["dimensions"])]
  if eqn.primitive is primitives.reshape_p:
    return [_reshape(ins[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)]
  if eqn.primitive is primitives.broadcast_in_dim_p:
    behind = dict(zip(params["broadcast_dimensions"], ins[0].axes, strict=True))
    axes = tuple(behind.get(n, ()) for n in range(len(params["shape"])))
    return [dataclasses.replace(ins[0], axes=axes)]
  if eqn.primitive is primitives.dot_general_p:
    contracting, batch = params["dimension_numbers"]
    for n, (view, contracted, stacks) in enumerate(zip(ins, contracting, batch, strict=True)):
      other = eqn.invars[1 - n].aval
      paired = (*contracting[1 - n], *batch[1 - n])
      rows = other.size // math.prod(other.shape[axis] for axis in paired)
      _note(found, view, "dot_general", contracted, stacks, rows)
    return []
  if eqn.primitive is compat.ragged_dot_general_p and ins[1] is not None:
    d = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, stacks) = d.dot_dimension_numbers
    groups = (*stacks, *d.rhs_group_dimensions)
    # Each row meets one group's matrix, so a matrix meets its share of them.
    count = math.prod(eqn.invars[1].aval.shape[axis] for axis in groups)
    rows = eqn.invars[0].aval.size // eqn.invars[0].aval.shape[-1] // count
    _note(found, ins[1], "ragged_dot_general", contracted, groups, rows)
    return []
  if eqn.primitive is primitives.gather_p and ins[0] is not None:
    numbers = params["dimension_numbers"]
    batched = numbers.operand_batching_dims
    rows = eqn.invars[1].aval.size // eqn.invars[1].aval.shape[-1]
    _note(found, ins[0], "gather", numbers.start_index_map, batched, rows)
    return []
  if eqn.primitive is primitives.conv_general_dilated_p and ins[1] is not None:
    spec = params["dimension_numbers"].rhs_spec
    out = eqn.outvars[0].aval
    rows = out.size // out.shape[params["dimension_numbers"].out_spec[1]]
    _note(found, ins[1], "conv_general_dilated", spec[1:], (), rows)
    return []
  if eqn.primitive is compat.scan_p:
    return _scan(ins, params, found)
  if eqn.primitive is compat.cond_p:
    outs = [_follow(branch, ins[1:], found) for branch in params["branches"]]
    return [views[0] if len(set(views)) == 1 else None for views in zip(*outs, strict=True)]
  if eqn.primitive is compat.while_p:
    consts = params["cond_nconsts"]
    return _follow(params["body_jaxpr"], ins[consts:], found)
  for value in params.values():  # jit, remat, custom_jvp, custom_vjp, shard_map …
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
      inner = compat.closed(value)
      if len(inner.jaxpr.invars) == len(ins):
        return _follow(inner, ins, found)
  return []


def _scan(ins, params, found) -> list:
  consts, carry, length = params["num_consts"], params["num_carry"], params["length"]
  whole = [
    view and dataclasses.replace(view, times=view.times * length) for view in ins[: consts + carry]
  ]
  xs = [view and view.without((0,)) for view in ins[consts + carry :]]
  outs = _follow(params["jaxpr"], [*whole, *xs], found)
  kept = [view and dataclasses.replace(view, times=view.times // length) for view in outs[:carry]]
  return [*kept, *[None] * (len(outs) - carry)]


def _note(found, view, primitive, inputs, stacks, rows: int) -> None:
  """Notes a use of the leaf behind a view, if there is one.

  inputs, stacks: axes of the view.
  rows: how many rows meet the leaf in one use.
  """
  if view is None:
    return
  roles = {axis: "i" for n in inputs for axis in view.axes[n]}
  roles |= {axis: "s" for n in stacks for axis in view.axes[n]} | dict.fromkeys(view.stacks, "s")
  found[view.path].uses.setdefault(primitive, roles)
  found[view.path].rows += rows * view.times


def _reshape(view: _View, before: Sequence[int], after: Sequence[int]) -> _View:
  """The view behind a reshape: axes split or joined in one go share what is behind them."""
  starts, new_starts = (
    list(itertools.accumulate(x, operator.mul, initial=1)) for x in (before, after)
  )
  common = set(starts) & set(new_starts)

  def group(start: int) -> int:
    return sum(boundary <= start for boundary in common)

  def behind(start: int) -> tuple[int, ...]:
    old = zip(starts, before, view.axes, strict=False)
    return tuple(n for s, size, axis in old if size > 1 and group(s) == group(start) for n in axis)

  return dataclasses.replace(
    view,
    axes=tuple(
      behind(start) if size > 1 else () for start, size in zip(new_starts, after, strict=False)
    ),
  )


_PRODUCTS = {primitives.mul_p, primitives.div_p}

_SAME_AXES = {
  primitives.convert_element_type_p,
  primitives.copy_p,
  primitives.dynamic_slice_p,
  primitives.neg_p,
  primitives.sharding_constraint_p,
  primitives.slice_p,
  compat.stop_gradient_p,
  compat.name_p,
  compat.pvary_p,
}
