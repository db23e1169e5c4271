"""LowRank against its own dense array: products, rows and structural operations, by properties."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from jaxprs import equations
from tolerances import assert_close
from weight_table import factors, low_rank

from lora_jax import LowRank, NotFactored, adapt, is_weight, materialize
from lora_jax.weights import base

# Each example compiles a program of its own; most of the time is the compiler's.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
few = settings(max_examples=20, deadline=None)


@st.composite
def weights(draw, min_ndim=2, max_ndim=4, sizes=(1, 2, 3)):
  """A LowRank with random roles, at least one input and one output among them."""
  ndim = draw(st.integers(min_ndim, max_ndim))
  rest = draw(st.lists(st.sampled_from("sio"), min_size=ndim - 2, max_size=ndim - 2))
  roles = "".join(draw(st.permutations(["i", "o", *rest])))
  shape = tuple(draw(st.sampled_from(sizes)) for _ in range(ndim))
  w = low_rank(normal(*shape), roles)
  return low_rank(w, roles, seed=1) if draw(st.booleans()) else w


@st.composite
def products(draw):
  """(weight, other, dimension_numbers, whether the weight is on the left)."""
  w = draw(weights())
  use = {n: draw(st.sampled_from(["contracting", "batch", "free"])) for n in range(w.ndim)}
  axes = [n for n in range(w.ndim) if use[n] != "free"]
  axes = draw(st.permutations([*axes, *[None] * draw(st.integers(0, 2))]))
  other = normal(*(2 if n is None else w.shape[n] for n in axes))
  numbers = []
  for kind in ("contracting", "batch"):
    of_w = draw(st.permutations([n for n in axes if n is not None and use[n] == kind]))
    pair = (tuple(of_w), tuple(axes.index(n) for n in of_w))
    numbers.append(pair)
  left = draw(st.booleans())
  return w, other, tuple(pair if left else pair[::-1] for pair in numbers), left


def value_and_gradients(f, *args):
  def loss(*args):
    y = f(*args)
    return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

  return quick_jit(jax.grad(loss, tuple(range(len(args))), has_aux=True))(*args)


@few
@given(products())
def test_any_product_and_its_gradients_are_those_of_the_dense_array(product):
  w, other, numbers, left = product

  def f(w, other):
    return base.dot_general(*((w, other) if left else (other, w)), numbers)

  assert_close(
    value_and_gradients(f, w, other),
    value_and_gradients(lambda w, other: f(materialize(w), other), w, other),
  )


@st.composite
def structural_operations(draw, w):
  """The name of an operation with one that `w` may take, and its arguments."""
  ndim = w.ndim
  op = draw(
    st.sampled_from(
      ["transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice"]
    )
  )
  if op == "transpose":
    return op, (tuple(draw(st.permutations(range(ndim)))),)
  if op == "reshape":
    return op, (draw(st.sampled_from(shapes_of_size(w.size))),)
  if op == "squeeze":
    ones = [n for n in range(ndim) if w.shape[n] == 1]
    return op, (tuple(n for n in ones if draw(st.booleans())),)
  if op == "broadcast_in_dim":
    where = sorted(draw(st.permutations(range(ndim + 2)))[:ndim])
    shape = [2] * (ndim + draw(st.integers(max(where[-1] + 1, ndim), ndim + 2)) - ndim)
    for n, size in zip(where, w.shape, strict=True):
      shape[n] = draw(st.sampled_from([size, 2])) if size == 1 else size
    return op, (tuple(shape), tuple(where))
  starts = tuple(draw(st.integers(0, size - 1)) for size in w.shape)
  if op == "slice":
    strides = draw(st.none() | st.just((2,) * ndim))
    return op, (starts, w.shape, strides)
  return op, (starts, tuple(draw(st.integers(1, size)) for size in w.shape))


def shapes_of_size(size: int) -> list[tuple[int, ...]]:
  return [
    s
    for n in range(1, 6)
    for s in itertools.product(range(1, 10), repeat=n)
    if math.prod(s) == size
  ]


class Sized:
  """A view of a weight's shape that strategies draw from."""

  def __init__(self, shape):
    self.shape, self.ndim, self.size = shape, len(shape), math.prod(shape)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_chain_of_structural_operations_gives_the_same_operations_of_the_dense_array(data):
  w = data.draw(weights(max_ndim=3))
  dense = w.materialize()
  for _ in range(3):
    assume(w.ndim)
    op, args = data.draw(structural_operations(Sized(w.shape)))
    try:
      w = base.call(op, w, *args)
    except NotFactored:
      assume(False)
    dense = getattr(lax, op)(dense, *args)
    assert is_weight(w)
    assert (w.shape, w.aval.shape) == (dense.shape, dense.shape)
    assert len(w.all_roles) == w.ndim
  assert_close(w.materialize(), dense)


@pytest.mark.parametrize(
  ("roles", "before", "after"),
  [
    ("io", (6, 8), (2, 3, 8)),
    ("io", (6, 8), (6, 2, 4)),
    ("iio", (2, 3, 8), (6, 8)),
    ("ioo", (6, 2, 4), (6, 8)),
    ("io", (6, 8), (6, 1, 8)),
    ("iio", (2, 3, 8), (3, 2, 8)),
    ("sio", (6, 2, 4), (2, 3, 2, 4)),
    ("ssio", (2, 3, 2, 4), (6, 2, 4)),
    ("sio", (1, 6, 8), (6, 8)),
    ("io", (6, 1), (6,)),
    ("io", (1, 8), (2, 4)),
  ],
)
def test_a_reshape_that_splits_or_joins_axes_of_one_role_stays_factored(roles, before, after):
  w = low_rank(normal(*before), roles)
  assert_close(w.reshape(after).materialize(), w.materialize().reshape(after))


@pytest.mark.parametrize(
  ("roles", "before", "after"),
  [
    ("io", (6, 8), (48,)),
    ("io", (6, 8), (8, 6)),
    ("io", (4, 6), (2, 12)),
    ("sio", (2, 3, 4), (6, 4)),
  ],
)
def test_a_reshape_that_mixes_roles_is_not_factored(roles, before, after):
  with pytest.raises(NotFactored, match="mixes axes of different roles"):
    low_rank(normal(*before), roles).reshape(after)


@few
@given(
  st.sampled_from(["io", "oi", "ioo", "iio"]),
  st.integers(0, 2),
  st.sampled_from([(), (4,), (2, 3)]),
  st.sampled_from(["fill", "clip", "wrap", "promise_in_bounds"]),
)
def test_rows_along_any_axis_and_their_gradients_are_those_of_the_dense_array(
  roles, axis, index_shape, mode
):
  shape = (5, 7, 3)[: len(roles)]
  axis = axis % len(roles)
  limit = shape[axis] if mode == "promise_in_bounds" else 9
  ids = np.random.default_rng(0).integers(0, limit, index_shape)
  w = low_rank(normal(*shape), roles)

  def rows(take, w):
    batch = tuple(range(axis, axis + len(index_shape)))
    ndim = len(index_shape) + len(shape) - 1
    return take(
      w,
      jnp.asarray(ids)[..., None],
      dimension_numbers=lax.GatherDimensionNumbers(
        offset_dims=tuple(n for n in range(ndim) if n not in batch),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
      ),
      slice_sizes=tuple(1 if n == axis else size for n, size in enumerate(shape)),
      mode="fill" if mode == "wrap" else mode,
      fill_value=0.25,
    )

  assert_close(
    value_and_gradients(lambda w: rows(LowRank.gather, w), w),
    value_and_gradients(lambda w: rows(lax.gather, w.materialize()), w),
  )


@pytest.mark.parametrize(
  "equation", ["bi,io->bo", "bo,io->bi", "bi,io->ibo", "bo,io->obi", "io,io->o", "b,io->bio"]
)
def test_no_intermediate_is_larger_than_the_operands_and_the_result(equation):
  sizes = {"b": 17, "i": 11, "o": 13}
  inputs, out = equation.split("->")
  x = normal(*(sizes[c] for c in inputs.split(",")[0]))
  product = adapt(lambda w, x: jnp.einsum(equation, x, w), strict=True)
  jaxpr = jax.make_jaxpr(product)(low_rank(normal(11, 13), "io"), x)
  largest = max(v.aval.size for eqn in equations(jaxpr) for v in eqn.outvars)
  assert largest <= max(math.prod(sizes[c] for c in out), x.size)


def test_the_dense_array_is_the_base_and_the_scaled_product():
  w, (a, b) = normal(5, 7), factors((5, 7), "io")
  dense = LowRank(w, a, b, scale=0.5).materialize()
  np.testing.assert_allclose(dense, np.asarray(w, np.float64) + 0.5 * np.asarray(a) @ b, rtol=1e-6)


@pytest.mark.parametrize(
  ("roles", "shape", "equation"),
  [
    ("io", (5, 7), "ir,ro->io"),
    ("oi", (5, 7), "ir,ro->oi"),
    ("ioo", (5, 3, 2), "ir,rop->iop"),
    ("iio", (3, 2, 5), "hir,ro->hio"),
    ("sio", (4, 5, 7), "sir,sro->sio"),
    ("iso", (5, 4, 7), "sir,sro->iso"),
    ("sios", (4, 5, 7, 2), "stir,stro->siot"),
  ],
)
def test_roles_say_which_axes_the_factors_hold(roles, shape, equation):
  w, (a, b) = normal(*shape), factors(shape, roles)
  dense = LowRank(w, a, b, roles=roles.lstrip("s")).materialize()
  np.testing.assert_allclose(dense, w + np.einsum(equation, a, b), rtol=1e-5, atol=1e-6)


def test_the_shape_and_dtype_are_those_of_the_base():
  w = low_rank(normal(3, 5, 7).astype(jnp.bfloat16), "sio")
  assert (w.shape, w.dtype, w.ndim, w.is_stacked) == ((3, 5, 7), jnp.bfloat16, 3, True)
  assert w.aval == jax.ShapeDtypeStruct((3, 5, 7), jnp.bfloat16)
  assert jax.tree.map(lambda x: x[0], w).is_stacked is False


def test_a_small_update_of_a_bfloat16_base_is_not_lost_in_the_product():
  """w + s·a·b would round to w: each update is a 2⁻¹²th of its weight."""
  w = LowRank(jnp.ones((64, 4), jnp.bfloat16), jnp.full((64, 1), 2.0**-12), jnp.ones((1, 4)))
  assert (w.materialize() == w.w).all()
  y = base.dot_general(jnp.ones((1, 64)), w.astype(jnp.float32), (((1,), (0,)), ((), ())))
  np.testing.assert_array_equal(y, 64 + 64 * 2.0**-12)


def test_a_cast_keeps_the_factors_in_float32():
  w = low_rank(normal(5, 7), "io").astype(jnp.bfloat16)
  assert (w.dtype, w.a.dtype, w.b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_a_cast_to_integers_is_not_factored():
  with pytest.raises(NotFactored, match="int32"):
    low_rank(normal(5, 7), "io").astype(jnp.int32)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_the_product_has_derivatives_of_every_kind(derivative):
  w, x = low_rank(normal(3, 2), "io"), normal(3)

  def f(w, x):
    return jnp.sin(base.dot_general(x, w, (((0,), (0,)), ((), ()))))

  actual = quick_jit(derivative(f, (0, 1)))(w, x)
  assert_close(actual, quick_jit(derivative(lambda w, x: f(materialize(w), x), (0, 1)))(w, x))


def test_the_product_is_mapped_over_adapters_over_bases_and_over_both_with_gradients():
  """A batched product behind the optimisation barrier once made XLA's CPU compiler abort."""
  x, w = normal(4, 5), low_rank(normal(2, 3, 5, 7), "ssio")

  def f(w, x):
    return jnp.sum(jnp.sin(base.dot_general(x, w, (((1,), (0,)), ((), ())))), (0, 1))

  one_base = LowRank(w.w[0, 0], w.a[0], w.b[0], scale=w.scale)
  axes = LowRank(w=None, a=0, b=0, scale=w.scale)
  for mapped, weight in (
    (jax.vmap(f, (axes, None)), one_base),
    (jax.vmap(jax.vmap(f, (0, None)), (0, None)), w),
  ):

    def dense(weight, x, mapped=mapped):
      full = jnp.broadcast_to(weight.w, (*weight.a.shape[:-2], *weight.w.shape[-2:]))
      return jnp.sum(jnp.sin(x @ (full + weight.scale * weight.a @ weight.b)), (-1, -2))

    assert_close(value_and_gradients(mapped, weight, x), value_and_gradients(dense, weight, x))
