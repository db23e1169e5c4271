"""Second moments of the inputs of a model's kernels, from example batches.

    moments = second_moments(f, params, paths, batches, axes=trace_axes(f, params, batch))
    moments["block_0/query/kernel"].total    # the sum of x xᵀ over all rows x: [inputs, inputs]
    moments["block_0/query/kernel"].rows     # the number of rows

EVA starts from them; activation-aware compression and pruning use them as weights. The model is not
modified. A kernel is replaced by a `Probe`, the same array with slots of zeros alongside it, whose
cotangents are defined as the moments of the kernel's input rows. The gradient by the slots is their
sum over all uses, through jit, scan, remat and all else that JAX differentiates; layers stacked for
a scan have separate slots. The gradient of the loss is not used, so no backward pass remains in the
compiled program.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import compat, tree
from lora_jax.axes import Axes, roles_of
from lora_jax.targets import axes_of
from lora_jax.transform import RULES, adapt
from lora_jax.weights import is_weight
from lora_jax.weights.factor_axes import part_sizes
from lora_jax.weights.probe import Moments, Probe

PyTree = Any


def second_moments(
  f: Callable,
  params: PyTree,
  paths: Iterable[str],
  batches: Iterable[PyTree],
  *,
  axes: Mapping[str, Axes] | None = None,
  diagonal: bool = False,
  mask: Callable[[PyTree], jax.Array] | None = None,
) -> dict[str, Moments]:
  """Returns `{path: Moments}` of the inputs of kernels, in float32.

  One program is compiled for each shape of batch. Memory is that of a forward pass and of the
  result: d² values for a kernel of d inputs, so request only as many paths at a time as fit.
  Kernels with a common input (query, key, value) share the work, not the memory.

  Args:
    f: `f(params, batch)`. Its result, or some float in it, must depend on the kernels by a path
      that JAX can differentiate in reverse: no while loop without a fixed number of steps.
    params: the first argument of `f`; Weights may be among the leaves.
    paths: the kernels: leaves that are used in products, convolutions or products by groups of rows
      (`lax.ragged_dot`), with all inputs contracted at once. No embeddings, since they have no
      inputs.
    batches: the second arguments of `f`; each is read once.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `paths`.
    diagonal: True to sum x² instead of x xᵀ: d values per kernel.
    mask: maps a batch to the rows that count: ones, and zeros for padding. Its shape is that of the
      leading axes of every kernel's input, or all rows in one axis: [batch, tokens] for a language
      model. Without it every row counts.

  Raises:
    ValueError: if a path is not a leaf or is used in another way, if there is no batch, if the mask
      and a kernel's input differ in their rows, or if no row counted.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  paths = paths if isinstance(paths, Mapping) else tuple(paths)
  axes = axes_of(paths, axes, leaves)
  missing = sorted(set(paths) - set(leaves))
  if missing:
    raise ValueError(f"the tree has no leaf at {', '.join(missing)}, whose moments are requested")
  roles = {path: roles_of(path, leaves, axes) for path in paths}

  @functools.partial(jax.jit, donate_argnums=0)
  def add(totals, params, batch):
    counted = None if mask is None else mask(batch)
    moments = batch_moments(f, params, batch, roles, diagonal=diagonal, mask=counted)
    return jax.tree.map(jnp.add, totals, moments)

  totals = {path: _zeros(leaves[path].shape, roles[path], diagonal) for path in paths}
  empty = True
  for batch in batches:
    totals, empty = add(totals, params, batch), False
  if empty:
    raise ValueError("there is no batch to take second moments from")
  unseen = [path for path in paths if not totals[path].rows.any()]
  if unseen:
    raise ValueError(
      f"no row counted for {', '.join(unseen)}: the mask is zero, the function does not use them, "
      "or its result does not depend on them by a path with a gradient (stop_gradient cuts it)"
    )
  return totals


def batch_moments(
  f: Callable,
  params: PyTree,
  batch: PyTree,
  roles: Mapping[str, str],
  *,
  diagonal: bool = False,
  mask: jax.Array | None = None,
) -> dict[str, Moments]:
  """Returns `{path: Moments}` of one batch, for your own loop; call it under `jax.jit`.

  Args:
    f: as in `second_moments`.
    params: as in `second_moments`.
    batch: the second argument of `f`.
    roles: the kernels, by path, with the roles of their axes.
    diagonal: as in `second_moments`.
    mask: the rows that count, as returned by the `mask` of `second_moments`.

  Raises:
    ValueError: as `second_moments`, except for errors that depend on values.
  """
  # The barriers of remat are dropped: no backward pass will recompute anything.
  probed = adapt(f, rules=RULES | {compat.remat_p: _inlined})

  leaves = tree.flatten(params, is_leaf=is_weight)
  moments = {path: _zeros(leaves[path].shape, roles[path], diagonal) for path in roles}
  probes = {
    path: Probe.on(leaves[path], moments[path], mask, roles=roles[path].lstrip("s"), path=path)
    for path in roles
  }

  def result(slots):
    def probe(path, leaf):
      if path not in probes:
        return leaf
      total, rows = slots[path]
      return dataclasses.replace(probes[path], total=total, rows=rows)

    outs = jax.tree.leaves(probed(tree.map_with_path(probe, params, is_leaf=is_weight), batch))
    floats = [jnp.sum(y, dtype=jnp.float32) for y in outs if jnp.issubdtype(y.dtype, jnp.floating)]
    if not floats:
      raise ValueError("the function returns no float; let it return its last layer's result")
    return sum(floats)

  found = jax.grad(result)({path: (probe.total, probe.rows) for path, probe in probes.items()})
  return {
    path: Moments(total.reshape(moments[path].total.shape), rows)
    for path, (total, rows) in found.items()
  }


def _zeros(shape, roles: str, diagonal: bool) -> Moments:
  stack = part_sizes(shape, roles, "s", 0)
  d = math.prod(part_sizes(shape, roles, "i", 0))
  return Moments(jnp.zeros((*stack, *(d,) * (2 - diagonal))), jnp.zeros(stack))


def _inlined(*args, evaluate, jaxpr, **_):
  return evaluate(compat.closed(jaxpr), args)
