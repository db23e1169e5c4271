"""GradientProbe: a kernel wrapper that records the second moments of its output gradients.

The counterpart of `weights.probe` on the output side. The result y passes through a function whose
cotangent for a slot of zeros is defined as the sum of g gᵀ over the rows g of the gradient of y.
`lora_jax.compress.sensitivity` reads it.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.weights import base, explicit
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factor_axes import Labels, labels, part_labels, reordered
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register
from lora_jax.weights.structured import Structured


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _tap(y, slot, before: Labels, after: Labels, stacks: int):
  """Returns y; the cotangent of the slot is the sum of g gᵀ, where g is the gradient of y with its
  axes in the order of `after`: stacks, rows, outputs."""
  del slot, before, after, stacks
  return y


def _tap_forward(y, slot, before, after, stacks):
  del before, after, stacks
  return y, slot


def _tap_backward(before, after, stacks, slot, gradient):
  def moments(gradient):
    g = reordered(gradient.astype(jnp.float32), before, after)
    k = math.isqrt(slot.shape[-1])
    stacked, rest = g.shape[:stacks], g.shape[stacks:]
    g = g.reshape(*stacked, math.prod(rest) // max(k, 1), k)
    total = jnp.einsum("...nk,...nl->...kl", g, g, precision="highest")
    return total.reshape(slot.shape)

  return gradient, explicit.laid_out(moments, explicit.whole(gradient))(gradient)


_tap.defvjp(_tap_forward, _tap_backward)


@register
@dataclasses.dataclass(frozen=True)
class GradientProbe(Structured):
  """The array w; its slot's cotangent is the second moments of the gradients of its results.

  Attributes:
    w: the kernel, an array or a Weight.
    total: a slot, zeros, for the sum of g gᵀ: [*stack, k * k], k the number of all outputs.
    roles, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"total": "sr"}
  TRAINED: ClassVar = ()

  total: jax.Array

  def materialize(self):
    return base.materialize(self.w)

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    operands = (self.w, other) if weight_is_lhs else (other, self.w)
    y = base.dot_general(*operands, dimension_numbers, **params)
    _, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    names = labels(self.ndim)
    stack, outputs = (part_labels(names, self.all_roles, role) for role in "so")
    rows = "".join(c for c in out_labels if c.isupper())
    if sorted(out_labels) != sorted(stack + rows + outputs):
      raise NotFactored("the product keeps other axes of it than its outputs")
    return _tap(y, self.total, out_labels, stack + rows + outputs, len(stack))

  def conv_general_dilated(self, x, *, feature_group_count, batch_group_count, **params):
    y = base.conv_general_dilated(
      x,
      self.w,
      feature_group_count=feature_group_count,
      batch_group_count=batch_group_count,
      **params,
    )
    _, (out, *inputs), y_spec = params["dimension_numbers"]
    if feature_group_count * batch_group_count != 1:
      raise NotFactored("the convolution has groups, each with outputs of its own")
    if "".join(self.all_roles[n] for n in (out, *inputs)).strip("i") != "o":
      raise NotFactored("the convolution takes other axes as its inputs")
    output, rows = labels(self.ndim)[out], "ABCDEFGH"[: y.ndim - 1]
    batch, feature, *positions = y_spec
    y_labels = dict(zip((batch, *positions), rows, strict=True)) | {feature: output}
    return _tap(y, self.total, "".join(y_labels[n] for n in range(y.ndim)), rows + output, 0)

  def scaled(self, c):
    raise NotFactored("it is multiplied by a scalar")
