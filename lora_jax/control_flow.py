"""Rules for the primitives that hold functions: jit, remat, cond, while, scan and shard_map.

Each but jit, which is inlined, calls the public function again, with Weights passed as the pytrees
that they are: a stacked Weight slices itself inside `lax.scan`, and nothing here rebuilds a
primitive's parameters. What has a derivative of its own (`custom_jvp`, `custom_vjp`) has no rule:
to look inside would throw the author's gradient away, so a Weight that reaches one is materialised.
"""

import jax
from jax import lax

from lora_jax import compat
from lora_jax.weights import NotFactored, is_weight
from lora_jax.weights.low_rank import PRODUCT


def jit(*args, evaluate, jaxpr, name, **_):
  # Not wrapped in a jit again: one made anew here would be compiled anew at every eager call, and
  # inside another jit it would make no difference.
  with jax.named_scope(name):
    return evaluate(jaxpr, args)


def remat(*args, evaluate, jaxpr, policy, prevent_cse, **_):
  def body(*args):
    return evaluate(compat.closed(jaxpr), args)

  return jax.checkpoint(body, policy=policy and _unaware(policy), prevent_cse=prevent_cse)(*args)


def cond(index, *args, evaluate, branches, **_):
  def branch(jaxpr):
    return lambda *args: _arrays(evaluate(jaxpr, args), "a branch returns the weight itself")

  return lax.switch(index, [branch(jaxpr) for jaxpr in branches], *args)


def while_loop(
  *args, evaluate, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts, **_
):  # fmt: skip
  cond_consts, body_consts, carry = _split(args, cond_nconsts, body_nconsts)
  moving = _Carry(body_jaxpr, body_nconsts, carry)

  def cond_fun(state):
    return evaluate(cond_jaxpr, (*cond_consts, *moving.full(state)))[0]

  def body_fun(state):
    return moving.changed(evaluate(body_jaxpr, (*body_consts, *moving.full(state))))

  return moving.full(lax.while_loop(cond_fun, body_fun, moving.changed(carry)))


def scan(*args, evaluate, jaxpr, num_consts, num_carry, length, reverse, unroll, **_):
  consts, carry, xs = _split(args, num_consts, num_carry)
  for x in filter(is_weight, xs):
    if not x.is_stacked:
      raise NotFactored("scan slices an axis of it that is no stack")
  moving = _Carry(jaxpr, num_consts, carry)

  def body(state, x):
    outs = evaluate(jaxpr, (*consts, *moving.full(state), *x))
    ys = _arrays(outs[num_carry:], "the scanned function returns a slice of the weight")
    return moving.changed(outs[:num_carry]), ys

  state, ys = lax.scan(body, moving.changed(carry), xs, length, reverse, unroll)
  return [*moving.full(state), *ys]


def shard_map(
  *args, evaluate, jaxpr, mesh, in_specs, out_specs, check_vma, **axes
):  # fmt: skip
  def body(*args):
    outs = evaluate(compat.closed(jaxpr), args)
    return tuple(_arrays(outs, "the mapped function returns the weight itself"))

  specs = tuple(
    x.local_specs(spec) if is_weight(x) else spec for x, spec in zip(args, in_specs, strict=True)
  )
  return jax.shard_map(
    body, mesh=mesh, in_specs=specs, out_specs=tuple(out_specs), check_vma=check_vma,
    axis_names=compat.manual_axes(**axes),
  )(*args)  # fmt: skip


class _Carry:
  """A loop's carry without the Weights in it, which the loop must only pass along.

  A loop's state is often the parameters and something that changes. What the body returns as it
  got it need not be carried at all.
  """

  def __init__(self, jaxpr, num_consts, carry):
    inner = jaxpr.jaxpr
    received = inner.invars[num_consts : num_consts + len(carry)]
    for x, before, after in zip(carry, received, inner.outvars, strict=False):
      if is_weight(x) and before is not after:
        raise NotFactored("a loop changes it from one step to the next")
    self.carry = carry

  def changed(self, carry):
    """The part of a full carry that changes."""
    changed = [x for x, start in zip(carry, self.carry, strict=False) if not is_weight(start)]
    return _arrays(changed, "a loop's state turns into the weight itself")

  def full(self, changed):
    """The whole carry again."""
    rest = iter(changed)
    return [start if is_weight(start) else next(rest) for start in self.carry]


def _unaware(policy):
  """The policy of a function that does not know of the name that adapted products have.

  One that keeps whatever has a name, or any name but some, shall not keep more for it.
  """

  def decide(primitive, *avals, **params):
    keep = policy(primitive, *avals, **params)
    if primitive is compat.name_p and params["name"] == PRODUCT:
      return keep and not policy(primitive, *avals, **params | {"name": ""})
    return keep

  return decide


def _arrays(outs, reason):
  if any(map(is_weight, outs)):
    raise NotFactored(reason)
  return outs


def _split(args, n, m):
  return args[:n], args[n : n + m], args[n + m :]


RULES = {
  compat.jit_p: jit,
  compat.remat_p: remat,
  compat.cond_p: cond,
  compat.while_p: while_loop,
  compat.scan_p: scan,
  compat.shard_map_p: shard_map,
}
