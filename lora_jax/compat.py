"""Every line that depends on the version of JAX; nothing else in the library does.

Only public names are used (`jax.core`, `jax.extend.core`). Private names would break the import
with a later release.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

VERSION = metadata.version("jax")

cond_p = primitives.cond_p
while_p = primitives.while_p
scan_p = primitives.scan_p

# The following primitives have no public name in every supported release, so each is read from the
# jaxpr of a public function that binds it.


def _equation(f, *avals: jax.ShapeDtypeStruct) -> jex.JaxprEqn:
  """The first equation of a function."""
  return jax.make_jaxpr(f)(*avals).eqns[0]


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The array marked as varying along mesh axes, inside `shard_map`."""
  if hasattr(lax, "pcast"):  # JAX 0.8.1
    return lax.pcast(x, axes, to="varying")
  return lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]: gone in JAX 0.10


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
optimization_barrier_p = _equation(lax.optimization_barrier, _scalar).primitive
_vector = jax.ShapeDtypeStruct((2,), jnp.float32)
split_p = _equation(lambda x: lax.split(x, (1, 1)), _vector).primitive
# Joins arrays along a new axis: a primitive since JAX 0.10.
_stack = jax.make_jaxpr(lambda x: jnp.stack([x, x]))(_vector).eqns[-1].primitive
stack_p = None if _stack is primitives.concatenate_p else _stack
# Its inverse, and the one that repeats an array, are primitives since then as well.
_unstack, _tile = (_equation(f, _vector).primitive for f in (jnp.unstack, lambda x: jnp.tile(x, 2)))
unstack_p = None if _unstack is jit_p else _unstack
tile_p = None if _tile in (primitives.reshape_p, primitives.broadcast_in_dim_p) else _tile
_explicit = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
_replicated = jax.sharding.NamedSharding(_explicit, jax.P(None))
reshard_p = _equation(lambda x: jax.sharding.reshard(x, _replicated), _vector).primitive
_DebugInfo = type(jax.make_jaxpr(lax.sin)(_scalar).jaxpr.debug_info)
_mapped = _equation(_on_mesh, jax.ShapeDtypeStruct((1,), jnp.float32))
shard_map_p = _mapped.primitive
pvary_p = _mapped.params["jaxpr"].eqns[0].primitive


def bind_unchanged(eqn: jex.JaxprEqn, args: Sequence[Any]) -> list[Any]:
  """Evaluates one equation as JAX would, for any primitive and parameters."""
  env = {v: x for v, x in zip(eqn.invars, args, strict=True) if not is_literal(v)}
  values = evaluated([eqn], env)
  return [values[v] for v in eqn.outvars]


def evaluated(eqns: Sequence[jex.JaxprEqn], env: Mapping[Any, Any]) -> dict[Any, Any]:
  """Returns the values of the variables that equations define, evaluated as JAX would.

  The equations run as a jaxpr of their own. The mapping from a primitive's parameters to those of
  its `bind` differs between primitives and releases, and `eval_jaxpr` implements it.

  Args:
    eqns: equations in order.
    env: the values of the variables that they read but do not define.
  """
  defined = {v: None for eqn in eqns for v in eqn.outvars}
  read = {
    v: None
    for eqn in eqns
    for v in eqn.invars
    if not isinstance(v, jex.Literal) and v not in defined
  }
  jaxpr = jex.Jaxpr(
    constvars=(),
    invars=list(read),
    outvars=list(defined),
    eqns=list(eqns),
    effects=frozenset().union(*(eqn.effects for eqn in eqns)),
    debug_info=_DebugInfo("equations", "equations", (), ()),
  )
  return dict(zip(defined, jax.core.eval_jaxpr(jaxpr, (), *(env[v] for v in read)), strict=True))


def scan_counts(
  num_consts: int | None = None, num_carry: int | None = None, ft_in: Any = None, **_: Any
) -> tuple[int, int]:
  """Returns the number of constants and of carry operands of a scan, from its parameters.

  Raises:
    KeyError: if the parameters do not determine them.
  """
  if num_consts is not None and num_carry is not None:
    return num_consts, num_carry
  if ft_in is None:
    raise KeyError("num_consts")
  consts, carry, _ = ft_in.unpack()  # JAX 0.12
  return len(consts.vals), len(carry.vals)


def on_devices(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
  """The sharding on the devices of `jax.set_mesh`, which stays abstract in a traced function."""
  if not isinstance(sharding.mesh, jax.sharding.AbstractMesh):
    return sharding
  if not hasattr(jax.sharding, "get_mesh"):  # JAX 0.8
    return sharding
  mesh = jax.sharding.get_mesh()
  if mesh.abstract_mesh.shape != sharding.mesh.shape:
    return sharding
  return jax.sharding.NamedSharding(mesh, sharding.spec)


def is_literal(v: Any) -> bool:
  return isinstance(v, jex.Literal)


def closed(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> jex.ClosedJaxpr:
  """The jaxpr with its (possibly empty) constants."""
  return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


@contextlib.contextmanager
def name_scope(eqn: jex.JaxprEqn) -> Iterator[None]:
  """Re-enters the named scope and the mesh in which an equation was traced.

  The scope keeps profiles readable. The mesh has other axis types inside `jax.sharding.auto_axes`.
  """
  mesh = getattr(getattr(eqn, "ctx", None), "cur_abstract_mesh", None)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.named_scope(str(eqn.source_info.name_stack)))
    if mesh is not None and mesh != jax.sharding.get_abstract_mesh():
      stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    yield
