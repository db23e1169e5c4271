"""What to do with a primitive that meets a Weight.

A rule takes the equation's operands, at least one of them a Weight, and its parameters, of which
it reads the few that it needs. It returns what the primitive would: an array, or a Weight where
the result is again one. It raises `NotFactored` where only the full array will do.

`evaluate`, the interpreter itself, is handed to every rule for those that hold inner jaxprs
(`control_flow.py`).
"""

from jax.extend.core import primitives

from lora_jax.weights import NotFactored, base, is_weight


def dot_general(
  lhs, rhs, *, dimension_numbers, precision, preferred_element_type, out_sharding, **_
):  # fmt: skip
  return base.dot_general(
    lhs, rhs, dimension_numbers, precision=precision, out_sharding=out_sharding,
    preferred_element_type=preferred_element_type,
  )  # fmt: skip


def gather(
  operand, indices, *, dimension_numbers, slice_sizes, indices_are_sorted, unique_indices, mode,
  fill_value, **_
):  # fmt: skip
  if is_weight(indices):
    raise NotFactored("the weight is used as an index")
  return base.gather(
    operand, indices, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes, mode=mode,
    indices_are_sorted=indices_are_sorted, unique_indices=unique_indices, fill_value=fill_value,
  )  # fmt: skip


def transpose(w, *, permutation, **_):
  return base.transpose(w, permutation)


def convert_element_type(w, *, new_dtype, **_):
  return base.astype(w, new_dtype)


RULES = {
  primitives.dot_general_p: dot_general,
  primitives.gather_p: gather,
  primitives.transpose_p: transpose,
  primitives.convert_element_type_p: convert_element_type,
}
