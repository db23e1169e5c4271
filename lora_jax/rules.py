"""What to do with a primitive that meets a Weight.

A rule takes the equation's operands, at least one of them a Weight, and its parameters, of which
it reads the few that it needs. It returns what the primitive would: an array, or a Weight where
the result is again one. It raises `NotFactored` where only the full array will do.

`evaluate`, the interpreter itself, is handed to every rule for those that hold inner jaxprs
(`control_flow.py`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from lora_jax import compat
from lora_jax.weights import NotFactored, base, is_weight


def dot_general(
  lhs, rhs, *, dimension_numbers, precision, preferred_element_type, out_sharding, **_
):  # fmt: skip
  return base.dot_general(
    lhs, rhs, dimension_numbers, precision=precision, out_sharding=out_sharding,
    preferred_element_type=preferred_element_type,
  )  # fmt: skip


def conv_general_dilated(
  x, kernel, *, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
  feature_group_count, batch_group_count, precision, preferred_element_type, **_,
):  # fmt: skip
  return base.conv_general_dilated(
    x, kernel, window_strides=window_strides, padding=padding, lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation, dimension_numbers=dimension_numbers, precision=precision,
    feature_group_count=feature_group_count, batch_group_count=batch_group_count,
    preferred_element_type=preferred_element_type,
  )  # fmt: skip


def ragged_dot_general(
  lhs, rhs, group_sizes, *, ragged_dot_dimension_numbers, precision, preferred_element_type, **_
):  # fmt: skip
  return base.ragged_dot_general(
    lhs, rhs, group_sizes, ragged_dot_dimension_numbers=ragged_dot_dimension_numbers,
    precision=precision, preferred_element_type=preferred_element_type,
  )  # fmt: skip


def gather(
  operand, indices, *, dimension_numbers, slice_sizes, indices_are_sorted, unique_indices, mode,
  fill_value, **_,
):  # fmt: skip
  if is_weight(indices):
    raise NotFactored("the weight is used as an index")
  return base.call(
    "gather", operand, indices, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes,
    mode=mode, indices_are_sorted=indices_are_sorted, unique_indices=unique_indices,
    fill_value=fill_value,
  )  # fmt: skip


def convert_element_type(w, *, new_dtype, **_):
  return base.astype(w, new_dtype)


def transpose(w, *, permutation, **_):
  return base.call("transpose", w, permutation)


def reshape(w, *, new_sizes, dimensions, **_):
  if dimensions is not None:
    raise NotFactored("the reshape transposes as well")
  return base.call("reshape", w, new_sizes)


def squeeze(w, *, dimensions, **_):
  return base.call("squeeze", w, dimensions)


def broadcast_in_dim(w, *dynamic_sizes, shape, broadcast_dimensions, **_):
  if dynamic_sizes:
    raise NotFactored("the sizes of the broadcast are not static")
  return base.call("broadcast_in_dim", w, shape, broadcast_dimensions)


def slice_(w, *, start_indices, limit_indices, strides, **_):
  return base.call("slice", w, start_indices, limit_indices, strides)


def dynamic_slice(w, *start_indices, slice_sizes, **_):
  if any(map(is_weight, start_indices)):
    raise NotFactored("the weight is used as an index")
  return base.call("dynamic_slice", w, start_indices, slice_sizes)


def mul(x, y, **_):
  w, c = (x, y) if is_weight(x) else (y, x)
  return _scaled(w, c)


def div(x, y, **_):
  if is_weight(y):
    raise NotFactored("it is what is divided by")
  return _scaled(x, 1 / y)


def neg(w, **_):
  return _scaled(w, -1)


def stop_gradient(w, **_):
  return jax.tree.map(lax.stop_gradient, w)


def name(w, *, name, **_):
  return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), w)


def pvary(w, *, axes, **_):
  return jax.tree.map(lambda leaf: compat.vary(leaf, axes), w)


def _scaled(w, c):
  if is_weight(c) or jnp.ndim(c):
    raise NotFactored("it is multiplied by more than a single number")
  return base.scaled(w, c)


RULES = {
  primitives.dot_general_p: dot_general,
  primitives.conv_general_dilated_p: conv_general_dilated,
  compat.ragged_dot_general_p: ragged_dot_general,
  primitives.gather_p: gather,
  primitives.convert_element_type_p: convert_element_type,
  primitives.transpose_p: transpose,
  primitives.reshape_p: reshape,
  primitives.squeeze_p: squeeze,
  primitives.broadcast_in_dim_p: broadcast_in_dim,
  primitives.slice_p: slice_,
  primitives.dynamic_slice_p: dynamic_slice,
  primitives.mul_p: mul,
  primitives.div_p: div,
  primitives.neg_p: neg,
  compat.stop_gradient_p: stop_gradient,
  compat.name_p: name,
  compat.pvary_p: pvary,
}
