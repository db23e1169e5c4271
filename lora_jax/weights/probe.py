"""Probe: a kernel wrapper that records the second moments of its inputs.

The kernel stays the same array, with slots of zeros alongside it. Where it is contracted, the
result passes through a function whose gradient by the slots is defined, for any cotangent, as the
sum of x xᵀ over the rows x of the other operand, and their count. Differentiating by the slots thus
sums over all uses of the kernel. `scan` slices the slots of a stack together with the kernels and
stacks their gradients. `lora_jax.calibration` uses this.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base, explicit
from lora_jax.weights.base import NotFactored, materialize
from lora_jax.weights.factor_axes import Labels, labels, part_labels, part_sizes, reordered
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register
from lora_jax.weights.structured import Structured


class Moments(NamedTuple):
  """The second moments of a kernel's input rows, not centered.

  Attributes:
    total: the sum of x xᵀ, [*stack, d, d] with d all inputs in the kernel's order, or its diagonal,
      the sum of x², [*stack, d].
    rows: the number of rows, [*stack].
  """

  total: jax.Array
  rows: jax.Array

  @property
  def mean(self) -> jax.Array:
    """The total per row; zero without rows (an expert that no token chose)."""
    rows = jnp.maximum(self.rows, 1)
    return self.total / rows.reshape(rows.shape + (1,) * (self.total.ndim - rows.ndim))


@jax.custom_vjp
def _tap(y, slots, moments):
  """Returns y; the cotangent of the slots is the moments."""
  del slots, moments
  return y


_tap.defvjp(
  lambda y, slots, moments: (y, moments),
  lambda moments, cotangent: (cotangent, moments, None),
)


@register
@dataclasses.dataclass(frozen=True)
class Probe(Structured):
  """The array w; the cotangents of its slots are the second moments of its inputs.

  Attributes:
    total: a slot, zeros, for the sum of x xᵀ or for its diagonal: [*stack, d * d] or [*stack, d].
    rows: a slot, zeros, for the number of rows: [*stack].
    mask: the rows that count, [*stack, all rows], or None for all.
    mask_shape: the shape of the rows' axes in the mask.
    roles, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"total": "sr", "rows": "s", "mask": "sr"}
  TRAINED: ClassVar = ()

  total: jax.Array
  rows: jax.Array
  mask: jax.Array | None = None
  mask_shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

  @classmethod
  def on(cls, w: Any, moments: Moments, mask: jax.Array | None, roles: str, path: str) -> "Probe":
    """A probe whose slots are zeros in the shape of moments, with one mask for a whole stack."""
    stack = moments.rows.shape
    flat = None if mask is None else mask.astype(jnp.float32).ravel()
    return cls(
      w,
      jnp.zeros((*stack, math.prod(moments.total.shape[len(stack) :]))),
      jnp.zeros(stack),
      None if flat is None else jnp.broadcast_to(flat, (*stack, flat.size)),
      () if mask is None else mask.shape,
      roles=roles,
      path=path,
    )

  def materialize(self):
    raise self._refusal("it is used in something other than a product or a convolution")

  @property
  def aval(self):
    return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.explicit_sharding)

  # ---- contractions, which record the rows

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    def product(w):
      lhs, rhs = (w, other) if weight_is_lhs else (other, w)
      return base.dot_general(lhs, rhs, dimension_numbers, **params)

    other_labels, _ = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    return self._tapped(self._plainly(product), other, other_labels)

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
    **params,
  ):
    windows = {
      "window_strides": window_strides,
      "padding": padding,
      "lhs_dilation": lhs_dilation,
      "rhs_dilation": rhs_dilation,
    }
    y = self._plainly(
      lambda w: base.conv_general_dilated(
        x,
        w,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        **windows,
        **params,
      )
    )
    lhs_spec, (out, *inputs), _ = dimension_numbers
    if (
      batch_group_count != 1 or "".join(self.all_roles[n] for n in (out, *inputs)).strip("i") != "o"
    ):
      raise self._refusal("the convolution has batch groups, or takes other axes as its inputs")
    kernel = [self.shape[n] for n in inputs]

    def patches(x):
      # A row is the window of the kernel at one position, in one group of features.
      x = lax.transpose(x.astype(jnp.float32), lhs_spec)
      batch, groups = x.shape[0], feature_group_count
      x = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
      highest = lax.Precision.HIGHEST
      x = lax.conv_general_dilated_patches(x, kernel[1:], **windows, precision=highest)
      return x.reshape(batch, groups, *kernel, *x.shape[2:])

    x = explicit.laid_out(patches, explicit.whole(x))(x)
    names = labels(self.ndim)
    positions = "CDEFGH"[: x.ndim - 2 - len(inputs)]
    return self._tapped(y, x, f"AB{''.join(names[n] for n in inputs)}{positions}")

  def ragged_dot_general(self, lhs, group_sizes, *, ragged_dot_dimension_numbers, **params):
    d = ragged_dot_dimension_numbers
    (_, rhs_c), (lhs_b, rhs_b) = d.dot_dimension_numbers
    if self.all_roles != "sio" or (*d.rhs_group_dimensions, *rhs_c) != (0, 1) or lhs_b or rhs_b:
      raise self._refusal("only rows are multiplied by group, by a stack of (in, out) matrices")
    if self.mask is not None:
      raise self._refusal("its rows are sorted into groups, so a mask cannot be matched to them")
    y = self._plainly(
      lambda w: base.ragged_dot_general(
        lhs, w, group_sizes, ragged_dot_dimension_numbers=d, **params
      )
    )
    by_group = lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((0,), (0,)), ((), ())),
      lhs_ragged_dimensions=[0],
      rhs_group_dimensions=[],
    )

    def moments(x, group_sizes):
      x = lax.stop_gradient(x).astype(jnp.float32)
      pair = (x * x, jnp.ones((len(x), 1))) if self._is_diagonal else (x, x)
      total = lax.ragged_dot_general(*pair, group_sizes, by_group, precision="highest")
      return total.reshape(self.total.shape), group_sizes.astype(jnp.float32)

    moments = explicit.laid_out(moments, explicit.whole(lhs))
    return self._with_moments(y, *moments(lhs, group_sizes))

  def gather(self, *_, **__):
    raise self._refusal("its rows are looked up, so they have no input")

  def _plainly(self, use: Callable):
    """The operation on w, materialized if necessary."""
    try:
      return use(self.w)
    except NotFactored:
      return use(materialize(self.w))

  def _tapped(self, y, x, x_labels: Labels):
    """Returns y and sends x's moments to the slots; upper-case labels are rows, others are w's."""
    names = labels(self.ndim)
    stack, inputs = (part_labels(names, self.all_roles, role) for role in "si")
    rows = "".join(c for c in x_labels if c.isupper())
    if sorted(x_labels) != sorted(stack + rows + inputs):
      raise self._refusal("it is contracted over other axes than its inputs")

    def moments(x, mask):
      x = reordered(lax.stop_gradient(x).astype(jnp.float32), x_labels, stack + rows + inputs)
      stacked, shape = x.shape[: len(stack)], x.shape[len(stack) : len(stack) + len(rows)]
      x = x.reshape(*stacked, math.prod(shape), math.prod(x.shape[len(stack) + len(rows) :]))
      count = self._counted(shape, mask)
      terms = "...nd,...nd->...d" if self._is_diagonal else "...nd,...ne->...de"
      weighted = x * jnp.broadcast_to(count, x.shape[:-1])[..., None]
      total = jnp.einsum(terms, weighted, x, precision="highest")
      return total.reshape(self.total.shape), jnp.broadcast_to(count.sum(-1), stacked)

    moments = explicit.laid_out(moments, explicit.whole(x))
    return self._with_moments(y, *moments(x, self.mask))

  def _with_moments(self, y, total, rows):
    return _tap(y, (self.total, self.rows), (total, rows))

  @property
  def _is_diagonal(self) -> bool:
    return self.total.shape[-1] == math.prod(part_sizes(self.shape, self.all_roles, "i", 0))

  def _counted(self, rows: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """The weight of each row, [*stack or nothing, the product of rows]."""
    if mask is None:
      return jnp.ones(math.prod(rows))
    if rows == (math.prod(self.mask_shape),):
      return mask
    more = rows[len(self.mask_shape) :]
    if rows != self.mask_shape + more:
      raise self._refusal(f"the mask is {self.mask_shape}, and the rows of its input are {rows}")
    return jnp.repeat(mask, math.prod(more), axis=-1)

  def _refusal(self, reason: str) -> ValueError:
    return ValueError(
      f"{self.path}: no second moments of its inputs, since {reason}; leave this path out"
    )

  # ---- operations that stay a probe

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c))

  def transpose(self, permutation):
    inputs = [n for n in permutation if self.all_roles[n] == "i"]
    if inputs != sorted(inputs):
      raise self._refusal("the order of its inputs changes")
    return super().transpose(permutation)

  def slice(self, start_indices, limit_indices, strides):
    ends = zip(start_indices, limit_indices, strides or (1,) * self.ndim, strict=True)
    self._check_whole([len(range(*bounds)) for bounds in ends])
    return super().slice(start_indices, limit_indices, strides)

  def dynamic_slice(self, start_indices, slice_sizes):
    self._check_whole(slice_sizes)
    return super().dynamic_slice(start_indices, slice_sizes)

  def _check_whole(self, sizes) -> None:
    pairs = zip(self.all_roles, sizes, self.shape, strict=True)
    if any(role == "i" and size != whole for role, size, whole in pairs):
      raise self._refusal("some of its inputs are sliced off")
