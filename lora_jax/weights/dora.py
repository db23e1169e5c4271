"""DoRA: a low-rank sum in which every output has a direction and a learned length.

    magnitude * (w + scale * a @ b) / |w + scale * a @ b|        norms over the inputs

The norm is computed without the sum. With C = aᵀ w, once per step, and G = aᵀ a,

    |w + s a b|² = |w|² + 2 s <C, b> + s² <b, G b>               for every output

where |w| is a constant of the base. C costs r·d·k multiplications, as many as r rows of a batch,
and has no backward pass: by section 4.3 of the paper the norm is treated as a constant. With one
factor per output, c = magnitude / norm, the weight is `c * w + scale * a @ (c * b)`, a low-rank sum
over scaled outputs. `weight.applied()` returns that sum; for inference, put it in the weight's
place, and the norm is computed only once.

Source: Liu et al. 2024, DoRA, arXiv 2402.09353.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factor_axes import RANK, Labels, factor_labels, labels, part_labels
from lora_jax.weights.low_rank import LowRank
from lora_jax.weights.pytree import register
from lora_jax.weights.scaled import ScaledOutputs, spread, times


@register
@dataclasses.dataclass(frozen=True)
class DoRA(Adapted):
  """`magnitude * (w + scale * a @ b) / |w + scale * a @ b|`, an array of w's shape and dtype.

  An output whose sum w + scale * a @ b is zero stays zero.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    a: [*stack, *inputs, rank].
    b: [*stack, rank, *outputs].
    magnitude: [*stack, *outputs], the length of every output, of either sign.
    norm: [*stack, *outputs], the norm of w; None until `attach` computes it.
    scale: the factor of the product.
    constant_norm: treats the norm as a constant in the derivative, as in section 4.3 of the paper.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"a": "sir", "b": "sro", "magnitude": "so", "norm": "so"}
  TRAINED: ClassVar = ("a", "b", "magnitude")

  a: jax.Array
  b: jax.Array
  magnitude: jax.Array
  norm: jax.Array | None = None
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  constant_norm: bool = dataclasses.field(default=True, metadata={"static": True})

  def attach(self, w, path):
    weight = super().attach(w, path)
    if weight.norm is not None:
      return weight
    return dataclasses.replace(weight, norm=input_norms(w, self.roles))

  def applied(self) -> LowRank:
    c = self.factor()
    w = ScaledOutputs(self.w, c, roles=self.roles, path=self.path)
    b = promotion.multiplied(self.b, jnp.expand_dims(c, self._rank_axis))
    return LowRank(w, self.a, b, self.scale, roles=self.roles, path=self.path)

  def materialize(self):
    return self._full().astype(self.dtype)

  def delta(self):
    full = self._full()
    return full - base.materialize(self.w).astype(full.dtype)

  def _full(self) -> jax.Array:
    applied = self.applied()
    delta = applied.delta()
    w = base.materialize(self.w).astype(delta.dtype)
    return times(w, labels(self.ndim), applied.w.c, _output_labels(self.all_roles)) + delta

  # ---- lengths

  def factor(self) -> jax.Array:
    """`magnitude / |w + scale * a @ b|`, [*stack, *outputs], in at least float32.

    Exactly one where b is zero and the magnitude equals the norm of w, and where the sum is zero.
    """
    norm = self.norm_of_sum()
    if self.constant_norm:
      norm = lax.stop_gradient(norm)

    def factor(magnitude, norm):
      left = norm > 0
      return jnp.where(left, magnitude.astype(norm.dtype) / jnp.where(left, norm, 1), 1)

    return explicit.laid_out(factor, explicit.sharding_of(norm))(self.magnitude, norm)

  def norm_of_sum(self) -> jax.Array:
    """`|w + scale * a @ b|`, [*stack, *outputs], in at least float32.

    The square is a sum of terms of either sign. A result smaller than their rounding error is
    noise, and is replaced by that error.
    """
    assert self.norm is not None  # `attach` computes it
    dtype = promotion.at_least_float32(self.dtype)
    a, b, norm = (x.astype(dtype) for x in (self.a, self.b, self.norm))
    if self.constant_norm:  # keeps the norm out of the derivative's trace
      a, b = lax.stop_gradient((a, b))
    sharding = explicit.part_sharding(self.explicit_sharding, self.all_roles, "so")
    return explicit.laid_out(self._norm_of_sum, sharding)(a, b, norm, self._a_w(a, dtype))

  def _norm_of_sum(self, a, b, norm, a_w):
    # Relative to w's norm: this avoids over- and underflow, and one stays exactly one.
    unit = jnp.where(norm > 0, norm, 1)
    b = self.scale * b / jnp.expand_dims(unit, self._rank_axis)
    c = a_w / jnp.expand_dims(unit, self._rank_axis)
    a_labels, b_labels = factor_labels(labels(self.ndim), self.all_roles)
    a2_labels, b2_labels = a_labels.replace(RANK, "R"), b_labels.replace(RANK, "R")
    stack = a_labels[: self._rank_axis]
    gram = jnp.einsum(f"{a_labels},{a2_labels}->{stack}{RANK}R", a, a, precision="highest")
    gram_b = jnp.einsum(f"{stack}{RANK}R,{b2_labels}->{b_labels}", gram, b, precision="highest")
    change = jnp.sum(b * gram_b, self._rank_axis)
    terms = (norm > 0).astype(change.dtype) + change
    resolution = 8 * float(jnp.finfo(promotion.joint(self.dtype)).eps)
    squared = jnp.maximum(terms + 2 * jnp.sum(b * c, self._rank_axis), resolution * terms)
    left = squared > 0
    return jnp.where(left, unit * jnp.sqrt(jnp.where(left, squared, 1)), 0)

  def _a_w(self, a: jax.Array, dtype) -> jax.Array:
    """`aᵀ w`, [*stack, rank, *outputs], summed in `dtype`."""
    stack, inputs = ([n for n, x in enumerate(self.all_roles) if x == role] for role in "si")
    a_stack = list(range(len(stack)))
    a_inputs = list(range(len(stack), len(stack + inputs)))
    # float16 and float8 would lose a: see `weights.promotion`.
    a = a.astype(promotion.joint(self.dtype))
    sharding = self.explicit_sharding
    if sharding is None:
      placed = {}
    else:
      a = jax.sharding.reshard(a, explicit.part_sharding(sharding, self.all_roles, "sir"))
      placed = {"out_sharding": explicit.part_sharding(sharding, self.all_roles, "sro")}
    return base.dot_general(
      a,
      self.w,
      ((a_inputs, inputs), (a_stack, stack)),
      precision="highest",
      preferred_element_type=dtype,
      **placed,
    )

  @property
  def _rank_axis(self) -> int:
    """The rank axis of b."""
    return self.all_roles.count("s")

  # ---- operations specific to DoRA

  def unmerge(self, merged, path):
    """The base whose merge with this adapter is `merged`, up to rounding.

    The norm of w + scale * a @ b is not in the merge. It is a root of |norm_of_sum * direction -
    scale * a @ b| = norm; the larger root, unless an output has turned by more than a right angle.
    An output of magnitude zero cannot be recovered: nan.
    """
    delta = LowRank(None, self.a, self.b, self.scale, roles=self.roles).attach(merged, path).delta()
    names, out = labels(merged.ndim), _output_labels(self.roles.rjust(merged.ndim, "s"))

    def inner(x, y):
      return jnp.einsum(f"{names},{names}->{out}", x, y, precision="highest")

    def unmerged(merged, magnitude, norm, delta):
      full, magnitude, norm = (x.astype(delta.dtype) for x in (merged, magnitude, norm))
      along = inner(full, delta) / magnitude
      norm_of_sum = along + jnp.sqrt(jnp.maximum(along**2 + norm**2 - inner(delta, delta), 0))
      w = times(full, names, norm_of_sum / magnitude, out) - delta
      return jnp.where(spread(norm, out, names) > 0, w, 0).astype(merged.dtype)

    sharding = explicit.sharding_of(merged)
    return explicit.laid_out(unmerged, sharding)(merged, self.magnitude, self.norm, delta)

  def rescaled(self, c):
    raise ValueError(
      f"{self.path or 'DoRA'}: the change of a DoRA cannot be multiplied by a number, since its "
      "outputs have lengths of their own; convert it to a LoRA first"
    )

  def local_specs(self, spec):
    if any(role == "i" and name for role, name in zip(self.all_roles, spec, strict=False)):
      raise NotFactored("its norms are over all inputs, and each device has only some")
    return super().local_specs(spec)


def input_norms(w: Any, roles: str) -> jax.Array:
  """The norms over the inputs of an array or Weight, [*stack, *outputs], in at least float32."""
  w = base.materialize(w)
  w = w.astype(promotion.at_least_float32(w.dtype))
  names, all_roles = labels(w.ndim), roles.rjust(w.ndim, "s")

  def norms(w):
    squares = f"{names},{names}->{_output_labels(all_roles)}"
    return jnp.sqrt(jnp.einsum(squares, w, w, precision="highest"))

  sharding = explicit.part_sharding(explicit.sharding_of(w), all_roles, "so")
  return explicit.laid_out(norms, sharding)(w)


def _output_labels(roles: str) -> Labels:
  """The labels of an array with one value per output, given `labels(len(roles))` of the matrix."""
  return part_labels(labels(len(roles)), roles, "so")
