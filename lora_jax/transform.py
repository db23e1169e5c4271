"""The transform: lets any JAX function take Weights wherever it takes arrays.

    logits = adapt(model.apply)({"params": weights}, tokens)

The function is traced once, with every Weight replaced by the array that it represents, and the
resulting jaxpr is evaluated again with the Weights themselves. Only equations with a Weight among
their operands are interpreted (`rules.py`, `control_flow.py`); all others run unchanged.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from lora_jax import compat, control_flow, rules, tree
from lora_jax.weights import NotFactored, Weight, is_weight, materialize
from lora_jax.weights.broadcast import Broadcast

RULES: dict[jex.Primitive, Callable] = rules.RULES | control_flow.RULES


class MaterializationError(ValueError):
  """Raised in strict mode where a Weight would have to be materialized."""


def adapt(
  f: Callable,
  *,
  strict: bool = False,
  rules: Mapping[jex.Primitive, Callable] = RULES,
) -> Callable:
  """Lets `f` take Weights wherever it takes arrays.

  The law:

      adapt(f)(tree, x) == f(materialize(tree), x)

  For a weight that can be applied in factored form, no intermediate value has the full weight's
  shape, forward or backward.

  `f` is traced as under `jax.jit`: arrays are tracers inside it. All other arguments (Python
  numbers, bools, strings, functions, None) reach it unchanged. Without a Weight among the arguments
  `adapt(f)` is `f`. `jax.jit`, `jax.grad`, `jax.vmap` and other transforms may be applied inside or
  outside; an outer `jit` removes all Python overhead.
  Args:
    f: a function of pytrees, for instance a Flax `model.apply`.
    strict: True to raise an error instead of materializing a Weight.
    rules: the treatment of primitives with a Weight operand, `{primitive: rule}`. Extend the
      default by `adapt(f, rules=RULES | {p: rule})`; `rules.py` explains rules.

  Raises:
    MaterializationError: in strict mode, with the path, the primitive, the reason and a remedy.
  """

  @functools.wraps(f)
  def adapted(*args, **kwargs):
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
    if not any(is_weight(leaf) for _, leaf in leaves):
      return f(*args, **kwargs)
    values = [_named(leaf, key_path) if is_weight(leaf) else leaf for key_path, leaf in leaves]
    dynamic = [n for n, x in enumerate(values) if is_weight(x) or _is_array(x)]

    def flat_f(*arrays):
      full = list(values)
      for n, x in zip(dynamic, arrays, strict=True):
        full[n] = x
      f_args, f_kwargs = jax.tree.unflatten(treedef, full)
      return f(*f_args, **f_kwargs)

    inputs = [_formed(values[n]) for n in dynamic]
    abstract = [x.aval if is_weight(x) else x for x in inputs]
    jaxpr, shapes = jax.make_jaxpr(flat_f, return_shape=True)(*abstract)
    outs = evaluate(jaxpr, inputs, rules=rules, strict=strict)
    for out in filter(is_weight, outs):
      if strict:
        raise _refusal(out, "return", "the function returns the weight itself")
    return jax.tree.unflatten(jax.tree.structure(shapes), materialize(outs))

  return adapted


def evaluate(
  jaxpr: jex.ClosedJaxpr,
  args: Sequence[Any],
  *,
  rules: Mapping[jex.Primitive, Callable],
  strict: bool,
) -> list[Any]:
  """Evaluates a jaxpr on arrays and Weights; its results may be Weights too."""
  return _Evaluate(rules, strict)(jaxpr, args)


@dataclasses.dataclass(frozen=True)
class _Evaluate:
  """The interpreter, in the form that rules receive it."""

  rules: Mapping[jex.Primitive, Callable]
  strict: bool

  def __call__(self, jaxpr: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, args, strict=True))
    waiting: list[jex.JaxprEqn] = []  # equations without a Weight, evaluated together

    def evaluate_waiting():
      if waiting:
        env.update(compat.evaluated(waiting, env))
        waiting.clear()

    for eqn in jaxpr.jaxpr.eqns:
      if not any(is_weight(env.get(v)) for v in eqn.invars if not compat.is_literal(v)):
        waiting.append(eqn)
        continue
      evaluate_waiting()
      with compat.name_scope(eqn):
        outs = self._interpret(eqn, [_read(env, v) for v in eqn.invars], jaxpr, env)
      env.update(zip(eqn.outvars, outs, strict=True))
    evaluate_waiting()
    return [_read(env, v) for v in jaxpr.jaxpr.outvars]

  def array(self, x: Any, reason: str) -> jax.Array:
    """The operand, materialized if it is a Weight: for rules that cannot keep it.

    Raises:
      NotFactored: in strict mode.
    """
    if self.strict and is_weight(x):
      raise NotFactored(reason, x)
    return materialize(x)

  def _interpret(self, eqn, ins, jaxpr, env) -> list[Any]:
    """Evaluates an equation with a Weight, by its rule or on materialized weights."""
    try:
      if eqn.primitive not in self.rules:
        raise NotFactored(f"there is no rule for {eqn.primitive.name}")
      rule, operands = self.rules[eqn.primitive], ins
      if eqn.primitive in _BY_VECTORS and rule is RULES[eqn.primitive]:
        operands = [
          x if is_weight(x) else _unbroadcast(v, x, eqn.outvars[0].aval.shape, jaxpr, env)
          for v, x in zip(eqn.invars, ins, strict=True)
        ]
      outs = rule(*operands, evaluate=self, **eqn.params)
      return list(outs) if isinstance(outs, list | tuple) else [outs]
    except NotFactored as reason:
      if self.strict:
        weight = reason.weight or next(filter(is_weight, ins))
        raise _refusal(weight, eqn.primitive.name, str(reason)) from None
    return compat.bind_unchanged(eqn, materialize(ins))


# Their rules take a vector as it was before the broadcast; a user's own rule takes arrays.
_BY_VECTORS = frozenset({primitives.mul_p, primitives.div_p})


def _unbroadcast(v, x, shape, jaxpr, env) -> Any:
  """Returns the vector that an operand was before its broadcast to a shape, if it was one."""
  if jnp.ndim(x) and jnp.shape(x) != shape:
    return Broadcast.of(x, shape, tuple(range(len(shape))))
  for eqn in jaxpr.jaxpr.eqns:
    if v in eqn.outvars and eqn.primitive is primitives.broadcast_in_dim_p and len(eqn.invars) == 1:
      vector = jnp.asarray(_read(env, eqn.invars[0]))
      return Broadcast.of(vector, shape, tuple(eqn.params["broadcast_dimensions"]))
  return x


def _read(env, v):
  return v.val if compat.is_literal(v) else env[v]


def _refusal(weight: Weight, primitive: str, reason: str) -> MaterializationError:
  return MaterializationError(
    f"{weight.path}: {primitive} would materialize this {type(weight).__name__} of shape "
    f"{weight.shape}: {reason}. Leave this path out of the targets, give adapt a rule "
    f"(rules=RULES | {{primitive: rule}}), or use strict=False."
  )


def _named(weight: Weight, key_path) -> Weight:
  """The weight with a path for messages: the one from `attach`, or its place in the arguments."""
  if weight.path:
    return weight
  _argument, *rest = key_path
  return weight.with_path(tree.path_string(tuple(rest)))


def _formed(x: Any) -> Any:
  """The argument itself, or the array of a weight that saves nothing by staying factored."""
  return x.materialize() if is_weight(x) and x.IS_DENSE else x


def _is_array(x: Any) -> bool:
  # NumPy scalars do not count: like Python numbers, they may be sizes, counts or axes.
  return isinstance(x, jax.Array | np.ndarray)
