"""LoKr: a change of the base that is a Kronecker product.

    w + scale * kron(w1, w2)

The inputs of w, flattened, are i1 × i2 and its outputs o1 × o2. w1 is [i1, o1] and w2 is [i2, o2],
each a matrix or the product of two thin ones. The change is not materialized: rows are reshaped to
[i1, i2] and multiplied by w2 along i2 and by w1 along i1. With w2 = w2_a w2_b of rank r2 that takes
r2 (i1 i2 + i1 o1 + o1 o2) multiplications a row, little more than a LoRA of rank r2.

Source: Yeh et al. 2023, LyCORIS, arXiv 2309.14859, section 3.2.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.base import NotFactored
from lora_jax.weights.factor_axes import (
  RANK,
  Labels,
  contract,
  factor_labels,
  labels,
  part_labels,
  reordered,
)
from lora_jax.weights.low_rank import LowRank, total
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register

# The labels of the factors' axes. They are not letters, which label the axes of w and its operands.
_I1, _I2, _O1, _O2, _R1, _R2 = "123456"


@register
@dataclasses.dataclass(frozen=True)
class LoKr(Adapted):
  """`w + scale * kron(w1, w2)`, an array of w's shape and dtype.

  The parts have PEFT's names and this library's order of axes, inputs first: w1 is lokr_w1.T, w1_a
  is lokr_w1_b.T and w1_b is lokr_w1_a.T; likewise for w2.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    w1: [*stack, i1, o1]; None where it is w1_a @ w1_b.
    w1_a, w1_b: [*stack, i1, r1] and [*stack, r1, o1], or None.
    w2: [*stack, i2, o2]; None where it is w2_a @ w2_b.
    w2_a, w2_b: [*stack, i2, r2] and [*stack, r2, o2], or None.
    scale: the factor of the product.
    order: the order in which the input and output axes of w are flattened, counted from the end as
      -1; empty for the axes' own order. (-2, -4, -3, -1) puts the channels of a convolution
      [h, w, c, k] before its window, as in PEFT.
    roles, frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = dict.fromkeys(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"), "s")
  TRAINED: ClassVar = tuple(LAYOUTS)

  w1: jax.Array | None = None
  w1_a: jax.Array | None = None
  w1_b: jax.Array | None = None
  w2: jax.Array | None = None
  w2_a: jax.Array | None = None
  w2_b: jax.Array | None = None
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  order: tuple[int, ...] = dataclasses.field(default=(), kw_only=True, metadata={"static": True})

  # ---- the array that it represents

  def delta(self):
    dtype = promotion.at_least_float32(self.dtype)
    parts, part_labels = zip(*self._outer, *self._inner, strict=True)
    flat = self._stacks + self._inputs + self._outputs

    def product(*parts):
      first, *rest = zip([part.astype(dtype) for part in parts], part_labels, strict=True)
      kron = _chain(*first, rest, self._stacks + _I1 + _I2 + _O1 + _O2, precision="highest")
      return self.scale * reordered(kron.reshape(self._sizes(flat)), flat, labels(self.ndim))

    return explicit.laid_out(product, self.explicit_sharding)(*parts)

  def fits(self):
    if self.ndim < len(self.roles):
      return False
    shapes = _shape(self.w1, self.w1_a, self.w1_b), _shape(self.w2, self.w2_a, self.w2_b)
    stack = self._sizes(self._stacks)
    if any(shape[:-2] != stack or len(shape) != len(stack) + 2 for shape in shapes):
      return False
    i1, i2, o1, o2 = self._splits
    return (i1 * i2, o1 * o2) == tuple(
      math.prod(self._sizes(side)) for side in (self._inputs, self._outputs)
    )

  def rescaled(self, c):
    part = "w1_b" if self.w1 is None else "w1"
    return dataclasses.replace(self, **{part: promotion.multiplied(getattr(self, part), c)})

  def as_low_rank(self):
    """The same change as a plain LoRA: kron(P Q, A B) = kron(P, A) kron(Q, B).

    A matrix that is not factored is the product of itself and the identity.

    Raises:
      NotFactored: for an adapter of a leaf with several input or output axes, whose sizes only the
        base has.
    """
    p, q = _thin(self.w1, self.w1_a, self.w1_b)
    a, b = _thin(self.w2, self.w2_a, self.w2_b)
    a = jnp.einsum("...ip,...jq->...ijpq", p, a)
    b = jnp.einsum("...po,...qk->...pqok", q, b)
    stack, rank = a.shape[:-4], math.prod(a.shape[-2:])
    if self.w is not None:
      a = a.reshape(*stack, *self._sizes(self._inputs), rank)
      b = b.reshape(*stack, rank, *self._sizes(self._outputs))
      a_labels, b_labels = factor_labels(labels(self.ndim), self.all_roles)
      a = reordered(a, self._stacks + self._inputs + RANK, a_labels)
      b = reordered(b, self._stacks + RANK + self._outputs, b_labels)
    elif self.roles.count("i") == self.roles.count("o") == 1:
      inputs, outputs = a.shape[-4:-2], b.shape[-2:]
      a, b = a.reshape(*stack, math.prod(inputs), rank), b.reshape(*stack, rank, math.prod(outputs))
    else:
      raise NotFactored("a LoKr with several input or output axes needs its base; attach it first")
    return LowRank(None, a, b, self.scale, roles=self.roles)

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
    x_labels, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    summed, made = set(x_labels) - set(out_labels), set(out_labels) - set(x_labels)
    if summed >= set(self._inputs) and made >= set(self._outputs):
      before, after, transposed = self._inputs, self._outputs, False
    elif summed >= set(self._outputs) and made >= set(self._inputs):
      before, after, transposed = self._outputs, self._inputs, True
    else:  # some of the inputs or outputs without the others
      return self._low_rank().dot_general(
        other,
        dimension_numbers,
        weight_is_lhs=weight_is_lhs,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **params,
      )
    asked, dtype = promotion.of_base(preferred_element_type, other.dtype, self.dtype)
    lhs, rhs = (self.w, other) if weight_is_lhs else (other, self.w)
    y = base.dot_general(
      lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=asked, **params
    )
    wide = promotion.joint(other.dtype, self.dtype)  # the other operand may be of integers
    parts, part_labels = zip(*self._factors(transposed), strict=True)
    splits = (_O1 + _O2, _I1 + _I2) if transposed else (_I1 + _I2, _O1 + _O2)
    size = dict(zip(_I1 + _I2 + _O1 + _O2, self._splits, strict=True))
    kept = "".join(c for c in x_labels if c not in before)
    rows = "".join(c for c in out_labels if c not in after)

    def product(x, *parts):
      x = reordered(x.astype(wide), x_labels, kept + before)
      x = x.reshape(*x.shape[: len(kept)], *(size[c] for c in splits[0]))
      factors = [(part.astype(x.dtype), f) for part, f in zip(parts, part_labels, strict=True)]
      delta = _chain(x, kept + splits[0], factors, rows + splits[1], precision=precision)
      delta = delta.reshape(*delta.shape[: len(rows)], *self._sizes(after))
      return reordered(delta, rows + after, out_labels)

    delta = explicit.laid_out(product, explicit.sharding_of(y))(other, *parts)
    return total(y, delta, dtype)

  def _factors(self, transposed: bool) -> list[tuple[jax.Array, Labels]]:
    """The factors with their labels, in the order of application that costs least."""
    (w1, w1_labels), *rest = self._outer
    outer = [(self.scale * w1.astype(promotion.joint(w1.dtype)), w1_labels), *rest]
    inner = self._inner
    i1, i2, o1, o2 = self._splits
    if transposed:
      outer, inner, i1, i2, o1, o2 = outer[::-1], inner[::-1], o1, o2, i1, i2
    if len(inner) == 2:
      return [inner[0], *outer, inner[1]]
    inner_first = i1 * o2 * (i2 + o1) <= o1 * i2 * (i1 + o2)
    return [*inner, *outer] if inner_first else [*outer, *inner]

  # Through the low-rank form.

  def conv_general_dilated(self, x, **params):
    return self._low_rank().conv_general_dilated(x, **params)

  def ragged_dot_general(self, lhs, group_sizes, **params):
    return self._low_rank().ragged_dot_general(lhs, group_sizes, **params)

  def gather(self, indices, **params):
    return self._low_rank().gather(indices, **params)

  def reshape(self, new_sizes, **placed):
    return self._low_rank().reshape(new_sizes, **placed)

  def squeeze(self, dimensions):
    return self._low_rank().squeeze(dimensions)

  def broadcast_in_dim(self, shape, broadcast_dimensions, **placed):
    return self._low_rank().broadcast_in_dim(shape, broadcast_dimensions, **placed)

  def slice(self, start_indices, limit_indices, strides):
    return self._low_rank().slice(start_indices, limit_indices, strides)

  def dynamic_slice(self, start_indices, slice_sizes):
    return self._low_rank().dynamic_slice(start_indices, slice_sizes)

  def rev(self, dimensions):
    return self._low_rank().rev(dimensions)

  def pad(self, value, config):
    return self._low_rank().pad(value, config)

  def times(self, x, axes):
    return self._low_rank().times(x, axes)

  def _low_rank(self) -> LowRank:
    low_rank = self.as_low_rank()
    i1, i2, o1, o2 = self._splits
    if low_rank.rank >= min(i1 * i2, o1 * o2):
      raise NotFactored(
        "only products with all inputs or all outputs are direct, and the low-rank form has rank "
        f"{low_rank.rank}, where the matrix is {i1 * i2} × {o1 * o2}"
      )
    return dataclasses.replace(low_rank, w=self.w, path=self.path)

  # ---- operations that stay a weight

  def astype(self, dtype):
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise NotFactored(f"a cast to {dtype} rounds the sum, not its terms")
    # The parts keep their precision: they are cast where they are used.
    return dataclasses.replace(self, w=base.astype(self.w, dtype))

  def transpose(self, permutation):
    place = {before: after for after, before in enumerate(permutation)}
    stacks = [n for n, role in enumerate(self.all_roles) if role == "s"]
    moved = sorted(range(len(stacks)), key=lambda n: place[stacks[n]])
    parts = {
      name: lax.transpose(part, (*moved, len(moved), len(moved) + 1))
      for name, part in self.parts.items()
    }
    return dataclasses.replace(
      self,
      w=base.call("transpose", self.w, permutation),
      **parts,
      order=tuple(place[n] - self.ndim for n in self._order),
      roles="".join(self.all_roles[n] for n in permutation).lstrip("s"),
    )

  def scaled(self, c):
    return dataclasses.replace(self.rescaled(c), w=base.scaled(self.w, c))

  def local_specs(self, spec):
    if any(role != "s" and name for role, name in zip(self.all_roles, spec, strict=False)):
      raise NotFactored("shards of a Kronecker product are not made of shards of its parts")
    return super().local_specs(spec)

  # ---- the axes

  @property
  def _order(self) -> list[int]:
    """The axes of w without the stacks, in the order in which they are flattened."""
    own = [n for n, role in enumerate(self.all_roles) if role != "s"]
    return [n + self.ndim for n in self.order] or own

  @property
  def _stacks(self) -> Labels:
    return part_labels(labels(self.ndim), self.all_roles, "s")

  @property
  def _inputs(self) -> Labels:
    """The labels of the inputs, in the order in which they are flattened."""
    return "".join(labels(self.ndim)[n] for n in self._order if self.all_roles[n] == "i")

  @property
  def _outputs(self) -> Labels:
    """The labels of the outputs, in the order in which they are flattened."""
    return "".join(labels(self.ndim)[n] for n in self._order if self.all_roles[n] == "o")

  def _sizes(self, of: Labels) -> tuple[int, ...]:
    return tuple(self.shape[labels(self.ndim).index(c)] for c in of)

  @property
  def _splits(self) -> tuple[int, int, int, int]:
    """i1, i2, o1 and o2."""
    i1, o1 = _shape(self.w1, self.w1_a, self.w1_b)[-2:]
    i2, o2 = _shape(self.w2, self.w2_a, self.w2_b)[-2:]
    return i1, i2, o1, o2

  @property
  def _outer(self) -> list[tuple[jax.Array, Labels]]:
    """w1 or its factors, with labels."""
    s = self._stacks
    if self.w1 is not None:
      return [(self.w1, s + _I1 + _O1)]
    assert self.w1_a is not None and self.w1_b is not None
    return [(self.w1_a, s + _I1 + _R1), (self.w1_b, s + _R1 + _O1)]

  @property
  def _inner(self) -> list[tuple[jax.Array, Labels]]:
    """w2 or its factors, with labels."""
    s = self._stacks
    if self.w2 is not None:
      return [(self.w2, s + _I2 + _O2)]
    assert self.w2_a is not None and self.w2_b is not None
    return [(self.w2_a, s + _I2 + _R2), (self.w2_b, s + _R2 + _O2)]


def _chain(
  x: jax.Array,
  x_labels: Labels,
  factors: Sequence[tuple[jax.Array, Labels]],
  out_labels: Labels,
  precision,
) -> jax.Array:
  """Multiplies x by one factor after the other; sums over labels that are not in out_labels."""
  precise = promotion.at_least_float32(x.dtype)
  for n, (factor, f_labels) in enumerate(factors):
    later = set(out_labels).union(*(rest for _, rest in factors[n + 1 :]))
    kept = "".join(c for c in dict.fromkeys(x_labels + f_labels) if c in later)
    y = contract(
      x, x_labels, factor, f_labels, kept, precision=precision, preferred_element_type=precise
    )
    x, x_labels = y.astype(x.dtype), kept
  return reordered(x, x_labels, out_labels)


def _shape(full, a, b) -> tuple[int, ...]:
  """The shape of a matrix, or of the product of its factors; empty if there is neither."""
  if (full is None) == (a is None) or (a is None) != (b is None):
    return ()
  if full is not None:
    return tuple(full.shape)
  return (*a.shape[:-1], b.shape[-1]) if (*a.shape[:-2], a.shape[-1]) == b.shape[:-1] else ()


def _thin(full, a, b) -> tuple[jax.Array, jax.Array]:
  """A matrix as the product of two, as thin as its shape allows."""
  if full is None:
    return a, b
  *stack, rows, columns = full.shape
  eye = jnp.eye(min(rows, columns), dtype=full.dtype)
  eye = jnp.broadcast_to(eye, (*stack, *eye.shape))
  return (full, eye) if columns <= rows else (eye, full)
