"""Probe: a kernel that leaves the second moments of what it is applied to.

The kernel is the same array as ever, with a slot of zeros beside it. Where it is contracted, the
result passes through a function whose gradient by the slot is, by definition and whatever the
cotangent is, the sum of x xᵀ over the rows x of the other operand. Differentiating by the slot then
sums over all uses; `scan` slices the slots of a stack as it slices the kernels, and stacks their
gradients. `lora_jax.calibration` does that.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base
from lora_jax.weights.base import NotFactored, Weight, materialize
from lora_jax.weights.factors import (
  Labels,
  labels,
  part_axes,
  part_labels,
  part_sizes,
  permuted_part,
  reordered,
  reshaped_roles,
)
from lora_jax.weights.products import dot_labels


class Moments(NamedTuple):
  """The second moments of the rows that a kernel was applied to, not centred.

  Attributes:
    total: the sum of x xᵀ, [*stack, d, d] with d all inputs in the kernel's order, or its diagonal,
      the sum of x², [*stack, d].
    rows: the number of rows, [*stack].
  """

  total: jax.Array
  rows: jax.Array

  @property
  def mean(self) -> jax.Array:
    """The total by the row; zero where there was none (an expert that no token chose)."""
    rows = jnp.maximum(self.rows, 1)
    return self.total / rows.reshape(rows.shape + (1,) * (self.total.ndim - rows.ndim))


@jax.custom_vjp
def _tap(y, slot: Moments, moments: Moments):
  """y; the cotangent of the slot is the moments."""
  del slot, moments
  return y


_tap.defvjp(
  lambda y, slot, moments: (y, moments),
  lambda moments, cotangent: (cotangent, moments, None),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Weight):
  """The array w; the cotangent of its slot is the second moments of what it is applied to.

  Attributes:
    w: the kernel, an array or a Weight.
    slot: zeros.
    mask: the rows that count, [*stack, *rows], or None.
    roles: the role of each axis of w, leading stack axes left out.
    path: the leaf's path, for messages.
  """

  w: Any
  slot: Moments
  mask: jax.Array | None
  roles: str = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, w, slot: Moments, mask: jax.Array | None, roles: str, path: str) -> "Probe":
    """A probe with one mask for all of a stack."""
    if mask is not None:
      mask = jnp.broadcast_to(mask.astype(jnp.float32), slot.rows.shape + mask.shape)
    return cls(w, slot, mask, roles, path)

  def materialize(self):
    raise self._refusal("it is used by something else than a product or a convolution")

  @property
  def aval(self):
    return jax.ShapeDtypeStruct(self.w.shape, self.w.dtype)

  @property
  def is_stacked(self):
    return self.ndim > len(self.roles)

  @property
  def all_roles(self) -> str:
    return self.roles.rjust(self.ndim, "s")

  @property
  def _is_diagonal(self) -> bool:
    return self.slot.total.ndim == self.slot.rows.ndim + 1

  # ---- where it meets its rows

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    def product(w):
      lhs, rhs = (w, other) if weight_is_lhs else (other, w)
      return base.dot_general(lhs, rhs, dimension_numbers, **params)

    other_labels, _ = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    return self._tapped(self._plainly(product), other, other_labels)

  def conv_general_dilated(
    self, x, *, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, **params,
  ):  # fmt: skip
    windows = {
      "window_strides": window_strides, "padding": padding, "lhs_dilation": lhs_dilation,
      "rhs_dilation": rhs_dilation,
    }  # fmt: skip
    y = self._plainly(
      lambda w: base.conv_general_dilated(
        x, w, dimension_numbers=dimension_numbers, feature_group_count=feature_group_count,
        batch_group_count=batch_group_count, **windows, **params,
      )
    )  # fmt: skip
    lhs_spec, (out, *inputs), _ = dimension_numbers
    if (
      batch_group_count != 1 or "".join(self.all_roles[n] for n in (out, *inputs)).strip("i") != "o"
    ):
      raise self._refusal("the convolution has batch groups, or takes other axes as its inputs")
    # A row is what the kernel covers at one position, in one group of features.
    x = lax.transpose(x.astype(jnp.float32), lhs_spec)
    batch, groups = x.shape[0], feature_group_count
    x = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
    kernel = [self.shape[n] for n in inputs]
    x = lax.conv_general_dilated_patches(x, kernel[1:], **windows, precision=lax.Precision.HIGHEST)
    x = x.reshape(batch, groups, *kernel, *x.shape[2:])
    names = labels(self.ndim)
    positions = "CDEFGH"[: x.ndim - 2 - len(inputs)]
    return self._tapped(y, x, f"AB{''.join(names[n] for n in inputs)}{positions}")

  def ragged_dot_general(self, lhs, group_sizes, *, ragged_dot_dimension_numbers, **params):
    d = ragged_dot_dimension_numbers
    (_, rhs_c), (lhs_b, rhs_b) = d.dot_dimension_numbers
    if self.all_roles != "sio" or (*d.rhs_group_dimensions, *rhs_c) != (0, 1) or lhs_b or rhs_b:
      raise self._refusal("its groups are not of rows by a stack of (in, out) matrices")
    if self.mask is not None:
      raise self._refusal("its rows are sorted into groups, and a mask does not say where to")
    y = self._plainly(
      lambda w: base.ragged_dot_general(
        lhs, w, group_sizes, ragged_dot_dimension_numbers=d, **params
      )
    )
    x = lax.stop_gradient(lhs).astype(jnp.float32)
    pair = (x * x, jnp.ones((len(x), 1))) if self._is_diagonal else (x, x)
    by_group = lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((0,), (0,)), ((), ())),
      lhs_ragged_dimensions=[0],
      rhs_group_dimensions=[],
    )
    total = lax.ragged_dot_general(*pair, group_sizes, by_group, precision="highest")
    moments = Moments(total.reshape(self.slot.total.shape), group_sizes.astype(jnp.float32))
    return _tap(y, self.slot, moments)

  def gather(self, *_, **__):
    raise self._refusal("its rows are looked up, so they have no input")

  def _plainly(self, use: Callable):
    """What w gives, formed where it has to be."""
    try:
      return use(self.w)
    except NotFactored:
      return use(materialize(self.w))

  def _tapped(self, y, x, x_labels: Labels):
    """y, and the moments of x to the slot; upper-case labels are rows, the others those of w."""
    names = labels(self.ndim)
    stack, inputs = (part_labels(names, self.all_roles, role) for role in "si")
    rows = "".join(c for c in x_labels if c.isupper())
    if sorted(x_labels) != sorted(stack + rows + inputs):
      raise self._refusal("it is contracted over other axes than its inputs")
    x = reordered(lax.stop_gradient(x).astype(jnp.float32), x_labels, stack + rows + inputs)
    stacked, shape = x.shape[: len(stack)], x.shape[len(stack) : len(stack) + len(rows)]
    x = x.reshape(*stacked, math.prod(shape), -1)
    count = self._counted(shape)
    terms = "...nd,...nd->...d" if self._is_diagonal else "...nd,...ne->...de"
    total = jnp.einsum(terms, x * count[..., None], x, precision="highest")
    return _tap(y, self.slot, Moments(total, jnp.broadcast_to(count.sum(-1), stacked)))

  def _counted(self, rows: tuple[int, ...]) -> jax.Array:
    """How much each row counts, [*stack or nothing, the product of rows]."""
    if self.mask is None:
      return jnp.ones(math.prod(rows))
    stack = self.slot.rows.ndim
    stacked, masked = self.mask.shape[:stack], self.mask.shape[stack:]
    if rows == (math.prod(masked),):
      return self.mask.reshape(*stacked, -1)
    if rows[: len(masked)] != masked:
      raise self._refusal(f"the mask is {masked}, and the rows of its input are {rows}")
    mask = self.mask.reshape(*self.mask.shape, *[1] * (len(rows) - len(masked)))
    return jnp.broadcast_to(mask, stacked + rows).reshape(*stacked, -1)

  def _refusal(self, reason: str) -> ValueError:
    return ValueError(
      f"{self.path}: no second moments of its inputs, since {reason}; leave this path out"
    )

  # ---- what stays a probe: a change of its axes changes those of its slot that are stacks

  def astype(self, dtype):
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def scaled(self, c):
    return dataclasses.replace(self, w=base.scaled(self.w, c))

  def transpose(self, permutation):
    roles = self.all_roles
    inputs = [n for n in permutation if roles[n] == "i"]
    if inputs != sorted(inputs):
      raise self._refusal("its inputs change their order")
    new_roles = "".join(roles[n] for n in permutation)
    order = permuted_part(roles, permutation, new_roles, "s")

    def transposed(part):
      return lax.transpose(part, (*order, *range(len(order), part.ndim)))

    return self._with(lambda w: base.call("transpose", w, permutation), transposed, new_roles)

  def reshape(self, new_sizes):
    roles = reshaped_roles(self.all_roles, self.shape, new_sizes)
    if roles is None:
      raise self._refusal(f"the reshape to {tuple(new_sizes)} mixes axes of different roles")
    return self._reshaped(lambda w: base.call("reshape", w, new_sizes), new_sizes, roles)

  def squeeze(self, dimensions):
    kept = [n for n in range(self.ndim) if n not in dimensions]
    roles = "".join(self.all_roles[n] for n in kept)
    sizes = [self.shape[n] for n in kept]
    return self._reshaped(lambda w: base.call("squeeze", w, dimensions), sizes, roles)

  def _reshaped(self, change: Callable, sizes, roles: str) -> "Probe":
    before, after = self.slot.rows.ndim, part_sizes(sizes, roles, "s", 0)
    return self._with(change, lambda part: part.reshape(*after, *part.shape[before:]), roles)

  def slice(self, start_indices, limit_indices, strides):
    strides = strides or (1,) * self.ndim
    bounds = list(zip(start_indices, limit_indices, strides, strict=True))
    self._check_whole([len(range(*bound)) for bound in bounds])

    def sliced(part):
      each = [bounds[n] for n in part_axes(self.all_roles, "s")]
      whole = [(0, size, 1) for size in part.shape[len(each) :]]
      return lax.slice(part, *zip(*each, *whole, strict=True)) if each else part

    def change(w):
      return base.call("slice", w, start_indices, limit_indices, strides)

    return self._with(change, sliced, self.all_roles)

  def dynamic_slice(self, start_indices, slice_sizes):
    self._check_whole(slice_sizes)
    zero = jnp.zeros_like(jnp.asarray(start_indices[0]))

    def sliced(part):
      axes = part_axes(self.all_roles, "s")
      starts = [start_indices[n] for n in axes] + [zero] * (part.ndim - len(axes))
      sizes = [slice_sizes[n] for n in axes] + list(part.shape[len(axes) :])
      return lax.dynamic_slice(part, starts, sizes) if axes else part

    def change(w):
      return base.call("dynamic_slice", w, start_indices, slice_sizes)

    return self._with(change, sliced, self.all_roles)

  def _check_whole(self, sizes) -> None:
    pairs = zip(self.all_roles, sizes, self.shape, strict=True)
    if any(role == "i" and size != whole for role, size, whole in pairs):
      raise self._refusal("a part of its inputs is cut out")

  def _with(self, change: Callable, change_part: Callable, roles: str) -> "Probe":
    """This probe with w changed, and the parts whose leading axes are w's stacks."""
    slot, mask = jax.tree.map(change_part, (self.slot, self.mask))
    w = self._plainly(change)
    return dataclasses.replace(self, w=w, slot=slot, mask=mask, roles=roles.lstrip("s"))
