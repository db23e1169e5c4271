"""A base and arithmetic in bfloat16, adapters and all that trains them in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import equations

import lora_jax
from lora_jax.models import llama
from lora_jax.train.chunked_loss import chunked_completion_objective
from lora_jax.train.optimizer import adamw
from lora_jax.train.step import completion_objective, init_state, make_train_step

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ROWS, LENGTH = 4, 8


def make_batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 61, (ROWS, LENGTH)).astype(np.int32)
  at = np.tile(np.arange(3, LENGTH, dtype=np.int32), (ROWS, 1))
  return {
    "tokens": tokens,
    "at": at,
    "targets": rng.integers(0, 61, at.shape).astype(np.int32),
    "weights": np.ones(at.shape, np.float32),
  }


@functools.cache
def make_case(dtype=jnp.bfloat16):
  """(apply, trainable, frozen, tx) of a Llama whose base and arithmetic have a dtype."""
  config = llama.LlamaConfig(
    vocab_size=61,
    width=24,
    mlp_width=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_length=64,
    scan_layers=True,
    dtype=dtype,
    param_dtype=dtype,
  )
  model, tokens = llama.Llama(config), make_batch()["tokens"]
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  rules = [("all-linear", lora_jax.LoRA(rank=2, alpha=4.0)), (".*norm/scale", lora_jax.Full())]
  specs = lora_jax.match(params, rules, axes)
  weights = lora_jax.attach(params, lora_jax.init(jax.random.key(1), params, specs, axes))
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  tx = adamw(
    optax.constant_schedule(1e-2), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01, clip_norm=1.0
  )
  return lora_jax.adapt(model.apply), trainable, frozen, tx


def dtypes(tree):
  return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


OBJECTIVES = {
  "whole logits": completion_objective,
  "logits in chunks": functools.partial(chunked_completion_objective, chunk=2),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_on_a_bfloat16_base_trains_in_float32(objective, parts):
  apply, trainable, frozen, tx = make_case()
  train_step = make_train_step(OBJECTIVES[objective](apply), tx, parts=parts)
  state = jax.eval_shape(lambda: init_state(trainable, tx))
  after, metrics = jax.eval_shape(train_step, state, frozen, make_batch())
  assert dtypes(frozen) == {BFLOAT16}
  assert dtypes(state.trainable) == dtypes(state.opt_state) == {FLOAT32}
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
  assert dtypes(metrics) == {FLOAT32}


def test_the_gradient_that_the_optimiser_gets_is_float32():
  apply, trainable, frozen, _ = make_case()
  seen = []

  def update(grads, state, params):
    seen.append(dtypes(grads))
    return grads, state

  tx = optax.GradientTransformation(lambda params: (), update)
  train_step = make_train_step(completion_objective(apply), tx)
  jax.eval_shape(train_step, init_state(trainable, tx), frozen, make_batch())
  assert seen == [{FLOAT32}]


def test_every_product_with_the_base_is_one_of_bfloat16():
  apply, trainable, frozen, _ = make_case()
  objective = completion_objective(apply)

  def loss_of(trainable):
    return objective(lora_jax.join(trainable, frozen), make_batch())[0]

  kernels = {(24, 24), (24, 8), (24, 40), (40, 24), (24, 61), (61, 24)}
  operands = [
    v.aval
    for eqn in equations(jax.make_jaxpr(jax.grad(loss_of))(trainable))
    if eqn.primitive.name == "dot_general"
    for v in eqn.invars
  ]
  assert {x.dtype for x in operands if x.shape in kernels} == {BFLOAT16}


@pytest.mark.slow
def test_training_in_bfloat16_follows_float32_and_leaves_the_base_as_it_was():
  losses = {}
  for dtype in (jnp.bfloat16, jnp.float32):
    apply, trainable, frozen, tx = make_case(dtype)
    before = [np.array(leaf) for leaf in jax.tree.leaves(frozen)]
    state, train_step = init_state(trainable, tx), make_train_step(completion_objective(apply), tx)
    losses[dtype] = []
    for _ in range(5):
      state, metrics = train_step(state, frozen, make_batch())
      losses[dtype].append(float(metrics["loss"]))
    for leaf, kept in zip(jax.tree.leaves(frozen), before, strict=True):
      assert np.array(leaf).tobytes() == kept.tobytes()
  # A bfloat16 keeps 1 part in 256 of every activation and logit.
  np.testing.assert_allclose(losses[jnp.bfloat16], losses[jnp.float32], rtol=0.015)
  assert losses[jnp.bfloat16][-1] < 0.9 * losses[jnp.bfloat16][0]


def test_small_updates_are_not_lost_on_a_bfloat16_base():
  """What fails where adapters have the base's dtype: a step of 1e-4 beside a value of 1."""
  _, trainable, _, _ = make_case()
  trainable = jax.tree.map(jnp.ones_like, trainable)
  tx = optax.sgd(1e-4)
  state = init_state(trainable, tx)
  train_step = make_train_step(
    lambda weights, _: (sum(jnp.sum(x) for x in jax.tree.leaves(weights)), jnp.float32(1)), tx
  )
  for _ in range(3):
    state, _ = train_step(state, jax.tree.map(lambda _: None, trainable), {})
  moved = [float(jnp.max(leaf)) for leaf in jax.tree.leaves(state.trainable)]
  np.testing.assert_allclose(moved, 1 - 3e-4, rtol=1e-6)
