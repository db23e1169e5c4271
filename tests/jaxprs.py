"""Looking into traced functions: which values of which shapes do they form, and what compiles?"""

import collections
import contextlib
import math
from collections.abc import Iterator

import jax
import jax.extend.core as jex


def equations(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> Iterator[jex.JaxprEqn]:
  """Every equation, those of inner jaxprs included."""
  inner = jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
  for eqn in inner.eqns:
    yield eqn
    for value in eqn.params.values():
      for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, jex.Jaxpr | jex.ClosedJaxpr):
          yield from equations(part)


def primitives(f, *args) -> collections.Counter:
  """How often each primitive stands in the trace of `f(*args)`, by name."""
  return collections.Counter(eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(*args)))


def full_size_values(f, args, matrices: set[tuple[int, ...]]) -> int:
  """How many values `f(*args)` forms that have all the axes of one of these matrices.

  The axes count in any order, among others, or joined into one. Values of equations that only
  hold an inner jaxpr are left out: they are formed inside.

  Args:
    f: a function.
    args: its arguments.
    matrices: the sizes of the axes of each matrix, chosen so that nothing else has them.
  """
  values = (
    v.aval.shape
    for eqn in equations(jax.make_jaxpr(f)(*args))
    if not any(isinstance(p, jex.Jaxpr | jex.ClosedJaxpr) for p in eqn.params.values())
    for v in eqn.outvars
    if hasattr(v.aval, "shape")
  )
  return sum(any(_holds(shape, matrix) for matrix in matrices) for shape in values)


def _holds(shape: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
  axes = collections.Counter(shape)
  return math.prod(matrix) in axes or collections.Counter(matrix) <= axes


_listening: list[list[str]] = []


def _listen(event: str, duration: float, **_):
  for events in _listening:
    if "/compile/" in event:
      events.append(event)


# Once and for all: a listener cannot be taken back in every release.
jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """Collects what JAX traces and compiles meanwhile."""
  events: list[str] = []
  _listening.append(events)
  try:
    yield events
  finally:
    _listening.remove(events)
