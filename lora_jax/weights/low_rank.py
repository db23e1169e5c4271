"""LowRank: `w + scale * a @ b`, contracted, gathered and transposed in factored form.

Which axes of `w` are what is said by `roles`, one letter an axis: `i` for an input, `o` for an
output, `s` for a stack (layers, experts). Leading stack axes need no letter, so a weight keeps its
roles when `scan` or `vmap` slices it. The factors hold the stack axes first:

    w (d, k)             roles "io"    a (d, r)          b (r, k)
    w (L, d, k)          roles "io"    a (L, d, r)       b (L, r, k)         layers stacked by scan
    w (d, heads, dim)    roles "ioo"   a (d, r)          b (r, heads, dim)   a query projection
    w (heads, dim, k)    roles "iio"   a (heads, dim, r) b (r, k)            the projection back
    w (d, L, k)          roles "iso"   a (L, d, r)       b (L, r, k)         stacked on axis 1

Source: Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
"""

import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base
from lora_jax.weights.base import NotFactored, Weight

Labels = str  # one letter an axis, as in einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
  """`w + scale * a @ b`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight, of shape [*stack, ...].
    a: [*stack, *inputs, rank], of any float dtype; float32 keeps small updates.
    b: [*stack, rank, *outputs].
    scale: the factor of the product.
    roles: the role of each axis of w, leading stack axes left out; see the module.
    path: the leaf's path, for messages.
  """

  w: Any
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  roles: str = dataclasses.field(default="io", metadata={"static": True})
  path: str = dataclasses.field(default="", metadata={"static": True})

  @property
  def shape(self):
    return tuple(self.w.shape)

  @property
  def dtype(self):
    return self.w.dtype

  @property
  def is_stacked(self):
    return self.ndim > len(self.roles)

  @property
  def all_roles(self) -> str:
    """The role of every axis of w, leading stack axes included."""
    return "s" * (self.ndim - len(self.roles)) + self.roles

  def trainable(self):
    frozen = jax.tree.map(lambda _: False, self.w)
    return dataclasses.replace(self, w=frozen, a=True, b=True)

  def delta(self) -> jax.Array:
    """`scale * a @ b` in w's axes, in at least float32."""
    labels = _labels(self.all_roles, string.ascii_lowercase)
    a, b = _factor_labels(labels, self.all_roles)
    dtype = jnp.promote_types(self.dtype, jnp.float32)
    product = jnp.einsum(
      f"{a},{b}->{labels}", self.a.astype(dtype), self.b.astype(dtype), precision="highest"
    )
    return self.scale * product

  def materialize(self):
    w = base.materialize(self.w)
    delta = self.delta()
    return (w.astype(delta.dtype) + delta).astype(w.dtype)

  def astype(self, dtype):
    # The factors keep their precision: they are cast where they are used.
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def transpose(self, permutation):
    roles = self.all_roles
    moved = [n for n in permutation if roles[n] == "s"]
    if moved != sorted(moved):
      raise NotFactored("the transpose exchanges stack axes")
    a, b = (
      _permute_factor(f, roles, role, permutation) for f, role in ((self.a, "i"), (self.b, "o"))
    )
    roles = "".join(roles[n] for n in permutation).lstrip("s")
    return dataclasses.replace(self, w=base.transpose(self.w, permutation), a=a, b=b, roles=roles)

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, precision=None, **params):
    if not jnp.issubdtype(other.dtype, jnp.inexact):
      raise NotFactored(f"the other operand is {other.dtype}")
    lhs, rhs = (self.w, other) if weight_is_lhs else (other, self.w)
    y = base.dot_general(lhs, rhs, dimension_numbers, precision=precision, **params)
    other_labels, weight_labels, out_labels = _dot_labels(
      other.ndim, self.ndim, dimension_numbers, weight_is_lhs
    )
    delta = _low_rank_product(
      other, other_labels, self.a, self.b, self.scale, weight_labels, self.all_roles, out_labels,
      precision,
    )  # fmt: skip
    return y + delta.astype(y.dtype)

  def gather(self, indices, *, dimension_numbers, slice_sizes, fill_value=None, **params):
    """Rows along one axis: `w[ids] + scale * a[ids] @ b`, as an embedding is looked up."""
    d = dimension_numbers
    if (
      d.operand_batching_dims
      or len(d.collapsed_slice_dims) != 1
      or d.start_index_map != d.collapsed_slice_dims
      or any(
        size != full
        for n, (size, full) in enumerate(zip(slice_sizes, self.shape, strict=True))
        if n not in d.collapsed_slice_dims
      )
    ):
      raise NotFactored("only whole rows along one axis are gathered in factored form")
    (axis,) = d.collapsed_slice_dims
    roles = self.all_roles
    if "s" in roles:
      raise NotFactored("the rows of a stack of weights are gathered")
    labels = _labels(roles, string.ascii_lowercase)
    gathered, other = (self.a, self.b) if roles[axis] == "i" else (self.b, self.a)
    gathered_labels, other_labels = _factor_labels(labels, roles)
    if roles[axis] == "o":
      gathered_labels, other_labels = other_labels, gathered_labels
    rows = base.gather(
      self.w, indices, dimension_numbers=d, slice_sizes=slice_sizes, fill_value=fill_value, **params
    )
    # A row out of bounds takes its fill value from w alone, so the factor's is zero.
    row_axis = gathered_labels.index(labels[axis])
    picked = _take_rows(gathered, indices, row_axis, fill_value=0, **params)
    row_labels = gathered_labels.replace(labels[axis], "")
    batch = string.ascii_uppercase[: rows.ndim - (self.ndim - 1)]
    offsets = iter(labels.replace(labels[axis], ""))
    batches = iter(batch)
    out = "".join(next(offsets if n in d.offset_dims else batches) for n in range(rows.ndim))
    delta = jnp.einsum(f"{batch}{row_labels},{other_labels}->{out}", picked * self.scale, other)
    return rows + delta.astype(rows.dtype)


def _labels(roles: str, alphabet: str) -> Labels:
  """A letter for each axis; `r` stays free for the rank."""
  return "".join(c for c in alphabet if c != "r")[: len(roles)]


def _factor_labels(labels: Labels, roles: str) -> tuple[Labels, Labels]:
  """The labels of a and b, given those of w's axes."""
  of = {role: "".join(c for c, x in zip(labels, roles, strict=True) if x == role) for role in "sio"}
  return of["s"] + of["i"] + "r", of["s"] + "r" + of["o"]


def _permute_factor(factor, roles: str, role: str, permutation):
  """The factor whose own axes follow the new order of w's axes of that role."""
  before = [n for n, x in enumerate(roles) if x == role]
  after = [before.index(n) for n in permutation if roles[n] == role]
  stack = roles.count("s")
  first = stack + (1 if role == "o" else 0)  # b holds its rank before its own axes
  order = [*range(first), *(first + n for n in after), *range(first + len(after), factor.ndim)]
  return lax.transpose(factor, order)


def _take_rows(x, indices, axis: int, fill_value, **params):
  """Gathers whole rows along `axis`; the result is [*batch, *the other axes]."""
  rest = x.ndim - 1
  batch = indices.ndim - 1
  return lax.gather(
    x,
    indices,
    dimension_numbers=lax.GatherDimensionNumbers(
      offset_dims=tuple(range(batch, batch + rest)),
      collapsed_slice_dims=(axis,),
      start_index_map=(axis,),
    ),
    slice_sizes=tuple(1 if n == axis else size for n, size in enumerate(x.shape)),
    fill_value=fill_value,
    **params,
  )


def _dot_labels(other_ndim: int, weight_ndim: int, dimension_numbers, weight_is_lhs: bool):
  """Einsum labels (other, weight, result) of a dot_general."""
  contracting, batch = dimension_numbers
  if weight_is_lhs:
    contracting, batch = contracting[::-1], batch[::-1]
  (other_c, weight_c), (other_b, weight_b) = contracting, batch
  weight = _labels("?" * weight_ndim, string.ascii_lowercase)
  shared = dict(zip((*other_c, *other_b), (*weight_c, *weight_b), strict=True))
  fresh = iter(string.ascii_uppercase)
  other = "".join(weight[shared[n]] if n in shared else next(fresh) for n in range(other_ndim))
  other_free = "".join(c for c in other if c.isupper())
  weight_free = "".join(c for n, c in enumerate(weight) if n not in (*weight_c, *weight_b))
  free = weight_free + other_free if weight_is_lhs else other_free + weight_free
  return other, weight, "".join(weight[n] for n in weight_b) + free


def _low_rank_product(
  x, x_labels, a, b, scale, weight_labels, roles, out_labels, precision
) -> jax.Array:  # fmt: skip
  """The contraction of x with `scale * a @ b`, by two thin products; no operand is w's size.

  Two things are done for the backward pass, and left to autodiff otherwise, so that `jvp`, `vmap`
  and `linearize` work as ever. Measured on CPU, where they make up most of the difference between
  this product and the naive one:

  - The factors are used rank-major, [r, ...], behind an optimisation barrier. The gradient of `a`
    is then formed as `dhᵀ x`, an [r, d] array, 5 to 20 times faster than `xᵀ dh`, which XLA would
    otherwise make of it by folding the transpose back into the product.
  - The rows of the rank-sized h are flattened to one axis before the second product, or the
    gradient of `b` is contracted over two axes with its operands the slow way round.
  """
  a_labels, b_labels = _factor_labels(weight_labels, roles)
  rank_major = a_labels.replace("r", "")
  stacks = roles.count("s")
  rank_major = a_labels[:stacks] + "r" + rank_major[stacks:]
  a = jnp.einsum(f"{a_labels}->{rank_major}", a.astype(x.dtype))
  a = lax.optimization_barrier(a)
  b = b.astype(x.dtype)
  contracted = {c for c in x_labels if c not in out_labels}
  in_labels = set(a_labels[stacks:]) - {"r"}
  first, second = ((a, rank_major), (b, b_labels))
  if not contracted & in_labels:
    first, second = second, first

  # h: [the stacks that stay, the rows, what the second product contracts]
  union = x_labels + "".join(c for c in first[1] if c not in x_labels)
  kept = [c for c in union if c in out_labels or c in second[1]]
  batch = "".join(c for c in kept if c in out_labels and c in second[1])
  rows = "".join(c for c in kept if c not in second[1])
  inner = "".join(c for c in kept if c in second[1] and c not in out_labels)
  h = jnp.einsum(
    f"{x_labels},{first[1]}->{batch}{rows}{inner}", x, first[0], precision=precision,
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )  # fmt: skip
  h = (scale * h).astype(x.dtype)
  row_shape = h.shape[len(batch) : len(batch) + len(rows)]
  h = h.reshape(*h.shape[: len(batch)], math.prod(row_shape), *h.shape[len(batch) + len(rows) :])
  free = "".join(c for c in second[1] if c in out_labels and c not in batch)
  y = jnp.einsum(f"{batch}Z{inner},{second[1]}->{batch}Z{free}", h, second[0], precision=precision)
  y = y.reshape(*y.shape[: len(batch)], *row_shape, *y.shape[len(batch) + 1 :])
  return jnp.einsum(f"{batch}{rows}{free}->{out_labels}", y)
