"""The product of LoRA: an operand times `a @ b`, without materializing `a @ b`."""

import functools
import math
import string

import jax
from jax import lax

from lora_jax.weights import promotion
from lora_jax.weights.factor_axes import RANK, Labels, contract, factor_labels, labels, reordered


def dot_labels(
  other_ndim: int, weight_ndim: int, dimension_numbers: lax.DotDimensionNumbers, weight_is_lhs: bool
) -> tuple[Labels, Labels]:
  """Einsum labels of the other operand and of the result of a dot_general.

  The weight's labels are `labels(weight_ndim)`; upper-case letters are axes that only the other
  operand has.
  """
  contracting, batch = dimension_numbers
  if weight_is_lhs:
    contracting, batch = contracting[::-1], batch[::-1]
  (other_c, weight_c), (other_b, weight_b) = contracting, batch
  weight = labels(weight_ndim)
  shared = dict(zip((*other_c, *other_b), (*weight_c, *weight_b), strict=True))
  fresh = iter(string.ascii_uppercase)
  other = "".join(weight[shared[n]] if n in shared else next(fresh) for n in range(other_ndim))
  other_free = "".join(c for c in other if c.isupper())
  weight_free = "".join(c for n, c in enumerate(weight) if n not in (*weight_c, *weight_b))
  free = weight_free + other_free if weight_is_lhs else other_free + weight_free
  return other, "".join(weight[n] for n in weight_b) + free


@functools.partial(
  jax.jit,
  static_argnames=("x_labels", "roles", "scale", "out_labels", "precision"),
)
def low_rank_product(
  x: jax.Array,
  x_labels: Labels,
  a: jax.Array,
  b: jax.Array,
  roles: str,
  scale: float,
  out_labels: Labels,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """Contracts x with `scale * a @ b` by two thin products; no operand has the full size.

  Two details speed up the backward pass; autodiff does the rest, so `jvp`, `vmap` and `linearize`
  work as usual. Measured on CPU, these details make up most of the difference to the naive product:

  - The factors are used rank-major, [r, ...], behind an optimization barrier. The gradient of `a`
    is then computed as `dhᵀ x`, an [r, d] array. That is 5 to 20 times faster than `xᵀ dh`, which
    XLA would make of it by folding the transpose back into the product. The barrier is on the flat
    array, which has only one layout. Through any other array XLA passes the layout of the
    transposed gradient on to a batched product, and its CPU compiler aborts the process.
  - The rows of the rank-sized h are flattened to one axis before the second product. Otherwise the
    gradient of `b` is contracted over two axes, with its operands in a slow order.

  The product is a `jit` of its own, so that products of the same shapes are traced, differentiated
  and lowered once for all layers, and an eager call is one dispatch. The compiler inlines it.

  Args:
    x: the other operand.
    x_labels: a letter for each axis of x.
    a: the first factor.
    b: the second factor.
    roles: the roles of the matrix, whose axes have the letters `labels(len(roles))`.
    scale: the multiplier of the product.
    out_labels: the letters of the result's axes.
    precision: of the products, as in `lax.dot_general`.
  """
  a_labels, b_labels = factor_labels(labels(len(roles)), roles)
  stacks = roles.count("s")
  rank_major = a_labels[:stacks] + RANK + a_labels[stacks:-1]
  a = reordered(a.astype(x.dtype), a_labels, rank_major)
  a = lax.optimization_barrier(a.ravel()).reshape(a.shape)
  b = b.astype(x.dtype)
  sizes = dict(zip(x_labels + rank_major + b_labels, x.shape + a.shape + b.shape, strict=True))

  def left_by(first_labels: Labels, second_labels: Labels) -> list[str]:
    union = x_labels + "".join(c for c in first_labels if c not in x_labels)
    return [c for c in union if c in out_labels or c in second_labels]

  # x is first multiplied by the factor that leaves the smaller h.
  orders = [((a, rank_major), (b, b_labels)), ((b, b_labels), (a, rank_major))]
  (first, first_labels), (second, second_labels) = min(
    orders, key=lambda order: math.prod(sizes[c] for c in left_by(order[0][1], order[1][1]))
  )

  # h: [the stacks that stay, rows, axes that the second product contracts]
  kept = left_by(first_labels, second_labels)
  batch = "".join(c for c in kept if c in out_labels and c in second_labels)
  rows = "".join(c for c in kept if c not in second_labels)
  inner = "".join(c for c in kept if c in second_labels and c not in out_labels)
  precise = promotion.at_least_float32(x.dtype)
  h = contract(
    x,
    x_labels,
    first,
    first_labels,
    batch + rows + inner,
    precision=precision,
    preferred_element_type=precise,
  )
  h = (scale * h).astype(x.dtype)
  split = h.shape[: len(batch)], h.shape[len(batch) : len(batch) + len(rows)]
  h = h.reshape(*split[0], math.prod(split[1]), *h.shape[len(batch) + len(rows) :])
  free = "".join(c for c in second_labels if c in out_labels and c not in batch)
  y = contract(h, f"{batch}Z{inner}", second, second_labels, f"{batch}Z{free}", precision=precision)
  y = y.reshape(*split[0], *split[1], *y.shape[len(batch) + 1 :])
  return reordered(y, batch + rows + free, out_labels)
