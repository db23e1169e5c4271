"""Arithmetic on a mesh with explicit axes, where the type of every value says how it is sharded.

JAX refuses an operation there if it cannot infer the sharding of the result: a product summed over
a sharded axis, a reshape that joins sharded axes. The product and reshapes of the base carry the
sharding that the function asked for. The thin products alongside it run under
`jax.sharding.auto_axes`, where the compiler decides, and their result takes the base's sharding:

    y = base.dot_general(x, self.w, ..., out_sharding=...)
    delta = laid_out(product, sharding_of(y))(x, self.a, self.b)

Without explicit axes (no mesh, `Auto` axes, inside `shard_map`) nothing is added to the program.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, auto_axes

from lora_jax.weights.base import NotFactored
from lora_jax.weights.factor_axes import part_axes

PyTree = Any


def sharding_of(x: Any) -> NamedSharding | None:
  """The sharding of an array or Weight over explicit axes, abstract or not; None without any."""
  if hasattr(x, "explicit_sharding"):
    return x.explicit_sharding
  sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
  return sharding if sharding is not None and _explicit_axes(sharding) else None


def is_explicit(tree: PyTree) -> bool:
  """True if an array of a pytree is on a mesh with explicit axes."""
  return any(sharding_of(leaf) is not None for leaf in jax.tree.leaves(tree))


def of_result(use: Callable[[Any], Any], w: Any, other: PyTree) -> NamedSharding | None:
  """The sharding of `use(the array of w)`, by tracing alone.

  Args:
    use: an operation on an array.
    w: a Weight, whose array need not be materialized.
    other: the other operands.
  """
  if not is_explicit((w, other)):
    return None
  sharding = sharding_of(w)
  return sharding_of(jax.eval_shape(use, jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)))


def laid_out(f: Callable[..., PyTree], shardings: PyTree) -> Callable[..., PyTree]:
  """Returns `f` with results of the given shardings; inside, the compiler chooses the shardings.

  Args:
    f: a function of pytrees of arrays. It must not close over other sharded arrays.
    shardings: a result of `sharding_of`, one for every result or one for all. None returns `f`
      itself.

  Raises:
    NotFactored: for a result that is not yet summed over a mesh axis, `P(unreduced=...)`.
  """
  known = [sharding for sharding in jax.tree.leaves(shardings) if sharding is not None]
  if not known:
    return f
  if any(sharding.spec.unreduced for sharding in known):
    raise NotFactored("the result is not yet summed over a mesh axis")
  return auto_axes(f, axes=_explicit_axes(known[0]), out_sharding=shardings)


def part_sharding(sharding: NamedSharding | None, roles: str, layout: str) -> NamedSharding | None:
  """The sharding of a part of a matrix: that of the axes they have in common, the rank unsharded.

  Args:
    sharding: the sharding of the matrix.
    roles: the role of each axis of the matrix.
    layout: the roles of the part's axes, as in `weights.factors`.
  """
  if sharding is None:
    return None
  axes = mesh_axes(sharding, len(roles))
  return with_axes(sharding, [None if n is None else axes[n] for n in part_axes(roles, layout)])


def whole(x: Any) -> NamedSharding | None:
  """The replicated sharding on the mesh of an array; None without explicit axes."""
  sharding = sharding_of(x)
  return sharding and with_axes(sharding, ())


def mesh_axes(sharding: NamedSharding | None, ndim: int) -> tuple:
  """The mesh axes over which each axis of an array is sharded."""
  spec = () if sharding is None else sharding.spec
  return (*spec, *[None] * (ndim - len(spec)))


def with_axes(sharding: NamedSharding, axes: Sequence) -> NamedSharding:
  """The sharding over these axes of the same mesh."""
  return NamedSharding(sharding.mesh, jax.P(*axes))


def _explicit_axes(sharding: NamedSharding) -> tuple[str, ...]:
  mesh = sharding.mesh
  pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in pairs if kind == AxisType.Explicit)
