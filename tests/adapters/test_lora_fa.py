"""LoRA-FA: A is never trained, and what only its gradient needs is neither computed nor kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import normal
from jaxprs import equations

from lora_jax import LoRA, adapt, attach, init, join, partition, trainable_mask, tree

N, D, K, R = 7, 11, 13, 2
PARAMS, X = {"w": normal(D, K)}, normal(N, D)


def parts(train_a):
  spec = LoRA(rank=R, alpha=3.0, train_a=train_a)
  weights = attach(PARAMS, init(jax.random.key(0), PARAMS, {"w": spec}))
  return partition(weights, trainable_mask(weights))


def layer(train, frozen, x):
  return adapt(lambda p, x: x @ p["w"], strict=True)(join(train, frozen), x)


def test_b_alone_trains_and_a_keeps_its_bits():
  train, frozen = parts(train_a=False)
  assert list(tree.flatten(train)) == ["w/b"]
  before = np.array(frozen["w"].a)
  tx = optax.adam(0.1)
  state = tx.init(train)
  assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim) == [(R, K), (R, K)]
  for _ in range(3):
    gradient = jax.grad(lambda train: jnp.sum(jnp.sin(layer(train, frozen, X))))(train)
    updates, state = tx.update(gradient, state)
    train = optax.apply_updates(train, updates)
  assert np.any(train["w"].b)
  np.testing.assert_array_equal(join(train, frozen)["w"].a, before)


@pytest.mark.parametrize("train_a", [True, False])
def test_the_product_of_a_s_gradient_is_computed_only_where_a_trains(train_a):
  train, frozen = parts(train_a)

  def loss(train):
    return jnp.sum(jnp.sin(layer(train, frozen, X)))

  products = [
    eqn.outvars[0].aval.shape
    for eqn in equations(jax.make_jaxpr(jax.grad(loss))(train))
    if eqn.primitive.name == "dot_general"
  ]
  assert ((R, D) in products) == train_a
  assert ((R, K) in products) or ((K, R) in products)


@pytest.mark.parametrize("train_a", [True, False])
def test_the_layer_s_input_is_kept_for_the_backward_pass_only_where_a_trains(train_a):
  train, frozen = parts(train_a)

  # The input itself is an argument; a function of it must be kept if it is needed.
  def f(train, x):
    return layer(train, frozen, jnp.sin(x))

  _, pullback = jax.vjp(lambda train: f(train, X), train)
  kept = [x.shape for x in jax.tree.leaves(pullback) if hasattr(x, "shape")]
  assert ((N, D) in kept) == train_a
  assert (N, R) in kept
