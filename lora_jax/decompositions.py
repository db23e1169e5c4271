"""Kernels as matrices, and factorizations of a matrix into two thin factors.

    a, b = factorized(w, "ioo", lambda matrix: balanced(svd(matrix, rank)))

A kernel with several input and output axes is one matrix, inputs by outputs; a stack of kernels is
a stack of matrices. Computed in float32, or in float64 for float64 input.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.weights import explicit, promotion
from lora_jax.weights.factor_axes import A, B, part_sizes


class Svd(NamedTuple):
  """`u @ diag(s) @ vt`: [*stack, d, r], [*stack, r] descending, [*stack, r, k]."""

  u: jax.Array
  s: jax.Array
  vt: jax.Array


Array = jax.Array | np.ndarray
Factors = tuple[jax.Array, jax.Array]


def factorized(
  w: jax.Array, roles: str, factorize: Callable[[jax.Array], tuple[Array, Array]]
) -> Factors:
  """Returns a, [*stack, *inputs, rank], and b, [*stack, rank, *outputs], of a kernel.

  Args:
    w: the kernel.
    roles: the role of each of its axes: stack, input or output.
    factorize: maps [*stack, d, k] to two factors, [*stack, d, rank] and [*stack, rank, k].
  """
  order = [n for role in "sio" for n, each in enumerate(roles) if each == role]
  stack, inputs, outputs = (part_sizes(w.shape, roles, role, 0) for role in "sio")

  def factors(w):
    matrix = lax.transpose(w, order).reshape(*stack, math.prod(inputs), math.prod(outputs))
    a, b = factorize(matrix.astype(promotion.at_least_float32(w.dtype)))
    rank = a.shape[-1]
    return a.reshape(*stack, *inputs, rank), b.reshape(*stack, rank, *outputs)

  sharding = explicit.sharding_of(w)
  parts = tuple(explicit.part_sharding(sharding, roles, layout) for layout in (A, B))
  return explicit.laid_out(factors, parts)(w)


def svd(matrix: jax.Array, rank: int) -> Svd:
  """Returns the first `rank` singular triplets of [*stack, d, k], its best approximation."""
  u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
  return Svd(u[..., :rank], s[..., :rank], vt[..., :rank, :])


def product_svd(a: jax.Array, b: jax.Array, rank: int) -> Svd:
  """The first `rank` singular triplets of `a @ b`, [*stack, d, n] @ [*stack, n, k], by two QRs."""
  q_a, r_a = jnp.linalg.qr(a)
  q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -2, -1))
  u, s, vt = svd(jnp.matmul(r_a, jnp.swapaxes(r_b, -2, -1), precision="highest"), rank)
  return Svd(
    jnp.matmul(q_a, u, precision="highest"),
    s,
    jnp.matmul(vt, jnp.swapaxes(q_b, -2, -1), precision="highest"),
  )


def randomized_svd(
  key: jax.Array, matrix: jax.Array, rank: int, iterations: int, oversampling: int = 8
) -> Svd:
  """Returns approximately the first `rank` singular triplets, at the cost of a few thin products.

  The range of the matrix is found by `iterations` subspace iterations on rank + oversampling
  random vectors, orthonormalized after each product. The matrix projected onto it is decomposed
  exactly. Source: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.

  Args:
    key: a random key.
    matrix: [*stack, d, k].
    rank: at most min(d, k).
    iterations: 0 suffices for a spectrum that decays fast, 4 for most others.
    oversampling: the number of random vectors in excess of `rank`.
  """
  *stack, d, k = matrix.shape
  columns = min(rank + oversampling, d, k)
  transposed = jnp.swapaxes(matrix, -2, -1)

  def range_of(matrix, x):
    return jnp.linalg.qr(jnp.matmul(matrix, x, precision="highest"))[0]

  q = range_of(matrix, jax.random.normal(key, (*stack, k, columns), matrix.dtype))
  for _ in range(iterations):
    q = range_of(matrix, range_of(transposed, q))
  small = jnp.matmul(jnp.swapaxes(q, -2, -1), matrix, precision="highest")
  u, s, vt = svd(small, rank)
  return Svd(jnp.matmul(q, u, precision="highest"), s, vt)


def balanced(decomposition: Svd) -> Factors:
  """The factors u √s and √s vt, of equal norms."""
  root = jnp.sqrt(decomposition.s)
  return decomposition.u * root[..., None, :], root[..., None] * decomposition.vt
