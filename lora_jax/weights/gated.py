"""Gated: a low-rank sum in which a gate switches ranks on and off.

    w + scale * a @ diag(gate) @ b

It gives every row of a batch an adapter of its own. The factors of several adapters are
concatenated along the rank, a = [a0, a1, ...] and b = [b0, b1, ...], and a row's gate is on for its
own adapter. Under `vmap` only the gate differs between rows, so both products remain products of
all rows with one matrix. Factors that differ would make as many small products as there are rows.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.weights import base, promotion
from lora_jax.weights.factor_axes import factor_labels, labels, part_labels
from lora_jax.weights.low_rank import LowRank, plus
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register
from lora_jax.weights.scaled import spread


@register
@dataclasses.dataclass(frozen=True)
class Gated(LowRank):
  """`w + scale * a @ diag(gate) @ b`, an array of w's shape and dtype.

  Attributes:
    gate: [*stack, rank], the multiplier of each rank; it does not train.
    w, a, b, scale, dropout, key, roles, frozen, path: as in `LowRank`.
  """

  LAYOUTS: ClassVar = {**LowRank.LAYOUTS, "gate": "sr"}

  gate: jax.Array = dataclasses.field(kw_only=True)

  def delta(self):
    return self._through_b().delta()

  def as_low_rank(self) -> LowRank:
    return self._through_b().as_low_rank()

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
    """Applies the gate to the rank-sized product between the factors, to neither factor."""
    asked, dtype = promotion.of_base(preferred_element_type, other.dtype, self.dtype)

    def use(w):
      lhs, rhs = (w, other) if weight_is_lhs else (other, w)
      return base.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=asked, **params
      )

    names = labels(self.ndim)
    x_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    gate_labels = part_labels(names, self.all_roles, "sr")
    a_labels, b_labels = factor_labels(names, self.all_roles)
    wide = promotion.joint(other.dtype, self.dtype)

    def product(operands, a, b, key):
      x, gate = operands
      x = self._dropped(x.astype(wide), key)
      factors = [(a, a_labels), (b, b_labels)]
      summed = set(x_labels) - set(out_labels)
      # x is first multiplied by the factor whose axes are summed.
      factors.sort(key=lambda factor: summed.isdisjoint(set(factor[1]) - set(gate_labels)))
      (first, first_labels), (second, second_labels) = factors
      both = dict.fromkeys(x_labels + first_labels)
      kept = [c for c in both if c not in gate_labels and (c in out_labels or c in second_labels)]
      h_labels = "".join(kept) + gate_labels
      h = jnp.einsum(
        f"{x_labels},{first_labels}->{h_labels}",
        x,
        first.astype(x.dtype),
        precision=precision,
        preferred_element_type=promotion.at_least_float32(x.dtype),
      )
      gates = spread(self.scale * gate, gate_labels, h_labels)
      h = promotion.multiplied(gates, h).astype(x.dtype)
      return jnp.einsum(
        f"{h_labels},{second_labels}->{out_labels}", h, second.astype(x.dtype), precision=precision
      )

    y = use(self.w)
    delta = self._delta(product, (other, self.gate), y, use)
    return plus(y, delta).astype(dtype or y.dtype)

  def conv_general_dilated(self, x, **params):
    return self._through_b().conv_general_dilated(x, **params)

  def ragged_dot_general(self, lhs, group_sizes, **params):
    return self._through_b().ragged_dot_general(lhs, group_sizes, **params)

  def gather(self, indices, *, dimension_numbers, **params):
    # The factor that is looked up is the large one.
    outputs = "o" in (self.all_roles[n] for n in dimension_numbers.collapsed_slice_dims)
    plain = self._through_a() if outputs else self._through_b()
    return plain.gather(indices, dimension_numbers=dimension_numbers, **params)

  def _through_a(self) -> LowRank:
    stack = self.a.shape[: self.gate.ndim - 1]
    inputs = [1] * (self.a.ndim - self.gate.ndim)
    gate = self.gate.reshape(*stack, *inputs, self.gate.shape[-1])
    return self._plain(promotion.multiplied(self.a, gate), self.b)

  def _through_b(self) -> LowRank:
    outputs = [1] * (self.b.ndim - self.gate.ndim)
    gate = self.gate.reshape(*self.gate.shape, *outputs)
    return self._plain(self.a, promotion.multiplied(self.b, gate))

  def _plain(self, a, b) -> LowRank:
    return LowRank(
      self.w, a, b, self.scale, self.dropout, self.key, roles=self.roles, path=self.path
    )
