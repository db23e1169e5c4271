"""The role of each axis of a parameter, found by tracing the function that uses the parameter.

A shape does not show it: (512, 8, 64) may be a query projection (in; out, out), an output
projection (in, in; out), or eight stacked layers. The function does: `dot_general` contracts the
inputs of a leaf and batches over its stacks, `scan` slices stacks, `gather` picks rows by an input,
and a convolution's dimension numbers tell the rest. So the function is traced once, abstractly (no
FLOPs, no memory). Every leaf is followed from the arguments to its uses: through the primitives of
`STEPS`, through nested functions, and through elementwise operations.

    >>> axes = trace_axes(lambda p, x: x @ p["kernel"], params, x)
    >>> axes["kernel"]
    Axes(roles='io', uses=('dot_general',), rows=32)
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import primitives

from lora_jax import compat, steps, tables, tree
from lora_jax.views import PLAIN, Notes, Source, Value, View, either
from lora_jax.weights import is_weight

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Axes:
  """The roles of a leaf's axes.

  Attributes:
    roles: one letter per axis: `i` input, `o` output, `s` stack. Empty if the function never
      contracts or gathers the leaf (biases, norm scales), or if no input or no output remains.
    uses: the primitives that contract or gather the leaf, in order of first use, except that the
      one that determined the roles comes first.
    rows: the number of rows that each of its matrices multiplies, over all uses: tokens for a
      linear layer, positions of the result for a convolution, ids for a look-up. The forward
      products of a leaf thus take 2 · rows · its size FLOPs. A loop of unknown length counts once,
      each branch of a cond counts.
    groups: the number of groups of outputs with separate inputs: the number of channels for a
      depthwise convolution, otherwise 1.
    not_followed: the primitives at which the trace lost the leaf.
    joined: the primitives that add the leaf to activations, or multiply activations by it.
  """

  roles: str
  uses: tuple[str, ...]
  rows: int = 0
  groups: int = dataclasses.field(default=1, repr=False, compare=False)
  not_followed: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)
  joined: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)

  @property
  def reason(self) -> str:
    """The reason why there are no roles; empty if there are."""
    if self.roles:
      return ""
    if self.not_followed:
      return f"not followed: {', '.join(self.not_followed)}"
    if self.uses:
      return f"{', '.join(self.uses)} leaves it no input or no output"
    if self.joined:
      return f"joined with activations ({', '.join(self.joined)})"
    return "the function never contracts it"


class AxesReport(dict[str, Axes]):
  """The result of `trace_axes`, `{path: Axes}`; its `str` is a table."""

  @property
  def reasons(self) -> dict[str, str]:
    """`{path: reason}` for the leaves without roles."""
    return {path: axes.reason for path, axes in self.items() if not axes.roles}

  def __str__(self) -> str:
    kinds = tables.grouped((path, (axes,)) for path, axes in self.items())
    table = tables.rendered(
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
    lost = [f"{path}: {axes.reason}" for path, axes in kinds if axes.not_followed and axes.reason]
    return "\n".join([table, *lost])


_NAMES = {"s": "stack", "i": "in", "o": "out"}


def trace_axes(f: Callable, params: PyTree, *args: Any, **kwargs: Any) -> AxesReport:
  """Returns `{path: Axes}` for every leaf of `params`, by tracing `f(params, *args, **kwargs)`.

  `print` the result for a table.

  If a leaf is used more than once, the first use that leaves it inputs and outputs determines the
  roles (tied embeddings are gathered, then used transposed as the head). Uses together with the
  arguments take precedence over uses with parameters only (a spectral norm's power iteration).

  Args:
    f: the function that uses the parameters.
    params: a pytree of arrays, `jax.ShapeDtypeStruct`s or Weights, of which only shapes are read.
    *args: the other arguments of `f`; arrays may be `jax.ShapeDtypeStruct`s. Pass the inputs here
      and do not close over them: an array that depends on them counts as an activation, an array
      that depends on the parameters alone as a parameter.
    **kwargs: as `args`.

  Raises:
    Exception: the error that `f` raises. An error of Linen gets a note if `params` seem to be given
      to a module's `apply` directly, which takes {"params": params}.
  """
  params = jax.tree.map(lambda x: x.aval if is_weight(x) else x, params, is_leaf=is_weight)
  ndims = {path: len(jax.numpy.shape(x)) for path, x in tree.flatten(params).items()}
  dynamic, static = _split_arguments((args, kwargs))

  def g(params, dynamic):
    args, kwargs = tree.join(dynamic, static)
    return f(params, *args, **kwargs)

  try:
    jaxpr = jax.make_jaxpr(g)(params, dynamic)
  except Exception as error:
    whole = isinstance(params, Mapping) and "params" in params
    # By name: the transform does not import Flax, which takes longer than the rest.
    if type(error).__module__ == "flax.errors" and not whole:
      error.add_note(
        "`apply` of a Linen module takes {'params': params}: trace_axes(lambda params, x: "
        "model.apply({'params': params}, x), params, x)"
      )
    raise
  views = [Value((View.whole(path, ndim),)) for path, ndim in ndims.items()]
  rest = [PLAIN[_source(v.aval)] for v in jaxpr.jaxpr.invars[len(views) :]]
  notes = Notes()
  _follow(jaxpr, [*views, *rest], notes)
  return AxesReport({path: _axes(notes, path, ndim) for path, ndim in ndims.items()})


def _source(argument) -> Source:
  """The source of an argument. Random keys are constants: their values may multiply a kernel."""
  is_key = jnp.issubdtype(argument.dtype, jax.dtypes.prng_key)
  return Source.PARAMETERS if is_key else Source.INPUTS


def _split_arguments(arguments):
  is_array = jax.tree.map(lambda x: hasattr(x, "shape") and hasattr(x, "dtype"), arguments)
  return tree.partition(arguments, is_array)


def _axes(notes: Notes, path: str, ndim: int) -> Axes:
  uses = notes.uses.get(path, ())
  told = [use for use in uses if {"i", "o"} <= {use.roles.get(n, "o") for n in range(ndim)}]
  first = max(told, key=lambda use: use.source, default=None)  # the first of the greatest
  names = dict.fromkeys(use.primitive for use in (*([first] if first else ()), *uses))
  return Axes(
    "".join(first.roles.get(n, "o") for n in range(ndim)) if first else "",
    tuple(names),
    round(sum(use.rows for use in uses)),
    first.groups if first else 1,
    tuple(dict.fromkeys(notes.not_followed.get(path, ()))),
    tuple(dict.fromkeys(notes.joined.get(path, ()))),
  )


# ---- roles without a trace

_CONVOLUTION = re.compile(
  r"((?:.*/)?(?!\w*(?:transpose|local))conv\w*/)(kernel|w)(/(?:raw_)?value)?", re.IGNORECASE
)


def convolution_roles(path: str, leaves: Mapping[str, Any]) -> str:
  """The roles of a convolution's kernel, (*window, in, out), by its name and its bias.

  They apply if the leaf is called `kernel` or `w`, has three to five axes, and is in a module whose
  name begins with `conv` (Conv_0, conv1, conv2_d, but not ConvTranspose or ConvLocal), and if the
  bias next to it has a single axis (out,). The bias proves that the first axis is not a stack:
  layers that a scan or a vmap stacks have stacked biases. Depthwise and grouped kernels are
  (*window, in / groups, out), so they are covered too.

  Empty in all other cases, such as without a bias.

  Args:
    path: the leaf's path.
    leaves: all leaves of the tree, by path.
  """
  found, shape = _CONVOLUTION.fullmatch(path), tuple(leaves[path].shape)
  if found is None or not 3 <= len(shape) <= 5:
    return ""
  module, name, box = found.groups(default="")
  bias = leaves.get(f"{module}{'bias' if name == 'kernel' else 'b'}{box}")
  proven = bias is not None and tuple(bias.shape) == shape[-1:]
  return "i" * (len(shape) - 1) + "o" if proven else ""


def candidates(shape: tuple[int, ...]) -> str:
  """The possible roles of a leaf of this shape, with leading stacks, and their meaning."""
  found = []
  for stacks in range(len(shape) - 1):
    for outputs in range(1, len(shape) - stacks):
      inputs = len(shape) - stacks - outputs
      parts = shape[:stacks], shape[stacks : stacks + inputs], shape[stacks + inputs :]
      stacked, d, k = ("×".join(map(str, part)) for part in parts)
      roles = "s" * stacks + "i" * inputs + "o" * outputs
      found.append(f"{roles!r} ({stacked + ' stacked, ' if stacks else ''}{d} in, {k} out)")
  return ", ".join(found)


def roles_of(path: str, leaves: Mapping[str, Any], axes: Mapping[str, Axes] | None) -> str:
  """The roles of a leaf's axes: the traced ones, (in, out) for two axes, or a convolution's.

  Args:
    path: the leaf's path.
    leaves: all leaves of the tree, by path.
    axes: the result of `trace_axes` for the same tree, or None.

  Raises:
    ValueError: if none of these determines them; the message has the possible roles.
  """
  shape = tuple(leaves[path].shape)
  traced = "" if axes is None else axes[path].roles
  if traced and len(traced) != len(shape):
    raise ValueError(
      f"{path}: its shape is {shape}, and the axes {traced!r} were traced for another; call "
      "lora_jax.trace_axes with the same tree"
    )
  roles = traced or ("io" if len(shape) == 2 else convolution_roles(path, leaves))
  if roles:
    return roles
  found = "the shape does not say it" if axes is None else f"the trace says: {axes[path].reason}"
  raise ValueError(
    f"{path}: which of the axes of {shape} are inputs, outputs or stacked layers? {found}; pass "
    "axes=lora_jax.trace_axes(f, params, *example), with an f that multiplies by this leaf. "
    f"It may have the roles {candidates(shape)}"
  )


# ---- the trace


def _follow(jaxpr: jex.ClosedJaxpr, ins: Sequence[Value], notes: Notes) -> list[Value]:
  """Follows values through a jaxpr and notes the uses of each leaf."""
  env = dict.fromkeys(jaxpr.jaxpr.constvars, PLAIN[Source.CONSTANTS])
  env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))

  def read(v) -> Value:
    if compat.is_literal(v):
      return PLAIN[Source.CONSTANTS if v.aval.shape else Source.PARAMETERS]
    return env.get(v, PLAIN[Source.PARAMETERS])

  for eqn in jaxpr.jaxpr.eqns:
    env.update(zip(eqn.outvars, _step(eqn, list(map(read, eqn.invars)), notes), strict=False))
  return list(map(read, jaxpr.jaxpr.outvars))


def _step(eqn: jex.JaxprEqn, ins: list[Value], notes: Notes) -> list[Value]:
  """Derives the results of one equation and notes uses."""
  lost = [PLAIN[max((x.source for x in ins), default=Source.PARAMETERS)]] * len(eqn.outvars)
  if not lost or not any(x.views for x in ins):
    return lost
  step = STEPS.get(eqn.primitive) or (_call if _functions(eqn) else steps.elementwise)
  try:
    return step(eqn, ins, notes) or lost
  except steps.NotFollowed as reason:
    notes.stop(ins, f"{eqn.primitive.name}{reason}")
    return lost


# ---- nested functions


def _functions(eqn) -> list[jex.ClosedJaxpr]:
  """The functions inside an equation: those of jit, remat, custom_jvp, custom_vjp, shard_map …"""
  held = eqn.params.values()
  return [compat.closed(x) for x in held if isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)]


def _call(eqn, ins, notes):
  for inner in _functions(eqn):
    if len(inner.jaxpr.invars) == len(ins):
      return _follow(inner, ins, notes)
  raise steps.NotFollowed


def _scan(eqn, ins, notes):
  try:
    consts, carry = compat.scan_counts(**eqn.params)
  except KeyError as missing:
    raise steps.NotFollowed(f" (it has no parameter {missing})") from None
  length, body = steps.parameter(eqn, "length"), steps.parameter(eqn, "jaxpr")
  whole = [x.repeated(length) for x in ins[: consts + carry]]
  xs = ins[consts + carry :]
  slices = [x.map(lambda view: view.without((0,))) for x in xs]
  state, ys = _loop(body, whole[:consts], whole[consts:], slices, notes)
  sliced = {(v.path, axis) for x in xs for v in x.views for axis in v.axes[0]}

  def stacked(view):
    return view.inserted(0, tuple(n for n in view.stacks if (view.path, n) in sliced))

  return [
    *(x.repeated(Fraction(1, length or 1)) for x in state),
    *(y.map(stacked) for y in ys),
  ]


def _while(eqn, ins, notes):
  first, second = steps.parameter(eqn, "cond_nconsts"), steps.parameter(eqn, "body_nconsts")
  consts, carry = ins[first : first + second], ins[first + second :]
  state, _ = _loop(steps.parameter(eqn, "body_jaxpr"), consts, carry, [], notes)
  _follow(steps.parameter(eqn, "cond_jaxpr"), [*ins[:first], *state], notes)
  return state


def _loop(body, consts, carry, xs, notes) -> tuple[list[Value], list[Value]]:
  """The carry of a loop, at its start and after any step, and the other results of the body.

  A loop may swap parts of its state, or turn it into a leaf. So the results of the body become its
  next arguments, until nothing changes.
  """
  while True:
    own = Notes()
    outs = _follow(body, [*consts, *carry, *xs], own)
    after = [either(pair) for pair in zip(carry, outs, strict=False)]
    if after == carry:
      notes.extend(own)
      return carry, outs[len(carry) :]
    carry = after


def _cond(eqn, ins, notes):
  outs = [_follow(branch, ins[1:], notes) for branch in steps.parameter(eqn, "branches")]
  index = PLAIN[ins[0].source]
  return [either((*values, index)) for values in zip(*outs, strict=True)]


STEPS = {
  primitives.dot_general_p: steps.dot_general,
  primitives.conv_general_dilated_p: steps.conv_general_dilated,
  compat.ragged_dot_general_p: steps.ragged_dot_general,
  primitives.gather_p: steps.gather,
  primitives.transpose_p: steps.each(steps.transpose),
  primitives.reshape_p: steps.each(steps.reshape),
  primitives.squeeze_p: steps.each(steps.squeeze),
  primitives.broadcast_in_dim_p: steps.each(steps.broadcast_in_dim),
  primitives.slice_p: steps.each(steps.cut),
  primitives.dynamic_slice_p: steps.each(steps.cut),
  primitives.dynamic_update_slice_p: steps.update,
  primitives.concatenate_p: steps.concatenate,
  primitives.pad_p: steps.same,
  primitives.select_n_p: steps.elementwise,
  primitives.mul_p: steps.elementwise,
  primitives.div_p: steps.elementwise,
  primitives.add_p: steps.elementwise,
  primitives.add_jaxvals_p: steps.elementwise,
  primitives.sub_p: steps.elementwise,
  primitives.neg_p: steps.same,
  primitives.rev_p: steps.same,
  primitives.copy_p: steps.same,
  primitives.convert_element_type_p: steps.same,
  primitives.device_put_p: steps.same,
  primitives.sharding_constraint_p: steps.same,
  compat.optimization_barrier_p: steps.same,
  compat.reshard_p: steps.same,
  compat.stop_gradient_p: steps.same,
  compat.name_p: steps.same,
  compat.pvary_p: steps.same,
  compat.split_p: steps.split,
  compat.jit_p: _call,
  compat.remat_p: _call,
  compat.shard_map_p: _call,
  compat.cond_p: _cond,
  compat.while_p: _while,
  compat.scan_p: _scan,
  # Primitives since JAX 0.10; before that, a jit and known steps.
  compat.stack_p: steps.stack,
  compat.unstack_p: steps.unstack,
  compat.tile_p: steps.each(steps.tile),
}
STEPS.pop(None, None)
