"""The dtypes in which weights are multiplied and summed.

JAX's own promotion depends on a user setting and does not cover float8. The dtypes here follow from
the operands alone:

- bfloat16, float32 and wider dtypes stay unchanged.
- float16 and float8 have too little range for the values between two factors, so thin products and
  sums with them are computed in float32. Only the result is rounded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def joint(*dtypes: DTypeLike) -> jnp.dtype:
  """The dtype in which values of these dtypes are multiplied and added.

  Integers take the dtype of the floats, if there are any.
  """
  inexact = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
  with jax.numpy_dtype_promotion("standard"):
    return functools.reduce(jnp.promote_types, map(_wide, inexact or dtypes))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
  """The dtype for sums that must be precise."""
  return joint(dtype, jnp.float32)


def of_base(
  wanted: DTypeLike | None, x: DTypeLike, w: DTypeLike
) -> tuple[DTypeLike | None, DTypeLike | None]:
  """The dtypes in which to compute a base's product to which a thin product is added.

  Args:
    wanted: the `preferred_element_type` of the product of x and the weight.
    x: the dtype of the other operand.
    w: the dtype of the weight.

  Returns:
    The `preferred_element_type` of the base's product, and the dtype to cast the sum to, or None
    if it needs no cast. The two differ because the base's product may overflow where the sum does
    not.
  """
  result = wanted if wanted is not None or x != w else x
  if result is None or _wide(result) == result:
    return wanted, None
  return _wide(result), result


def multiplied(x: jax.Array, c: Any) -> jax.Array:
  """`x * c` in the joint dtype; a c without a dtype of its own does not change x's dtype."""
  if jax.typeof(c).weak_type:
    return x * c
  dtype = joint(x.dtype, c.dtype)
  return x.astype(dtype) * c.astype(dtype)


def _wide(dtype: DTypeLike) -> jnp.dtype:
  """float32 in place of a float dtype with a smaller range."""
  dtype = jnp.dtype(dtype)
  is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != jnp.bfloat16
  return jnp.dtype(jnp.float32) if is_narrow else dtype
