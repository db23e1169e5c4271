"""The cost of a traced program, from its jaxpr alone: no compilation, no allocation.

    jaxpr = jax.make_jaxpr(train_step)(state, frozen, batch)     # also of jax.ShapeDtypeStructs
    flops(jaxpr)                  # of products and convolutions; loops times their length
    peak_memory(jaxpr)            # bytes beyond the arguments

The memory is that of a program that runs its equations in order, as XLA would compile it:

- The results of products, reductions, loops and the like are written to memory, and so are the
  operands of products and loops. A reshape or a transpose is a view of the same memory.
- All other operations are fused into the operation that reads them, which keeps their operands
  alive. An operation is written once nevertheless if several operations read it and it is expensive
  (exp, division) or has more than two arrays of about its own size as operands. exp(-x²) counts as
  read by erfc(x) too, which contains it; exact GELU and its gradient have both.
- A fused result reuses the memory of an operand of its size that nothing reads afterwards.
- A loop needs the memory of its stacked results from its start, and that of one step.
- If an argument is overwritten while other results still depend on it (an optimizer's moments,
  which the new parameters depend on too), it is copied at the end.

Other effects of compilers (layouts, padding, copies, another order) are ignored. The tests check
that the result is within a tenth of the figure that XLA reports for whole training steps.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax.extend.core as jex

from lora_jax import compat

_VIEWS = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "stop_gradient", "copy",
                    "name", "sharding_constraint", "pvary", "pcast"})  # fmt: skip
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and",
                         "reduce_or", "argmax", "argmin"})  # fmt: skip
_IN_PLACE = frozenset({"scatter", "scatter-add", "scatter_add", "dynamic_update_slice"})
_KERNELS = _IN_PLACE | {
  "dot_general", "ragged_dot_general", "conv_general_dilated", "sort", "top_k", "cumsum", "cummax",
  "cumlogsumexp", "cumprod", "cummin", "random_bits", "threefry2x32", "scan", "while", "cond",
  "cholesky", "qr", "svd", "eigh", "triangular_solve",
}  # fmt: skip
_EXPENSIVE = frozenset({"exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos",
                        "erf", "erfc", "div", "sqrt", "rsqrt", "cbrt", "pow",
                        "integer_pow"})  # fmt: skip


def flops(jaxpr: jex.ClosedJaxpr) -> int:
  """Returns the floating-point operations of products and convolutions, two per multiply-add.

  A loop of unknown length counts once. For a cond, the most expensive branch counts.
  """
  total = 0
  for eqn in jaxpr.jaxpr.eqns:
    match eqn.primitive.name:
      case "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        total += 2 * eqn.outvars[0].aval.size * _size(eqn.invars[0], contracted)
      case "ragged_dot_general":
        (contracted, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        total += 2 * eqn.outvars[0].aval.size * _size(eqn.invars[0], contracted)
      case "conv_general_dilated":
        _, *inputs = eqn.params["dimension_numbers"].rhs_spec
        total += 2 * eqn.outvars[0].aval.size * _size(eqn.invars[1], inputs)
      case "scan":
        total += eqn.params["length"] * flops(eqn.params["jaxpr"])
      case "while":
        total += flops(eqn.params["body_jaxpr"])
      case "cond":
        total += max(map(flops, eqn.params["branches"]))
      case _:
        inner = _called(eqn)
        total += flops(inner) if inner else 0
  return total


def peak_memory(jaxpr: jex.ClosedJaxpr, *, results_in_place: bool = False) -> int:
  """Returns the largest number of bytes that the program holds at a time beyond its arguments.

  Args:
    jaxpr: the program.
    results_in_place: True if the results overwrite arguments, which were donated.
  """
  arguments = [_Value(_bytes(v), counts=False) for v in jaxpr.jaxpr.invars]
  donated = arguments if results_in_place else ()
  return _peak(jaxpr, arguments, [], results_in_place, donated)


@dataclasses.dataclass(eq=False)
class _Value:
  """An array of the program; `counts` is False if its memory is allocated anyway."""

  size: int
  counts: bool = True


@dataclasses.dataclass(frozen=True)
class _Operation:
  """An equation (but no view or call), and the memory that it needs for itself."""

  name: str
  inputs: tuple[_Value, ...]
  outputs: tuple[_Value, ...]
  inner: int = 0
  carried: tuple[_Value, ...] = ()  # outputs that may reuse the memory of an input
  shared: bool = False  # whether another operation contains it

  @property
  def fused(self) -> bool:
    return self.name not in _KERNELS and self.name not in _REDUCTIONS


def _peak(
  jaxpr: jex.ClosedJaxpr,
  arguments: Sequence[_Value],
  operations: list[_Operation],
  results_in_place: bool,
  donated: Sequence[_Value] = (),
) -> int:
  """The largest number of bytes at a time; `operations` run first and produce arguments."""
  results = set(_flatten(jaxpr, arguments, operations))
  operations = _needed(operations, results)
  sources = _sources(operations, results, results_in_place)

  # A fused operation reads nothing itself; the operation that writes its result does.
  steps = []
  for operation in operations:
    written = [value for value in operation.outputs if sources[value] == {value}]
    if written:
      read = set().union(*(sources.get(value, set()) for value in operation.inputs))
      steps.append((operation, written, read))
  last = {value: n for n, (_, _, read) in enumerate(steps) for value in read}
  last |= {source: len(steps) for value in results for source in sources.get(value, ())}

  peak, total, held = 0, 0, set()
  for n, (operation, written, read) in enumerate(steps):
    dying = {value for value in read & held if last[value] == n}
    for value in operation.carried:
      place = next((x for x in dying if x.size == value.size), None)
      if place:
        dying.remove(place)
        held.remove(place)
        total -= place.size
    made = {value for value in written if value.counts}
    held |= made
    total += sum(value.size for value in made)
    peak = max(peak, total + operation.inner)
    gone = dying | {value for value in made if value not in last}
    held -= gone
    total -= sum(value.size for value in gone)
  return max(peak, total + _copies(donated, operations, sources, results))


def _copies(
  donated: Sequence[_Value],
  operations: Sequence[_Operation],
  sources: dict[_Value, set[_Value]],
  results: set[_Value],
) -> int:
  """The bytes of the arguments that are overwritten while other results depend on them."""
  behind = {value: {value} for value in donated}
  for operation in operations:
    if operation.fused:
      made_of = set().union(*(behind.get(value, ()) for value in operation.inputs))
      behind |= {value: made_of for value in operation.outputs if sources[value] != {value}}
  readers = collections.Counter(
    argument
    for value in results
    for argument in behind.get(value, ())
    if argument.size == value.size
  )
  return sum(argument.size for argument, count in readers.items() if count > 1)


def _flatten(jaxpr, arguments, operations: list[_Operation]) -> list[_Value]:
  """Appends the operations of a program, including those of the functions that it calls."""
  env = dict(zip(jaxpr.jaxpr.invars, arguments, strict=True))
  env |= {v: _Value(_bytes(v), counts=False) for v in jaxpr.jaxpr.constvars}

  made: dict[_Value, tuple[str, _Value]] = {}  # by operations of one operand
  errors: set[_Value] = set()  # operands of erfc

  def read(v) -> _Value:
    return _Value(0, counts=False) if compat.is_literal(v) else env[v]

  for eqn in jaxpr.jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    name, inner = eqn.primitive.name, _called(eqn)
    if name == "optimization_barrier":
      outputs = inputs
    elif name in _VIEWS:
      outputs = inputs[:1]
    elif inner is not None:
      outputs = _flatten(inner, inputs, operations)
    else:
      outputs = [_Value(_bytes(v)) for v in eqn.outvars]
      operation = _operation(eqn, name, inputs, outputs)
      if len(inputs) == 1:
        made[outputs[0]] = name, inputs[0]
      if name == "erfc":
        errors.add(inputs[0])
      if name == "exp" and _squared(inputs[0], made) in errors:
        operation = dataclasses.replace(operation, shared=True)
      operations.append(operation)
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.jaxpr.outvars]


def _squared(value: _Value, made: dict[_Value, tuple[str, _Value]]) -> _Value | None:
  """The x of a value -x², or None."""
  for name in ("neg", "square"):
    operation, value = made.get(value, ("", value))
    if operation != name:
      return None
  return value


def _operation(eqn, name: str, inputs, outputs) -> _Operation:
  inner, carried = 0, ()
  if name == "scan":
    inner = _scan_body(eqn.params)
    carried = outputs[: compat.scan_counts(**eqn.params)[1]]
  elif name == "while":
    body = eqn.params["body_jaxpr"]
    inner = _peak(body, [_Value(_bytes(v), counts=False) for v in body.jaxpr.invars], [], True)
    carried = outputs
  elif name == "cond":
    inner = max(peak_memory(branch, results_in_place=True) for branch in eqn.params["branches"])
  elif name in _IN_PLACE or name not in _KERNELS | _REDUCTIONS:
    carried = outputs
  return _Operation(name, tuple(inputs), tuple(outputs), inner, tuple(carried))


def _scan_body(params) -> int:
  """The memory of one step of a scan; its slices are operations of their own."""
  body, first = params["jaxpr"], sum(compat.scan_counts(**params))
  arguments = [_Value(_bytes(v), counts=False) for v in body.jaxpr.invars]
  slices = []
  for n in range(first, len(arguments)):
    whole, arguments[n] = arguments[n], _Value(arguments[n].size)
    slices.append(_Operation("dynamic_slice", (whole,), (arguments[n],)))
  return _peak(body, arguments, slices, results_in_place=True)


def _needed(operations: Sequence[_Operation], results: set[_Value]) -> list[_Operation]:
  """The operations whose results are read."""
  read, needed = set(results), []
  for operation in reversed(operations):
    if not read.isdisjoint(operation.outputs):
      read.update(operation.inputs)
      needed.append(operation)
  return needed[::-1]


def _sources(
  operations: Sequence[_Operation], results: set[_Value], results_in_place: bool
) -> dict[_Value, set[_Value]]:
  """Maps every value to the written values that it depends on: to itself if it is written."""
  readers = collections.defaultdict(list)
  for operation in operations:
    for value in operation.inputs:
      readers[value].append(operation)
  sources: dict[_Value, set[_Value]] = {}
  for operation in operations:
    behind = set().union(*(sources.get(value, set()) for value in operation.inputs))
    size = max((value.size for value in operation.outputs), default=0)
    large = sum(2 * value.size >= size for value in behind)
    costly = operation.name in _EXPENSIVE or large > 2
    for value in operation.outputs:
      written = (
        not operation.fused
        or any(reader.name in _KERNELS for reader in readers[value])
        or (costly and len(readers[value]) > 1)
        or operation.shared
        or (value in results and not results_in_place)
      )
      sources[value] = {value} if written else behind
  return sources


def _called(eqn) -> jex.ClosedJaxpr | None:
  """The function that an equation calls once with its operands: jit, remat, custom_vjp, …"""
  if eqn.primitive.name in _KERNELS:
    return None
  for value in eqn.params.values():
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
      inner = compat.closed(value)
      if len(inner.jaxpr.invars) == len(eqn.invars):
        return inner
  return None


def _bytes(v) -> int:
  return v.aval.size * v.aval.dtype.itemsize


def _size(v, axes) -> int:
  return math.prod(v.aval.shape[n] for n in axes)
