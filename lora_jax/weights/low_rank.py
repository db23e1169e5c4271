"""LowRank: `w + scale * a @ b`, contracted, convolved, gathered and sliced in factored form.

`roles` says what the axes of `w` are, one letter an axis: `i` for an input, `o` for an output, `s`
for a stack (layers, experts). Leading stack axes need no letter, so a weight keeps its roles when
`scan` or `vmap` slices it. The stack axes of the factors come first:

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
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.base import NotFactored
from lora_jax.weights.combined import added, subtracted
from lora_jax.weights.factor_axes import factor_labels, labels, part_axes, part_labels
from lora_jax.weights.products import dot_labels, low_rank_product
from lora_jax.weights.pytree import register
from lora_jax.weights.scaled import scaled_along, spread
from lora_jax.weights.structured import Structured, take_rows

PRODUCT = "lora_jax.product"


@register
@dataclasses.dataclass(frozen=True)
class LowRank(Structured):
  """`w + scale * a @ b`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array or another Weight, of shape [*stack, ...]; None in an adapter.
    a: [*stack, *inputs, rank], of any float dtype; float32 keeps small updates.
    b: [*stack, rank, *outputs].
    scale: the factor of the product.
    dropout: the fraction of a's inputs that is dropped while there is a key.
    key: [*stack] random keys; with None nothing is dropped. `lora_jax.with_dropout` sets it.
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
    a_labels, b_labels = factor_labels(w, self.all_roles)
    dtype = promotion.at_least_float32(self.dtype)

    def product(a, b):
      terms = f"{a_labels},{b_labels}->{w}"
      return jnp.einsum(terms, a.astype(dtype), b.astype(dtype), precision="highest")

    return self.scale * explicit.laid_out(product, self.explicit_sharding)(self.a, self.b)

  def as_low_rank(self) -> "LowRank":
    return LowRank(None, self.a, self.b, self.scale, roles=self.roles)

  @property
  def drops(self):
    return self.dropout > 0

  def with_dropout(self, key: jax.Array) -> Self:
    """Returns this weight with a random key for its dropout, if it has any."""
    if not self.drops:
      return self
    stack = self.a.shape[: self.a.ndim - 1 - self.roles.count("i")]
    return dataclasses.replace(self, key=jax.random.split(key, stack) if stack else key)

  def _dropped(self, x, key):
    """The input of a after dropout, with the kept values scaled up."""
    if key is None:
      return x
    # x still has an axis for each stack, so one key serves all of them.
    kept = jax.random.bernoulli(key.ravel()[0], 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)

  def _delta(self, product: Callable, x, y, use: Callable[[Any], jax.Array]) -> jax.Array:
    """`product(x, a, b, key)`, sharded over explicit mesh axes as y is.

    Args:
      product: computes the term that is added to y.
      x: the other operand.
      y: the result of the base.
      use: the same operation on the array itself; see `Structured`.
    """
    sharding = self._result_sharding(x, y, use)
    return explicit.laid_out(product, sharding)(x, self.a, self.b, self.key)

  # ---- contractions

  def dot_general(
    self,
    other,
    dimension_numbers,
    *,
    weight_is_lhs,
    precision=None,
    preferred_element_type=None,
    **params,
  ):
    asked, dtype = promotion.of_base(preferred_element_type, other.dtype, self.dtype)

    def use(w):
      lhs, rhs = (w, other) if weight_is_lhs else (other, w)
      return base.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=asked, **params
      )

    other_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    roles, wide = self.all_roles, promotion.joint(other.dtype, self.dtype)

    def product(x, a, b, key):
      x = self._dropped(x.astype(wide), key)
      return low_rank_product(x, other_labels, a, b, roles, self.scale, out_labels, precision)

    y = use(self.w)
    return total(y, self._delta(product, other, y, use), dtype)

  def conv_general_dilated(
    self,
    x,
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
    """Convolves to `rank` channels with a as the kernel, then applies b at every position."""
    roles = self.all_roles
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    if batch_group_count != 1:
      raise NotFactored("the convolution has batch groups")
    asked, dtype = promotion.of_base(preferred_element_type, x.dtype, self.dtype)
    params = {
      "window_strides": window_strides,
      "padding": padding,
      "lhs_dilation": lhs_dilation,
      "rhs_dilation": rhs_dilation,
      "precision": precision,
      "preferred_element_type": asked,
    }

    of_convolution = "".join(roles[n] for n in rhs_spec)
    windows = "i" * len(rhs_spec[2:])
    transposed = of_convolution == "io" + windows and feature_group_count == 1
    if of_convolution != "oi" + windows and not transposed:
      raise NotFactored(f"the roles {roles!r} of its axes are not those of the convolution")

    def use(w):
      placed = {} if out_sharding is None else {"out_sharding": out_sharding}
      return base.conv_general_dilated(
        x,
        w,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=1,
        **params,
        **placed,
      )

    axes = part_axes(roles, "sir")

    def back(x, a, b, key):
      """From outputs to inputs: b at every position, then a as the kernel.

      The input gradient of a convolution and a transposed convolution take this form.
      """
      x = self._dropped(lax.transpose(x.astype(promotion.joint(x.dtype)), lhs_spec), key)
      h = jnp.einsum("nk...,rk->nr...", x, b.astype(x.dtype), precision=precision)
      order = [axes.index(rhs_spec[0]), axes.index(None), *(axes.index(n) for n in rhs_spec[2:])]
      kernel = lax.transpose(a, order).astype(x.dtype)
      h = (self.scale * h).astype(x.dtype)
      delta = lax.conv_general_dilated(h, kernel, dimension_numbers=None, **params)
      return lax.transpose(delta, [out_spec.index(n) for n in range(len(out_spec))])

    def product(x, a, b, key):
      # Batch and features come first in every array. Each group of features becomes a batch of its
      # own, since the same a reads all groups.
      x = self._dropped(lax.transpose(x.astype(promotion.joint(x.dtype)), lhs_spec), key)
      batch, features, *spatial = x.shape
      groups = feature_group_count
      x = x.reshape(batch * groups, features // groups, *spatial)
      kernel = lax.transpose(a, [axes.index(None), *(axes.index(n) for n in rhs_spec[1:])])
      h = lax.conv_general_dilated(x, kernel.astype(x.dtype), dimension_numbers=None, **params)
      h = (self.scale * h).astype(x.dtype).reshape(batch, groups, *h.shape[1:])
      b = b.reshape(b.shape[0], groups, b.shape[1] // groups).astype(x.dtype)
      where = "xyzuvw"[: len(spatial)]
      delta = jnp.einsum(f"ngr{where},rgk->ngk{where}", h, b, precision=precision)
      delta = delta.reshape(batch, groups * b.shape[2], *delta.shape[3:])
      return lax.transpose(delta, [out_spec.index(n) for n in range(len(out_spec))])

    y = use(self.w)
    return total(y, self._delta(back if transposed else product, x, y, use), dtype)

  def ragged_dot_general(
    self,
    lhs,
    group_sizes,
    *,
    ragged_dot_dimension_numbers,
    precision,
    preferred_element_type,
    **params,
  ):
    """Multiplies each group of rows by its own matrix of the stack, as in mixtures of experts."""
    d = ragged_dot_dimension_numbers
    (_, rhs_c), (lhs_b, rhs_b) = d.dot_dimension_numbers
    if self.all_roles != "sio" or (*d.rhs_group_dimensions, *rhs_c) != (0, 1) or lhs_b or rhs_b:
      raise NotFactored("only rows are multiplied by group, by a stack of (in, out) matrices")
    asked, dtype = promotion.of_base(preferred_element_type, lhs.dtype, self.dtype)

    def use(w):
      return base.ragged_dot_general(
        lhs,
        w,
        group_sizes,
        ragged_dot_dimension_numbers=d,
        precision=precision,
        preferred_element_type=asked,
        **params,
      )

    def product(operands, a, b, key):
      x, group_sizes = operands
      x = self._dropped(x.astype(promotion.joint(x.dtype)), key)

      def by_group(x, stack):
        last = (((x.ndim - 1,), rhs_c), ((), ()))
        return lax.ragged_dot_general(
          x,
          stack.astype(x.dtype),
          group_sizes,
          precision=precision,
          ragged_dot_dimension_numbers=dataclasses.replace(d, dot_dimension_numbers=last),
        )

      return by_group((self.scale * by_group(x, a)).astype(x.dtype), b)

    y = use(self.w)
    return total(y, self._delta(product, (lhs, group_sizes), y, use), dtype)

  def gather(self, indices, *, dimension_numbers, slice_sizes, fill_value=None, **params):
    """Looks up rows along one axis, as for an embedding: `w[ids] + scale * a[ids] @ b`."""
    d = dimension_numbers
    axis = d.collapsed_slice_dims[0] if len(d.collapsed_slice_dims) == 1 else None
    full = [n == axis or size == self.shape[n] for n, size in enumerate(slice_sizes)]
    if axis is None or d.operand_batching_dims or d.start_index_map != (axis,) or not all(full):
      raise NotFactored("only whole rows along one axis are gathered in factored form")
    roles = self.all_roles
    if "s" in roles:
      if roles[axis] != "s" or self.key is not None:
        raise NotFactored("rows of each layer of a stack are gathered")
      return self.stacks_picked(
        indices, dimension_numbers=d, slice_sizes=slice_sizes, fill_value=fill_value, **params
      )

    def use(w):
      return base.call(
        "gather",
        w,
        indices,
        dimension_numbers=d,
        slice_sizes=slice_sizes,
        fill_value=fill_value,
        **params,
      )

    rows = use(self.w)
    names = labels(self.ndim)
    a_labels, b_labels = factor_labels(names, roles)
    batch = string.ascii_uppercase[: indices.ndim - 1]
    offsets, batches = iter(names.replace(names[axis], "")), iter(batch)
    ndim = len(batch) + self.ndim - 1
    out = "".join(next(offsets if n in d.offset_dims else batches) for n in range(ndim))

    def product(indices, a, b, key):
      del key
      picked, picked_labels, other, other_labels = (
        (a, a_labels, b, b_labels) if roles[axis] == "i" else (b, b_labels, a, a_labels)
      )
      # Out of bounds, only w's row holds the fill value; the factor's row is zero.
      picked = take_rows(picked, indices, picked_labels.index(names[axis]), fill_value=0, **params)
      dtype = promotion.joint(picked.dtype, other.dtype)
      return jnp.einsum(
        f"{batch}{picked_labels.replace(names[axis], '')},{other_labels}->{out}",
        picked.astype(dtype) * self.scale,
        other.astype(dtype),
      )

    delta = self._delta(product, indices, rows, use)
    return plus(base.materialize(rows), delta).astype(rows.dtype)

  # ---- operations that stay a weight; see `Structured` for the others

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c), b=promotion.multiplied(self.b, c))

  def times(self, x, axes):
    roles = {self.all_roles[n] for n in axes}
    if {"i", "o"} <= roles:
      raise NotFactored("it is multiplied by one value for each pair of an input and an output")
    name = "a" if "i" in roles else "b"
    names, part = labels(self.ndim), getattr(self, name)
    part_names = part_labels(names, self.all_roles, self.LAYOUTS[name])
    wide = spread(x, "".join(names[n] for n in axes), part_names)
    w = scaled_along(self.w, x, axes)
    scaled = promotion.multiplied(part, wide).astype(part.dtype)
    return dataclasses.replace(self, w=w, **{name: scaled})

  def plus(self, x):
    """The sum of this weight and an array."""
    return dataclasses.replace(self, w=added(self.w, x))

  def minus(self, x):
    """This weight minus an array."""
    return dataclasses.replace(self, w=subtracted(self.w, x))


def total(y: jax.Array, delta: jax.Array, dtype: DTypeLike | None) -> jax.Array:
  """`y + delta`, under a name that lets a remat policy save the sum and not its terms.

  Args:
    y: the first term.
    delta: the second term.
    dtype: the dtype of the sum; None for y's.
  """
  return checkpoint_name(plus(y, delta).astype(dtype or y.dtype), PRODUCT)


def plus(y: jax.Array, delta: jax.Array) -> jax.Array:
  """`y + delta` in y's dtype; the sum is in float32 if that dtype has too little range."""
  dtype = promotion.joint(y.dtype)
  return y.astype(dtype) + delta.astype(dtype)
