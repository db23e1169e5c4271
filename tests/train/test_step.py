import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from peers import torch

from lora_jax.train.step import completion_loss, completion_objective, init_state, make_train_step
from lora_jax.tree import flatten, join, partition


def parts():
  weights = tiny_run.make_weights()
  return partition(weights, tiny_run.trainable_mask(weights))


def batches(count):
  endless = tiny_run.CountingBatches(1)
  return [next(endless) for _ in range(count)]


def copies(tree):
  return {path: np.array(leaf) for path, leaf in flatten(tree).items()}


def assert_same_bits(left, right):
  assert left.keys() == right.keys()
  for path in left:
    assert left[path].tobytes() == right[path].tobytes(), path


def test_the_completion_loss_is_pytorchs_cross_entropy_over_the_positions_that_count():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, 11)).astype(np.float32) * 5
  targets = rng.integers(0, 11, (3, 4))
  weights = rng.integers(0, 2, (3, 4)).astype(np.float32)
  loss, tokens = completion_loss(jnp.array(logits), targets, weights)
  peer = torch.nn.functional.cross_entropy(
    torch.tensor(logits[weights > 0]), torch.tensor(targets[weights > 0])
  )
  assert tokens == weights.sum()
  np.testing.assert_allclose(loss, peer.item(), rtol=1e-6)


def test_the_log_softmax_of_bfloat16_logits_is_taken_in_float32():
  logits = jnp.linspace(-3, 3, 1000).reshape(1, 1, 1000).astype(jnp.bfloat16)
  targets, weights = jnp.array([[7]]), jnp.ones((1, 1))
  loss, _ = completion_loss(logits, targets, weights)
  exact, _ = completion_loss(logits.astype(jnp.float32), targets, weights)
  assert loss.dtype == jnp.float32
  assert loss == exact


def test_a_batch_in_which_nothing_counts_has_loss_zero_and_no_gradient():
  logits = jnp.ones((2, 3, 5))
  targets, weights = jnp.zeros((2, 3), int), jnp.zeros((2, 3))
  (loss, tokens), grad = jax.value_and_grad(completion_loss, has_aux=True)(logits, targets, weights)
  assert (loss, tokens) == (0, 0)
  assert not np.any(grad)


def test_training_lowers_the_loss():
  state, frozen, train_step = tiny_run.make_run()
  (batch,) = batches(1)
  losses = []
  for _ in range(40):
    state, metrics = train_step(state, frozen, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.7 * losses[0]


def test_the_gradient_is_that_of_the_whole_weights_where_they_train_and_the_base_keeps_its_bits():
  trainable, frozen = parts()
  before = copies(frozen)
  objective = completion_objective(tiny_run.TinyModel().apply)
  (batch,) = batches(1)
  grads = jax.grad(lambda w: objective(w, batch)[0])(join(trainable, frozen))
  wanted = np.sqrt(
    sum(np.sum(np.square(g)) for path, g in flatten(grads).items() if path.startswith("hidden/"))
  )
  tx = tiny_run.make_optimizer()
  train_step = make_train_step(objective, tx)
  state, metrics = train_step(init_state(trainable, tx), frozen, batch)
  np.testing.assert_allclose(metrics["grad_norm"], wanted, rtol=1e-5)
  for batch in batches(5):
    state, _ = train_step(state, frozen, batch)
  assert_same_bits(copies(frozen), before)
  changed = copies(state.trainable)
  assert all(np.any(changed[path] != leaf) for path, leaf in copies(trainable).items())


def test_neither_the_state_nor_its_optimiser_holds_an_array_for_a_frozen_leaf():
  trainable, _ = parts()
  state = init_state(trainable, tiny_run.make_optimizer())
  paths = flatten(state)
  assert len([path for path in paths if "hidden/kernel" in path]) == 3  # itself and two moments
  assert not [path for path in paths if "embed" in path or "head" in path]
  elements = sum(leaf.size for leaf in jax.tree.leaves(trainable))
  counters = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * elements + len(counters)


def test_the_state_is_donated_but_the_arrays_it_was_made_of_live_on():
  trainable, frozen = parts()
  tx = tiny_run.make_optimizer()
  train_step = make_train_step(completion_objective(tiny_run.TinyModel().apply), tx)
  state = init_state(trainable, tx)
  (batch,) = batches(1)
  train_step(state, frozen, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trainable, frozen)))


def test_a_second_step_compiles_nothing():
  state, frozen, train_step = tiny_run.make_run()
  first, *rest = batches(4)
  state, _ = train_step(state, frozen, first)
  compiled = []

  def listen(event, seconds, **unused):
    if "compile" in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for batch in rest:
      state, _ = train_step(state, frozen, batch)
    assert compiled == []
    # The listener does hear a compilation.
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert compiled != []
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_no_weight_is_a_constant_of_the_program():
  state, frozen, train_step = tiny_run.make_run()
  (batch,) = batches(1)
  jaxpr = jax.make_jaxpr(train_step)(state, frozen, batch)
  assert sum(np.size(constant) for constant in jaxpr.consts) < tiny_run.WIDTH


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_says_so_and_returns_the_old_state(value):
  state, frozen, train_step = tiny_run.make_run()
  good, bad, other = batches(3)
  state, metrics = train_step(state, frozen, good)
  assert metrics["finite"]
  before = copies(state)
  bad["weights"][0, 0] = value
  state, metrics = train_step(state, frozen, bad)
  assert not metrics["finite"]
  assert_same_bits(copies(state), before)
  state, metrics = train_step(state, frozen, other)
  assert metrics["finite"]
  assert int(state.step) == 2
