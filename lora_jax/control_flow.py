"""Rules for the primitives that contain functions: jit, remat, cond, while, scan and shard_map.

`jit` is inlined. Each other rule calls the public function again and passes Weights as the pytrees
that they are: a stacked Weight slices itself inside `lax.scan`, and no primitive's parameters are
rebuilt here. Only a Weight that the function cannot keep is materialized.

Functions with their own derivative (`custom_jvp`, `custom_vjp`) have no rule: interpreting their
body would discard the author's gradient, so a Weight that reaches one is materialized.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

from lora_jax import compat
from lora_jax.parameters import checked
from lora_jax.rules import constrained
from lora_jax.weights import NotFactored, base, is_weight
from lora_jax.weights.low_rank import PRODUCT


def jit(
  *args,
  evaluate,
  jaxpr,
  name,
  in_shardings=(),
  out_shardings=(),
  in_layouts=None,
  out_layouts=None,
  donated_invars=None,
  ctx_mesh=None,
  keep_unused=None,
  inline=None,
  compiler_options_kvs=None,
):
  # Not wrapped in a new jit: it would be compiled again at every eager call, and inside another jit
  # it would make no difference. So the parameters for compilation have no effect.
  del in_layouts, out_layouts, donated_invars, ctx_mesh, keep_unused, inline, compiler_options_kvs
  with jax.named_scope(name):
    return _placed(evaluate(jaxpr, _placed(args, in_shardings)), out_shardings)


def _placed(values, shardings):
  """The values with the shardings that a jit asks for; most ask for none."""
  if not any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings):
    return values
  return [
    constrained(x, sharding) if isinstance(sharding, jax.sharding.Sharding) else x
    for x, sharding in zip(values, shardings, strict=True)
  ]


def remat(*args, evaluate, jaxpr, policy, prevent_cse, differentiated):
  def body(*args):
    if differentiated and prevent_cse:
      # As JAX does when it lowers a remat in a backward pass: without the barrier the compiler
      # merges the recomputation with the first computation, and keeps that in memory.
      args = lax.optimization_barrier(args)
    return evaluate(compat.closed(jaxpr), args)

  return jax.checkpoint(body, policy=policy and _unaware(policy), prevent_cse=prevent_cse)(*args)


def cond(index, *args, evaluate, branches):
  if is_weight(index):
    index = evaluate.array(index, "it chooses the branch")
  returned = [
    jax.eval_shape(lambda args, jaxpr=jaxpr: evaluate(jaxpr, args), args) for jaxpr in branches
  ]
  kept = [all(map(is_weight, outs)) and _same(outs) for outs in zip(*returned, strict=True)]

  def branch(jaxpr):
    def outs(*args):
      return [
        x if keep else evaluate.array(x, "a branch returns the weight itself")
        for x, keep in zip(evaluate(jaxpr, args), kept, strict=True)
      ]

    return outs

  return lax.switch(index, [branch(jaxpr) for jaxpr in branches], *args)


def while_loop(*args, evaluate, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts):
  cond_consts, body_consts, carry = _split(args, cond_nconsts, body_nconsts)

  def one_step(carry):
    return evaluate(body_jaxpr, (*body_consts, *carry))

  moving = _Carry(body_jaxpr, body_nconsts, carry, one_step, evaluate)

  def cond_fun(state):
    return evaluate(cond_jaxpr, (*cond_consts, *moving.full(state)))[0]

  def body_fun(state):
    return moving.changed(one_step(moving.full(state)))

  return moving.full(lax.while_loop(cond_fun, body_fun, moving.start))


def scan(
  *args,
  evaluate,
  jaxpr,
  length,
  reverse,
  unroll,
  num_consts=None,
  num_carry=None,
  ft_in=None,
  ft_out=None,
  linear=None,
  _split_transpose=None,
):
  del ft_out, linear, _split_transpose  # the first follows from the rest; the others affect speed
  try:
    num_consts, num_carry = compat.scan_counts(num_consts, num_carry, ft_in)
  except (KeyError, TypeError, ValueError, AttributeError):
    reason = f"JAX {compat.VERSION} does not say which operands a scan slices"
    raise NotFactored(reason) from None
  consts, carry, xs = _split(args, num_consts, num_carry)
  xs = [
    x if base.is_stacked(x) else evaluate.array(x, "scan slices an axis of it that is not a stack")
    for x in xs
  ]
  slices = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)

  def one_step(carry):
    return jax.eval_shape(lambda carry, x: evaluate(jaxpr, (*consts, *carry, *x)), carry, slices)

  moving = _Carry(jaxpr, num_consts, carry, one_step, evaluate)

  def body(state, x):
    outs = evaluate(jaxpr, (*consts, *moving.full(state), *x))
    ys = [
      y if _stackable(y) else evaluate.array(y, "the scanned function returns a slice of it")
      for y in outs[num_carry:]
    ]
    return moving.changed(outs), ys

  state, ys = lax.scan(body, moving.start, xs, length, reverse, unroll)
  return [*moving.full(state), *ys]


def shard_map(
  *args,
  evaluate,
  jaxpr,
  mesh,
  in_specs,
  out_specs,
  check_vma,
  manual_axes=None,
  newly_manual_axes=None,
):
  args, specs = list(args), list(in_specs)
  for n, x in enumerate(args):
    if is_weight(x):
      try:
        args[n], specs[n] = base.aligned(x), x.local_specs(in_specs[n])
      except NotFactored as reason:
        args[n] = evaluate.array(x, str(reason))

  def body(*args):
    outs = evaluate(compat.closed(jaxpr), args)
    return tuple(evaluate.array(x, "the mapped function returns the weight itself") for x in outs)

  names = newly_manual_axes if manual_axes is None else manual_axes  # renamed in JAX 0.8.1
  assert names is not None
  return jax.shard_map(
    body,
    mesh=mesh,
    in_specs=tuple(specs),
    out_specs=tuple(out_specs),
    check_vma=check_vma,
    axis_names=names,
  )(*args)


class _Carry:
  """A loop's carry, without the Weights that the loop passes on unchanged.

  A loop's state often consists of the parameters and of values that change. Weights that the body
  changes stay Weights if the body returns them with the structure that they had; others are
  materialized.
  """

  def __init__(
    self,
    jaxpr: jex.ClosedJaxpr,
    num_consts: int,
    carry: Sequence[Any],
    one_step: Callable[[Sequence[Any]], Sequence[Any]],
    evaluate: Any,
  ):
    """Decides which values are carried.

    Args:
      jaxpr: the body, a function of constants and carry.
      num_consts: the number of constants.
      carry: the carry at the start.
      one_step: evaluates the body on a carry; only the structure of its results is used.
      evaluate: the interpreter.
    """
    self.evaluate = evaluate
    self.carry = list(carry)
    inner = compat.closed(jaxpr).jaxpr
    self.passed = [
      is_weight(x) and _origin(inner, inner.outvars[n]) == num_consts + n
      for n, x in enumerate(carry)
    ]
    undecided = [n for n, x in enumerate(carry) if is_weight(x) and not self.passed[n]]
    while undecided:
      outs = jax.eval_shape(one_step, self.carry)
      other = [n for n in undecided if not _same((self.carry[n], outs[n]))]
      if not other:
        break
      for n in other:
        self.carry[n] = evaluate.array(self.carry[n], "a loop changes it from one step to the next")
      undecided = [n for n in undecided if n not in other]

  @property
  def start(self) -> list[Any]:
    """The changing part of the carry, at the start."""
    return [x for x, passed in zip(self.carry, self.passed, strict=True) if not passed]

  def changed(self, outs: Sequence[Any]) -> list[Any]:
    """The changing part of the body's results."""
    return [
      x
      if is_weight(start)
      else self.evaluate.array(x, "a loop's state turns into the weight itself")
      for x, start, passed in zip(outs, self.carry, self.passed, strict=False)
      if not passed
    ]

  def full(self, changed: Sequence[Any]) -> list[Any]:
    """The whole carry, from its changing part."""
    rest = iter(changed)
    return [
      start if passed else next(rest) for start, passed in zip(self.carry, self.passed, strict=True)
    ]


def _origin(jaxpr: jex.Jaxpr, v: Any) -> int | None:
  """The argument of a jaxpr that calls and loops pass on as a value; None if there is none."""
  if compat.is_literal(v):
    return None
  if v in jaxpr.invars:
    return jaxpr.invars.index(v)
  eqn = next((eqn for eqn in jaxpr.eqns if v in eqn.outvars), None)
  if eqn is None:
    return None
  place = eqn.outvars.index(v)
  if eqn.primitive in (compat.jit_p, compat.remat_p):
    skipped, inner = 0, eqn.params["jaxpr"]
  elif eqn.primitive is compat.while_p:
    skipped, inner = eqn.params["cond_nconsts"], eqn.params["body_jaxpr"]
  elif eqn.primitive is compat.scan_p:
    skipped, inner = 0, eqn.params["jaxpr"]
  else:
    return None
  inner = compat.closed(inner).jaxpr
  origin = _origin(inner, inner.outvars[place])
  if eqn.primitive in (compat.while_p, compat.scan_p):
    # A loop passes a value on if its body returns it in the place where it got it.
    first = (
      eqn.params["body_nconsts"]
      if eqn.primitive is compat.while_p
      else compat.scan_counts(**eqn.params)[0]
    )
    if origin != first + place:
      return None
  return None if origin is None else _origin(jaxpr, eqn.invars[skipped + origin])


def _same(values: Sequence[Any]) -> bool:
  """True if Weights have one structure and the same shapes and dtypes."""
  if not all(map(is_weight, values)) or not base.alike(values):
    return False
  kinds = {tuple((x.shape, x.dtype) for x in jax.tree.leaves(value)) for value in values}
  return len(kinds) == 1


def _stackable(x: Any) -> bool:
  """True if stacking every array of x stacks x, as a scan does with its results."""
  wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), x)
  return not is_weight(x) or wide.is_stacked


def _unaware(policy):
  """The policy as it would act on a function without our name for adapted products.

  A policy that saves every named value, or all but some, must not save extra values because of our
  name.
  """

  def decide(primitive, *avals, **params):
    keep = policy(primitive, *avals, **params)
    if primitive is compat.name_p and params["name"] == PRODUCT:
      return keep and not policy(primitive, *avals, **params | {"name": ""})
    return keep

  return decide


def _split(args, n, m):
  return args[:n], args[n : n + m], args[n + m :]


RULES = checked(
  {
    compat.jit_p: jit,
    compat.remat_p: remat,
    compat.cond_p: cond,
    compat.while_p: while_loop,
    compat.scan_p: scan,
    compat.shard_map_p: shard_map,
  }
)
