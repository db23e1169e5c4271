"""Checks that a rule knows all parameters of an equation; otherwise the rule is not used.

A primitive's parameters change between releases of JAX. A rule names the parameters that it reads
and those that it may ignore; its signature is that list. A new release may rename a parameter, or
add one that may change the result. `checked` limits the damage to speed and memory: the rule raises
`NotFactored`, the interpreter evaluates the unchanged equation on materialized weights, and one
warning says so.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Set

import jax.extend.core as jex

from lora_jax import compat
from lora_jax.weights import NotFactored


class UnknownParametersWarning(UserWarning):
  """Warns that this release of JAX gives a primitive parameters that its rule does not know."""


def checked(rules: Mapping[jex.Primitive, Callable]) -> dict[jex.Primitive, Callable]:
  """Returns the rules, each raising `NotFactored` for parameters that it does not know."""
  return {primitive: _checked(primitive, rule) for primitive, rule in rules.items()}


def _checked(primitive: jex.Primitive, rule: Callable) -> Callable:
  parameters = inspect.signature(rule).parameters.values()
  named = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "evaluate"]
  known = frozenset(p.name for p in named)
  read = frozenset(p.name for p in named if p.default is p.empty)
  takes_evaluate = any(p.name == "evaluate" for p in parameters)

  @functools.wraps(rule)
  def with_known_parameters(*operands, evaluate, **params):
    given = params.keys()
    if not read <= given <= known:
      raise _unknown(primitive.name, given - known, read - given)
    if takes_evaluate:
      params["evaluate"] = evaluate
    return rule(*operands, **params)

  return with_known_parameters


def _unknown(primitive: str, unknown: Set[str], missing: Set[str]) -> NotFactored:
  reasons = [f"gives {primitive} the unknown parameter {name!r}" for name in sorted(unknown)]
  reasons += [f"gives {primitive} no parameter {name!r}" for name in sorted(missing)]
  reason = f"JAX {compat.VERSION} {' and '.join(reasons)}"
  _warn_once(reason)
  return NotFactored(reason)


@functools.cache
def _warn_once(reason: str) -> None:
  warnings.warn(
    f"{reason}, so weights that meet it are materialized: results stay right, and speed and memory "
    "are those of full matrices. A newer lora_jax may have a rule for it.",
    UnknownParametersWarning,
    stacklevel=2,
  )
