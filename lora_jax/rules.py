"""Rules: how to evaluate a primitive with a Weight among its operands.

A rule takes the equation's operands, at least one of them a Weight, and its parameters by name. It
returns the primitive's results: an array, or a Weight if the result can be one. It raises
`NotFactored` if it needs the full array.

A rule's keyword arguments are the parameters that it knows. One without a default is required; a
parameter that the rule does not name may change the result. If they do not match, the equation is
evaluated unchanged on materialized weights (`parameters.py`), so a new release of JAX costs at most
speed.

A rule with a parameter `evaluate` receives the interpreter. `evaluate(jaxpr, operands)` evaluates
an inner jaxpr (`control_flow.py`). `evaluate.array(x, reason)` materializes one operand; in strict
mode it refuses.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from lora_jax import compat
from lora_jax.parameters import checked
from lora_jax.weights import NotFactored, base, is_weight
from lora_jax.weights.broadcast import Broadcast
from lora_jax.weights.combined import added, subtracted
from lora_jax.weights.concatenated import concatenated
from lora_jax.weights.lookup import looked_up
from lora_jax.weights.scaled import scaled_along

# ---- products


def dot_general(
  lhs, rhs, *, evaluate, dimension_numbers, precision, preferred_element_type, out_sharding=None
):
  if is_weight(lhs) and is_weight(rhs):
    rhs = evaluate.array(rhs, "both operands of the product are weights")
  return base.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=precision,
    out_sharding=out_sharding,
    preferred_element_type=preferred_element_type,
  )


def conv_general_dilated(
  x,
  kernel,
  *,
  window_strides,
  padding,
  lhs_dilation,
  rhs_dilation,
  dimension_numbers,
  feature_group_count,
  batch_group_count,
  precision,
  preferred_element_type,
  out_sharding=None,
):
  return base.conv_general_dilated(
    x,
    kernel,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    precision=precision,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    preferred_element_type=preferred_element_type,
    **_placed(out_sharding),
  )


def ragged_dot_general(
  lhs,
  rhs,
  group_sizes,
  *,
  ragged_dot_dimension_numbers,
  precision,
  preferred_element_type,
  group_offset=None,
  out_sharding=None,
):
  if group_offset is not None:
    raise NotFactored("the groups have an offset")
  return base.ragged_dot_general(
    lhs,
    rhs,
    group_sizes,
    ragged_dot_dimension_numbers=ragged_dot_dimension_numbers,
    precision=precision,
    preferred_element_type=preferred_element_type,
    **_placed(out_sharding),
  )


def gather(
  operand,
  indices,
  *,
  dimension_numbers,
  slice_sizes,
  indices_are_sorted,
  unique_indices,
  mode,
  fill_value,
):
  if is_weight(indices):
    raise NotFactored("the weight is used as an index", indices)
  return looked_up(
    operand,
    indices,
    dimension_numbers=dimension_numbers,
    slice_sizes=slice_sizes,
    mode=mode,
    indices_are_sorted=indices_are_sorted,
    unique_indices=unique_indices,
    fill_value=fill_value,
  )


# ---- the same array, with another dtype or on other devices


def convert_element_type(w, *, new_dtype, weak_type=False, sharding=None):
  del weak_type  # a Weight does not take part in promotion
  w = base.astype(w, new_dtype)
  return w if sharding is None else base.resharded(w, sharding)


def copy(w):
  return jax.tree.map(jnp.copy, w)


def stop_gradient(w):
  return jax.tree.map(lax.stop_gradient, w)


def name(w, *, name):
  return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), w)


def pvary(w, *, axes, axis_index_groups=None):
  if axis_index_groups is not None:
    raise NotFactored("it varies over groups of devices")
  return jax.tree.map(lambda leaf: compat.vary(leaf, axes), w)


def optimization_barrier(*operands):
  return lax.optimization_barrier(operands)


def device_put(*operands, devices, srcs=None, copy_semantics=None):
  del srcs, copy_semantics  # the current devices of the operands, and whether to copy
  return [_put(x, device) for x, device in zip(operands, devices, strict=True)]


def _put(x, device):
  if is_weight(x) and isinstance(device, jax.sharding.NamedSharding):
    return with_sharding(x, device, jax.device_put)
  if is_weight(x) and isinstance(device, jax.sharding.Sharding):
    raise NotFactored(f"the sharding {device} does not say which axes it cuts", x)
  return jax.tree.map(lambda leaf: jax.device_put(leaf, device), x)


def sharding_constraint(w, *, sharding, layout=None, context_mesh=None, unconstrained_dims=None):
  del context_mesh  # the sharding has its own mesh
  if layout is not None:
    raise NotFactored("the array has its own layout")
  return constrained(w, sharding, unconstrained_dims or ())


def constrained(x, sharding, free=()):
  """An array or Weight with a sharding hint for the compiler.

  Args:
    x: an array or a Weight.
    sharding: the sharding of the array. A Weight needs one that names mesh axes.
    free: the axes whose sharding the compiler chooses.
  """
  if not is_weight(x):
    return lax.with_sharding_constraint(x, sharding)
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return x
  names = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
  spec = jax.P(*(jax.P.UNCONSTRAINED if n in free else each for n, each in enumerate(names)))
  sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  return with_sharding(x, sharding, lax.with_sharding_constraint)


def reshard(w, *, dst_sharding, concrete_mesh=None):
  del concrete_mesh  # as `context_mesh` above
  return base.resharded(w, dst_sharding)


def with_sharding(w, sharding: jax.sharding.NamedSharding, put: Callable):
  """`put(part, sharding)` for every part of a Weight, derived from the array's sharding."""
  # Outside of a trace an array has devices, and its new sharding must name them.
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(w))
  mesh = (sharding if traced else compat.on_devices(sharding)).mesh
  specs = w.partition_specs(sharding.spec)
  leaves, treedef = jax.tree.flatten(w)
  specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))
  shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
  return jax.tree.unflatten(treedef, map(put, leaves, shardings))


# ---- axes moved, sliced, joined


def transpose(w, *, permutation):
  return base.call("transpose", w, permutation)


def reshape(w, *, new_sizes, dimensions, sharding=None):
  if dimensions is not None:
    raise NotFactored("the reshape transposes as well")
  return base.call("reshape", w, new_sizes, **_placed(sharding))


def squeeze(w, *, dimensions):
  return base.call("squeeze", w, dimensions)


def broadcast_in_dim(w, *dynamic_sizes, shape, broadcast_dimensions, sharding=None):
  if dynamic_sizes:
    raise NotFactored("the sizes of the broadcast are not static")
  return base.call("broadcast_in_dim", w, shape, broadcast_dimensions, **_placed(sharding))


def slice_(w, *, start_indices, limit_indices, strides):
  return base.call("slice", w, start_indices, limit_indices, strides)


def dynamic_slice(w, *start_indices, slice_sizes):
  if any(map(is_weight, start_indices)):
    raise NotFactored("the weight is used as an index", next(filter(is_weight, start_indices)))
  return base.call("dynamic_slice", w, start_indices, slice_sizes)


def rev(w, *, dimensions):
  return base.call("rev", w, dimensions)


def pad(w, value, *, padding_config):
  if is_weight(value):
    raise NotFactored("the weight is used as the padding value", value)
  return base.call("pad", w, value, padding_config)


def split(w, *, sizes, axis):
  pieces, start = [], 0
  for size in sizes:
    starts, limits = [0] * w.ndim, list(w.shape)
    starts[axis], limits[axis] = start, start + size
    pieces.append(base.call("slice", w, tuple(starts), tuple(limits), None))
    start += size
  return pieces


def concatenate(*operands, dimension):
  return concatenated([base.applied(x) for x in operands], dimension)


def stack(*operands, axis):
  if all(map(is_weight, operands)) and axis == 0 and base.alike(operands):
    joined = base.joined(lambda *leaves: jnp.stack(leaves), operands)
    if joined.is_stacked:
      return joined

  def expanded(x):
    shape = [*x.shape[:axis], 1, *x.shape[axis:]]
    return base.call("broadcast_in_dim", x, shape, [n for n in range(len(shape)) if n != axis])

  return concatenated(list(map(expanded, operands)), axis)


# ---- arithmetic


def mul(x, y, *, out_dtype=None):
  w, c = (x, y) if is_weight(x) and not isinstance(x, Broadcast) else (y, x)
  if out_dtype is not None and out_dtype != w.dtype:
    raise NotFactored("the product sets its own dtype")
  return _scaled(w, c)


def div(x, y):
  if is_weight(y) and not isinstance(y, Broadcast):
    raise NotFactored("the weight is the divisor", y)
  if isinstance(y, Broadcast):
    return _by_vector(x, dataclasses.replace(y, x=1 / y.x))
  return _scaled(x, 1 / y)


def neg(w):
  return base.scaled(w, -1)


def add(x, y):
  shape = jnp.broadcast_shapes(x.shape, y.shape)
  return added(_whole(x, shape), _whole(y, shape))


def sub(x, y):
  if is_weight(y):
    return add(x, base.scaled(y, -1))
  shape = jnp.broadcast_shapes(x.shape, y.shape)
  return subtracted(_whole(x, shape), _whole(y, shape))


def _whole(x, shape):
  """An operand broadcast to all axes of a result."""
  if not is_weight(x):
    return jnp.broadcast_to(x, shape)
  if x.shape != shape:
    raise NotFactored("an axis of size one is repeated", x)
  return base.applied(x)


def _placed(out_sharding):
  """The sharding as an argument; no argument if there is none, since not every Weight takes it."""
  return {} if out_sharding is None else {"out_sharding": out_sharding}


def _scaled(w, c):
  if isinstance(c, Broadcast):
    return _by_vector(w, c)
  if is_weight(c) or jnp.ndim(c):
    raise NotFactored("it is multiplied elementwise by a matrix")
  return base.scaled(w, c)


def _by_vector(w, c):
  if w.shape != c.sizes:
    raise NotFactored("an axis of size one is repeated")
  return scaled_along(base.applied(w), c.x, c.axes)


RULES = {
  primitives.dot_general_p: dot_general,
  primitives.conv_general_dilated_p: conv_general_dilated,
  compat.ragged_dot_general_p: ragged_dot_general,
  primitives.gather_p: gather,
  primitives.convert_element_type_p: convert_element_type,
  primitives.copy_p: copy,
  compat.stop_gradient_p: stop_gradient,
  compat.name_p: name,
  compat.pvary_p: pvary,
  compat.optimization_barrier_p: optimization_barrier,
  primitives.device_put_p: device_put,
  primitives.sharding_constraint_p: sharding_constraint,
  compat.reshard_p: reshard,
  primitives.transpose_p: transpose,
  primitives.reshape_p: reshape,
  primitives.squeeze_p: squeeze,
  primitives.broadcast_in_dim_p: broadcast_in_dim,
  primitives.slice_p: slice_,
  primitives.dynamic_slice_p: dynamic_slice,
  primitives.rev_p: rev,
  primitives.pad_p: pad,
  compat.split_p: split,
  primitives.concatenate_p: concatenate,
  primitives.mul_p: mul,
  primitives.div_p: div,
  primitives.neg_p: neg,
  primitives.add_p: add,
  primitives.add_jaxvals_p: add,
  primitives.sub_p: sub,
} | ({} if compat.stack_p is None else {compat.stack_p: stack})

RULES = checked(RULES)
