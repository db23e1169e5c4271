"""Every line that depends on the version of JAX; nothing else in the library does.

Only public names are used (`jax.core`, `jax.extend.core`); the private ones are what made earlier
libraries of this kind stop importing.
"""

import functools
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

cond_p = primitives.cond_p
while_p = primitives.while_p
scan_p = primitives.scan_p

# No public module names the following primitives, or not in every release that is supported, so
# each is asked of a public function that binds it.


def _equation(f, *avals: jax.ShapeDtypeStruct) -> jex.JaxprEqn:
  """The first equation of a function."""
  return jax.make_jaxpr(f)(*avals).eqns[0]


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The array as one that differs along the axes of a mesh, inside `shard_map`."""
  if hasattr(lax, "pcast"):  # JAX 0.8.1
    return lax.pcast(x, axes, to="varying")
  return lax.pvary(x, axes)


def _on_mesh(x):
  mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  along_x = functools.partial(vary, axes=("x",))
  return jax.shard_map(along_x, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("x"))(x)


_scalar = jax.ShapeDtypeStruct((), jnp.float32)
jit_p = _equation(jax.jit(lax.sin), _scalar).primitive
remat_p = _equation(jax.checkpoint(lax.sin), _scalar).primitive
stop_gradient_p = _equation(lax.stop_gradient, _scalar).primitive
name_p = _equation(functools.partial(checkpoint_name, name=""), _scalar).primitive
ragged_dot_general_p = _equation(
  lax.ragged_dot,
  jax.ShapeDtypeStruct((1, 1), jnp.float32),
  jax.ShapeDtypeStruct((1, 1, 1), jnp.float32),
  jax.ShapeDtypeStruct((1,), jnp.int32),
).primitive
_DebugInfo = type(jax.make_jaxpr(lax.sin)(_scalar).jaxpr.debug_info)
_mapped = _equation(_on_mesh, jax.ShapeDtypeStruct((1,), jnp.float32))
shard_map_p = _mapped.primitive
pvary_p = _mapped.params["jaxpr"].eqns[0].primitive


def bind_unchanged(eqn: jex.JaxprEqn, args: list[Any]) -> list[Any]:
  """Evaluates one equation as JAX itself would, whatever its primitive and parameters are.

  The equation is run as a jaxpr of its own: how a primitive's parameters are turned into those of
  its `bind` differs between primitives and releases, and `eval_jaxpr` knows.
  """
  pairs = [(v, x) for v, x in zip(eqn.invars, args, strict=True) if not is_literal(v)]
  jaxpr = jex.Jaxpr(
    constvars=(),
    invars=[v for v, _ in pairs],
    outvars=eqn.outvars,
    eqns=[eqn],
    effects=eqn.effects,
    debug_info=_DebugInfo("equation", eqn.primitive.name, (), ()),
  )
  return jax.core.eval_jaxpr(jaxpr, (), *(x for _, x in pairs))


def manual_axes(*, newly_manual_axes=None, manual_axes=None) -> frozenset[str]:
  """The mesh axes that a `shard_map` is over, from its parameters."""
  return manual_axes if newly_manual_axes is None else newly_manual_axes  # JAX 0.10


def is_literal(v: Any) -> bool:
  return isinstance(v, jex.Literal)


def closed(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> jex.ClosedJaxpr:
  """The jaxpr with its (possibly empty) constants."""
  return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def name_scope(eqn: jex.JaxprEqn):
  """Re-enters the named scope in which an equation was traced, so that profiles stay readable."""
  return jax.named_scope(str(eqn.source_info.name_stack))
