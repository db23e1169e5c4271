"""LowRank: `w + scale * a @ b`, contracted, convolved, gathered and sliced in factored form.

Which axes of `w` are what is said by `roles`, one letter an axis: `i` for an input, `o` for an
output, `s` for a stack (layers, experts). Leading stack axes need no letter, so a weight keeps its
roles when `scan` or `vmap` slices it. The factors hold the stack axes first:

    w (d, k)             roles "io"    a (d, r)            b (r, k)
    w (L, d, k)          roles "io"    a (L, d, r)         b (L, r, k)       layers stacked by scan
    w (d, heads, dim)    roles "ioo"   a (d, r)            b (r, heads, dim) a query projection
    w (heads, dim, k)    roles "iio"   a (heads, dim, r)   b (r, k)          the projection back
    w (h, w, c, k)       roles "iiio"  a (h, w, c, r)      b (r, k)          a convolution
    w (d, L, k)          roles "iso"   a (L, d, r)         b (L, r, k)       stacked on axis 1

Source: Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
"""

import dataclasses
import string
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.weights import base
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factors import factor_labels, labels, part_axes
from lora_jax.weights.products import dot_labels, low_rank_product
from lora_jax.weights.structured import Structured

PRODUCT = "lora_jax.product"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Structured):
  """`w + scale * a @ b`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight, of shape [*stack, ...]; None in an adapter.
    a: [*stack, *inputs, rank], of any float dtype; float32 keeps small updates.
    b: [*stack, rank, *outputs].
    scale: the factor of the product.
    dropout: the share of the inputs of a that are dropped while there is a key.
    key: [*stack] random keys, or None: nothing is dropped. `lora_jax.with_dropout` sets it.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"a": "sir", "b": "sro", "key": "s"}
  TRAINED: ClassVar = ("a", "b")
  LINEAR: ClassVar = "b"

  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
  key: jax.Array | None = None

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  def delta(self) -> jax.Array:
    """`scale * a @ b` in w's axes, in at least float32."""
    w = labels(self.ndim)
    a, b = factor_labels(w, self.all_roles)
    dtype = jnp.promote_types(self.dtype, jnp.float32)
    product = jnp.einsum(
      f"{a},{b}->{w}", self.a.astype(dtype), self.b.astype(dtype), precision="highest"
    )
    return self.scale * product

  def as_low_rank(self) -> "LowRank":
    return LowRank(None, self.a, self.b, self.scale, roles=self.roles)

  @property
  def drops(self):
    return self.dropout > 0

  def with_dropout(self, key) -> "LowRank":
    """This weight dropping inputs by a random key, if it has a share to drop."""
    if not self.drops:
      return self
    stack = self.a.shape[: self.a.ndim - 1 - self.roles.count("i")]
    return dataclasses.replace(self, key=jax.random.split(key, stack) if stack else key)

  def _dropped(self, x):
    """The input of a, with a share of it dropped and the rest made larger for it."""
    if self.key is None:
      return x
    # x has an axis for each stack that is left, so one key does for all.
    kept = jax.random.bernoulli(self.key.ravel()[0], 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)

  # ---- what is contracted

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, precision=None, **params):
    lhs, rhs = (self.w, other) if weight_is_lhs else (other, self.w)
    y = base.dot_general(lhs, rhs, dimension_numbers, precision=precision, **params)
    other_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    x = other.astype(jnp.promote_types(other.dtype, self.dtype))  # it may be of integers
    delta = low_rank_product(
      self._dropped(x),
      other_labels,
      self.a,
      self.b,
      self.all_roles,
      self.scale,
      out_labels,
      precision,
    )
    return _sum(y, delta)

  def conv_general_dilated(
    self, x, *, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, precision, preferred_element_type,
  ):  # fmt: skip
    """A convolution to `rank` channels with a as its kernel, then b at every position."""
    roles = self.all_roles
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    if batch_group_count != 1:
      raise NotFactored("the convolution has batch groups")
    if any(roles[n] != ("o" if n == rhs_spec[0] else "i") for n in range(self.ndim)):
      raise NotFactored(f"the roles {roles!r} of its axes are not those of the convolution")
    params = {
      "window_strides": window_strides, "padding": padding, "lhs_dilation": lhs_dilation,
      "rhs_dilation": rhs_dilation, "precision": precision,
      "preferred_element_type": preferred_element_type,
    }  # fmt: skip
    y = base.conv_general_dilated(
      x, self.w, dimension_numbers=dimension_numbers, feature_group_count=feature_group_count,
      batch_group_count=1, **params,
    )  # fmt: skip
    # Batch and features first, in every array; each group of features is a batch of its own, since
    # all of them are read by the same a.
    x = self._dropped(lax.transpose(x, lhs_spec))
    batch, features, *spatial = x.shape
    groups = feature_group_count
    x = x.reshape(batch * groups, features // groups, *spatial)
    axes = part_axes(roles, "sir")
    kernel = lax.transpose(self.a, [axes.index(None), *(axes.index(n) for n in rhs_spec[1:])])
    h = lax.conv_general_dilated(x, kernel.astype(x.dtype), dimension_numbers=None, **params)
    h = (self.scale * h).astype(x.dtype).reshape(batch, groups, *h.shape[1:])
    b = self.b.reshape(self.b.shape[0], groups, -1).astype(x.dtype)
    where = "xyzuvw"[: len(spatial)]
    delta = jnp.einsum(f"ngr{where},rgk->ngk{where}", h, b, precision=precision)
    delta = delta.reshape(batch, -1, *delta.shape[3:])
    delta = lax.transpose(delta, [out_spec.index(n) for n in range(len(out_spec))])
    return _sum(y, delta)

  def ragged_dot_general(self, lhs, group_sizes, *, ragged_dot_dimension_numbers, **params):
    """Each group of rows by its own matrix of the stack, as experts are applied."""
    d = ragged_dot_dimension_numbers
    (_, rhs_c), (lhs_b, rhs_b) = d.dot_dimension_numbers
    if self.all_roles != "sio" or (*d.rhs_group_dimensions, *rhs_c) != (0, 1) or lhs_b or rhs_b:
      raise NotFactored("only rows by a stack of (in, out) matrices are multiplied by group")
    y = base.ragged_dot_general(lhs, self.w, group_sizes, ragged_dot_dimension_numbers=d, **params)
    params = params | {"ragged_dot_dimension_numbers": d, "preferred_element_type": None}
    x = self._dropped(lhs)
    h = lax.ragged_dot_general(x, self.a.astype(lhs.dtype), group_sizes, **params)
    last = dataclasses.replace(d, dot_dimension_numbers=(((h.ndim - 1,), rhs_c), ((), ())))
    params["ragged_dot_dimension_numbers"] = last
    h = (self.scale * h).astype(lhs.dtype)
    delta = lax.ragged_dot_general(h, self.b.astype(lhs.dtype), group_sizes, **params)
    return _sum(y, delta)

  def gather(self, indices, *, dimension_numbers, slice_sizes, fill_value=None, **params):
    """Rows along one axis: `w[ids] + scale * a[ids] @ b`, as an embedding is looked up."""
    d = dimension_numbers
    axis = d.collapsed_slice_dims[0] if len(d.collapsed_slice_dims) == 1 else None
    full = [n == axis or size == self.shape[n] for n, size in enumerate(slice_sizes)]
    if axis is None or d.operand_batching_dims or d.start_index_map != (axis,) or not all(full):
      raise NotFactored("only whole rows along one axis are gathered in factored form")
    roles = self.all_roles
    if "s" in roles:
      raise NotFactored("the rows of a stack of weights are gathered")
    rows = base.call(
      "gather",
      self.w,
      indices,
      dimension_numbers=d,
      slice_sizes=slice_sizes,
      fill_value=fill_value,
      **params,
    )
    names = labels(self.ndim)
    picked, other = (self.a, self.b) if roles[axis] == "i" else (self.b, self.a)
    picked_labels, other_labels = factor_labels(names, roles)[:: 1 if roles[axis] == "i" else -1]
    # A row out of bounds takes its fill value from w alone, so the factor's is zero.
    picked = _take_rows(picked, indices, picked_labels.index(names[axis]), fill_value=0, **params)
    batch = string.ascii_uppercase[: rows.ndim - (self.ndim - 1)]
    offsets, batches = iter(names.replace(names[axis], "")), iter(batch)
    out = "".join(next(offsets if n in d.offset_dims else batches) for n in range(rows.ndim))
    delta = jnp.einsum(
      f"{batch}{picked_labels.replace(names[axis], '')},{other_labels}->{out}",
      picked * self.scale,
      other,
    )
    return rows + delta.astype(rows.dtype)

  # ---- what stays a weight; see `Structured` for the rest

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c), b=self.b * c)


def _sum(y, delta):
  """`y + delta` in y's dtype, with a name by which a remat policy keeps it and not its terms."""
  return checkpoint_name(y + delta.astype(y.dtype), PRODUCT)


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
