"""The dtypes of products and sums: strict promotion, float8, float16's range, and empty axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from programs import PROGRAMS
from tolerances import assert_close
from weight_table import MAKERS, Kind, low_rank, with_weights

import lora_jax
from lora_jax import LowRank, adapt, materialize
from lora_jax.weights import DoRA, Gated, LoKr, input_norms, promotion
from lora_jax.weights.quantized import INT8, quantized

USES = [
  ("matmul", jnp.bfloat16), ("experts summed", jnp.bfloat16), ("axes joined", jnp.bfloat16),
  ("tied embedding and head", jnp.bfloat16), ("scaled by a traced number", jnp.bfloat16),
  ("embedding, ids out of bounds", jnp.float16), ("transposed use", jnp.float16),
]  # fmt: skip
SLOW_USES = [
  ("one of two inputs", jnp.bfloat16), ("one of a stack, traced", jnp.bfloat16),
  ("convolution, grouped", jnp.bfloat16), ("experts by ragged_dot", jnp.bfloat16),
  ("convolution, grouped", jnp.float16), ("experts by ragged_dot", jnp.float16),
  ("experts summed", jnp.float16),
]  # fmt: skip


EVERYDAY = ("float32", "gated", "dora", "masked", "nf4", "dropout")


def often_and_rarely():
  for name, make in MAKERS.items():
    marks = [] if name in EVERYDAY else [pytest.mark.slow]
    yield pytest.param(make, USES, id=f"{name}-often", marks=marks)
    yield pytest.param(make, SLOW_USES, id=f"{name}-rare", marks=pytest.mark.slow)


@pytest.mark.parametrize(("make", "uses"), list(often_and_rarely()))
def test_every_kind_in_half_precision_needs_no_implicit_promotion(make, uses):
  for name, dtype in uses:
    program = PROGRAMS[name]
    kind = Kind(lambda w, roles, dtype=dtype: make(w.astype(dtype), roles), model_dtype=dtype)
    if make is MAKERS["token rows"] and set(program.roles.values()) != {"io"}:
      continue  # it is for one table of tokens
    params = with_weights(program.params, program.roles, kind)
    floats = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), params)
    trained, frozen = lora_jax.partition(params, floats)
    x = program.x.astype(dtype) if jnp.issubdtype(program.x.dtype, jnp.floating) else program.x

    def loss(trained, frozen, x, f=program.f):
      y = adapt(f)(lora_jax.join(trained, frozen), x)
      return jnp.sum(y.astype(jnp.float32)), y

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
      expected = jax.eval_shape(lambda p, x, f=program.f: f(materialize(p), x), params, x)
      _, y = jax.eval_shape(jax.grad(loss, has_aux=True), trained, frozen, x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


def test_the_joint_dtype_does_not_depend_on_the_user_s_promotion():
  f8 = jnp.float8_e4m3fn
  with jax.numpy_dtype_promotion("strict"):
    assert promotion.joint(jnp.bfloat16, jnp.bfloat16) == jnp.bfloat16
    assert promotion.joint(jnp.bfloat16, jnp.float32) == jnp.float32
    assert promotion.joint(jnp.int32, jnp.bfloat16) == jnp.bfloat16
    assert promotion.joint(jnp.float16) == promotion.joint(f8, jnp.bfloat16) == jnp.float32
    assert promotion.at_least_float32(f8) == jnp.float32
    assert promotion.at_least_float32(jnp.complex64) == jnp.complex64


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("name", ["float32", "dora", "gated", "lokr", "loha", "full", "token rows"])
def test_a_float8_base_is_merged_in_float32_and_rounded_once(name, dtype):
  base = normal(12, 16).astype(dtype)
  w, wide = MAKERS[name](base, "io"), MAKERS[name](base.astype(jnp.float32), "io")
  assert w.materialize().dtype == dtype
  assert_close(
    w.materialize().astype(jnp.float32), wide.materialize().astype(dtype).astype(jnp.float32)
  )


def test_float8_products_keep_what_the_adapter_adds():
  f8, x = jnp.float8_e4m3fn, normal(3, 12).astype(jnp.float8_e4m3fn)
  w = low_rank(normal(12, 16).astype(f8), "io")

  def f(w, x):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

  exact = x.astype(jnp.float32) @ (w.w.astype(jnp.float32) + w.delta())
  assert_close(adapt(f, strict=True)(w, x), exact)
  y = adapt(lambda w, x: x @ w.astype(f8), strict=True)(low_rank(normal(12, 16), "io"), x)
  assert y.dtype == f8
  error = jnp.abs(y.astype(jnp.float32) - x.astype(jnp.float32) @ (normal(12, 16) + w.delta()))
  assert error.max() < 0.5


BIG, SMALL = jnp.full((1, 64), 40.0, jnp.float16), 1e-4
A, B = jnp.ones((64, 4)), jnp.full((4, 64), SMALL)
W = normal(64, 64).astype(jnp.float16)
NORM = input_norms(W, "io")


@pytest.mark.parametrize(
  "w",
  [
    LowRank(W, A, B, scale=32.0),
    LowRank(W, A.astype(jnp.float16) * 100, B.astype(jnp.float16) / 100, scale=32.0),
    Gated(W, A, B, scale=32.0, gate=jnp.ones(4)),
    LoKr(W, w1=jnp.full((8, 8), 1e3), w2=jnp.full((8, 8), 1e-5), scale=1.0),
    DoRA(W / 100, A, B / 1e4, NORM / 100 * jnp.linspace(1, 100, 64), NORM / 100),
    # The base overflows, and the adapter brings it back.
    LowRank(W * 0 + 100, jnp.ones((64, 1)), jnp.full((1, 64), -99.0)),
    quantized(W / 100, INT8, (-2,)),
  ],
  ids=["scale", "float16 factors", "gated", "lokr", "dora", "base", "int8"],
)  # fmt: skip
def test_float16_overflows_only_where_the_materialized_weight_does(w):
  exact = BIG.astype(jnp.float32) @ w.materialize().astype(jnp.float32)
  assert jnp.abs(exact).max() < 65504
  for f, x in [(lambda w, x: x @ w, BIG), (lambda w, x: jnp.einsum("io,bi->ob", w, x).T, BIG)]:
    y = adapt(f)(w, x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.02, atol=4)
  assert jnp.isfinite(jax.grad(lambda x: adapt(lambda w, x: x @ w)(w, x).mean())(BIG)).all()


@pytest.mark.parametrize(
  "name",
  ["float32", "nested", "gated", "dora", "factored", "nf4", "int8", "adapted-pruned", "full"],
)
@pytest.mark.parametrize("shape", [(0, 16), (12, 0)])
def test_an_axis_of_size_zero_is_like_any_other(name, shape):
  rows, columns = shape
  w = MAKERS[name](jnp.zeros(shape), "io")
  uses = [
    (lambda w, x: x @ w, jnp.ones((3, rows))),
    (lambda w, x: x @ w.T, jnp.ones((3, columns))),
    (lambda w, x: x @ w.reshape(rows, 4, columns // 4).reshape(shape), jnp.ones((3, rows))),
    (lambda w, x: x[:, :0] @ w[:0], jnp.ones((3, rows))),
    (lambda w, i: w[i], jnp.zeros(0, int)),
    (lambda w, x: x @ w, jnp.ones((0, rows))),
  ]
  for f, x in uses:
    assert_close(adapt(f)(w, x), f(materialize(w), x))
  if name in ("float32", "nested", "gated", "dora", "factored"):
    for f, x in uses[:3]:
      adapt(f, strict=True)(w, x)


def test_a_reshape_of_an_empty_kernel_splits_and_joins_its_axes_in_factored_form():
  w = low_rank(jnp.zeros((0, 16)), "io")

  def f(w, x):
    return x[:, :0] @ w.reshape(0, 4, 4).reshape(0, 16)

  assert_close(adapt(f, strict=True)(w, normal(3, 12)), jnp.zeros((3, 16)))
