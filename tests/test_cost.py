"""Costs of small programs, counted by hand; those of whole training steps are in test_plan.py."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax
from lora_jax import cost
from lora_jax.models import llama


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def flops(f, *args):
  return cost.flops(jax.make_jaxpr(f)(*args))


def peak(f, *args, **options):
  return cost.peak_memory(jax.make_jaxpr(f)(*args), **options)


X, W = shape(3, 5), shape(5, 7)
PRODUCT = 2 * 3 * 5 * 7


def branches(x, w):
  return lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w.T @ w, lambda: x @ w)


@jax.custom_vjp
def with_a_rule(x, w):
  return x @ w


with_a_rule.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))


@pytest.mark.parametrize(
  ("f", "args", "expected"),
  [
    (lambda x, w: x @ w, (X, W), PRODUCT),
    (lambda x, w: jnp.tanh(x @ w) + 1, (X, W), PRODUCT),
    (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (shape(4, 3, 5), shape(4, 5, 7)), 4 * PRODUCT),
    (lambda x, w: jnp.einsum("ijk,jkl->il", x, w), (shape(3, 5, 2), shape(5, 2, 7)), 2 * PRODUCT),
    (jax.jit(lambda x, w: x @ w), (X, W), PRODUCT),
    (jax.checkpoint(lambda x, w: x @ w), (X, W), PRODUCT),
    (with_a_rule, (X, W), PRODUCT),
    (branches, (X, W), 3 * PRODUCT),
    (
      lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w),
      (shape(3, 5), shape(4, 5, 5)),
      4 * 2 * 3 * 5 * 5,
    ),
    (
      lambda x, w: lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ w, x),
      (shape(3, 5), shape(5, 5)),
      2 * 3 * 5 * 5,
    ),
    (
      lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "VALID"),
      (shape(2, 3, 8, 9), shape(7, 3, 4, 5)),
      2 * (2 * 7 * 5 * 5) * (3 * 4 * 5),
    ),
    (
      lambda x, k: lax.conv_general_dilated(x, k, (1,), "SAME", feature_group_count=4),
      (shape(2, 4, 9), shape(4, 1, 3)),
      2 * (2 * 4 * 9) * 3,
    ),
    (lax.ragged_dot, (shape(6, 5), shape(2, 5, 7), shape(2, dtype=jnp.int32)), 2 * PRODUCT),
  ],
)
def test_flops_are_two_for_each_multiply_and_add(f, args, expected):
  assert flops(f, *args) == expected


def test_the_forward_pass_of_a_model_is_the_rows_that_meet_each_matrix_and_attention():
  config = llama.LlamaConfig(
    vocab_size=61,
    width=24,
    mlp_width=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_length=64,
    scan_layers=True,
  )
  model, tokens = llama.Llama(config), shape(2, 9, dtype=jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

  def apply(params, tokens):
    return model.apply({"params": params}, tokens)

  axes = lora_jax.trace_axes(apply, params, tokens)
  leaves = lora_jax.tree.flatten(params)
  linear = sum(
    2 * axes[path].rows * leaf.size for path, leaf in leaves.items() if path.endswith("kernel")
  )
  attention = 2 * 2 * 3 * (2 * 6 * 9 * 9 * 4)  # scores and sums, in three layers
  assert flops(apply, params, tokens) == linear + attention


# ---- memory: a float32 array of N numbers is 4 N bytes

N = 1000
ROW = 4 * N
A, B = shape(N), shape(10, N)
SQUARE = shape(N, N)


def stacked(x):
  return lax.scan(lambda c, _: (c + 1, jnp.sin(c)), x, length=7)


def summed(xs):
  return lax.scan(lambda c, x: (c + x, None), jnp.zeros(N), xs)[0]


def through_layers(x, ws):
  return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]


@pytest.mark.parametrize(
  ("f", "args", "expected"),
  [
    # A chain of elementwise operations is one kernel, which writes its result.
    (lambda x: jnp.sin(x) * 2 + 1, (A,), ROW),
    # So is a reduction of it: the result is a single number.
    (lambda x: jnp.sum(jnp.sin(x) * 2), (A,), 4),
    # A product writes what it returns, and what is computed for it is written first.
    (lambda x, w: x @ w, (A, SQUARE), ROW),
    (lambda x, w: jnp.sin(x) @ w, (A, SQUARE), 2 * ROW),
    # The same memory in another shape.
    (lambda x: x.reshape(10, 100).T, (A,), 0),
    # What nothing reads any more makes room: of a chain of products two results are held.
    (lambda x, w: x @ w @ w @ w @ w, (A, SQUARE), 2 * ROW),
    # And what is computed from it elementwise takes its place.
    (lambda x, w: jnp.sin(x @ w) + 1, (A, SQUARE), ROW),
    # An expensive value that two read is written, a cheap one computed by each.
    (lambda x: (jnp.exp(x) + 1, jnp.exp(x) - 1), (A,), 2 * ROW),
    # A value that is never used costs nothing.
    (lambda x, w: (jnp.sum(x), x @ w)[0], (A, SQUARE), 4),
    # A loop has its stacked results whole, and its carry once.
    (stacked, (A,), 8 * ROW),
    (summed, (B,), ROW),
    # A slice of what it loops over is copied for a product, beside what the product returns.
    (through_layers, (A, shape(7, N, N)), ROW + ROW + N * ROW),
    (lambda x, w: jax.jit(lambda x: x @ w)(x), (A, SQUARE), ROW),
  ],
)
def test_the_peak_memory_is_that_of_the_values_that_are_written(f, args, expected):
  assert peak(f, *args) == expected


def test_a_branch_and_a_loop_need_the_memory_of_what_they_do():
  def outer(x):
    return jnp.outer(x, x) @ x

  assert peak(outer, A) == (N + 1) * ROW
  assert peak(lambda x: lax.cond(x[0] > 0, outer, jnp.sin, x), A) >= (N + 1) * ROW
  assert peak(lambda x: lax.fori_loop(0, 3, lambda _, x: outer(x), x), A) >= (N + 1) * ROW


def test_results_that_are_written_over_arguments_take_no_memory():
  assert peak(lambda x: x + 1, A, results_in_place=True) == 0
  assert peak(lambda x: x + 1, A) == ROW


def test_a_moment_that_is_written_over_while_parameters_are_made_of_it_is_copied():
  def momentum(w, m):
    return w - m, 0.9 * m

  compiled = jax.jit(momentum, donate_argnums=(0, 1)).lower(A, A).compile()
  reported = compiled.memory_analysis().temp_size_in_bytes
  assert peak(momentum, A, A, results_in_place=True) == ROW == reported
  assert peak(lambda w, g: w - g, A, A, results_in_place=True) == 0


def test_what_the_backward_pass_needs_is_held_from_the_forward_pass():
  def loss(x, w, layers):
    for _ in range(layers):
      x = jnp.sin(x @ w)
    return jnp.sum(x)

  def gradient(x, w, layers):
    return jax.grad(loss)(x, w, layers)

  few, many = (peak(lambda x, w, n=n: gradient(x, w, n), A, SQUARE) for n in (4, 12))
  assert many - few == 8 * ROW  # cos of each product


def test_exact_gelu_keeps_its_input_and_two_values_of_it():
  def loss(x, w, layers):
    for _ in range(layers):
      x = jax.nn.gelu(x @ w, approximate=False)
    return jnp.sum(x)

  def gradient(x, w, layers):
    return jax.grad(loss)(x, w, layers)

  few, many = (peak(lambda x, w, n=n: gradient(x, w, n), A, SQUARE) for n in (4, 12))
  assert many - few == 8 * 3 * ROW  # the product, erfc, and exp of its square


def test_a_sum_with_small_arrays_is_not_written_for_its_two_readers():
  def f(x, w):
    large = x @ w
    total = large
    for n in range(3):
      total = total + x[n] @ w
    return jnp.max(total), jnp.min(total), jnp.sum(large)

  # The large product, three small ones and the row that the last is made of, but not their sum.
  assert peak(f, B, SQUARE) == (10 + 3 + 1) * ROW


def test_a_policy_that_keeps_less_is_seen():
  def block(x, w):
    return checkpoint_name(jnp.sin(jnp.sin(jnp.sin(x @ w) @ w) @ w), "out")

  def peak_under(policy):
    def loss(x, w):
      def body(x, _):
        return jax.checkpoint(block, policy=policy)(x, w), None

      return jnp.sum(lax.scan(body, x, length=10)[0])

    return peak(jax.grad(loss), A, SQUARE)

  policies = jax.checkpoint_policies
  everything, nothing = map(peak_under, (policies.everything_saveable, policies.nothing_saveable))
  assert nothing < 0.6 * everything
