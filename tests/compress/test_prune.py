"""Pruning: which numbers go, that they stay gone, and what is used instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from programs import PROGRAMS
from tolerances import assert_close

import lora_jax
from lora_jax import adapt, materialize, tree
from lora_jax.compress import pruning
from lora_jax.weights import Pruned
from lora_jax.weights.probe import Moments

W = {"kernel": normal(8, 6)}


def mask_of(w, pattern, score=pruning.magnitude, **options):
  return np.asarray(pruning.prune({"w": w}, ["w"], score, pattern, **options)["w"].mask)


def test_by_magnitude_the_smallest_numbers_of_every_output_go():
  w = np.asarray(normal(8, 6))
  mask = mask_of(jnp.asarray(w), pruning.share(0.25))
  for column, kept in zip(w.T, mask.T, strict=True):
    assert set(np.flatnonzero(~kept)) == set(np.argsort(np.abs(column))[:2])


def test_wanda_weighs_a_number_by_the_norm_of_its_input():
  w = np.ones((4, 1), np.float32)
  inputs = np.array([[3.0, 1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
  whole = Moments(jnp.asarray(inputs.T @ inputs), jnp.float32(2))
  diagonal = Moments(jnp.asarray((inputs**2).sum(0)), jnp.float32(2))
  for moments in (whole, diagonal):
    mask = mask_of(jnp.asarray(w), pruning.share(0.5), pruning.wanda({"w": moments}))
    np.testing.assert_array_equal(mask[:, 0], [True, False, True, False])


def test_two_of_every_four_inputs_stay_for_every_output():
  w = np.asarray(normal(8, 6))
  mask = mask_of(jnp.asarray(w), pruning.n_of_m(2, 4))
  assert (mask.reshape(2, 4, 6).sum(1) == 2).all()
  kept = np.sort(np.abs(np.where(mask, w, 0)).reshape(2, 4, 6), axis=1)[:, 2:]
  np.testing.assert_array_equal(kept, np.sort(np.abs(w).reshape(2, 4, 6), axis=1)[:, 2:])


def test_the_inputs_and_outputs_of_a_stack_are_where_the_function_has_them():
  w = normal(3, 2, 4, 5)  # layers, heads and their features, outputs
  axes = {"w": lora_jax.Axes("siio", ("dot_general",))}
  mask = mask_of(w, pruning.share(0.5), axes=axes)
  assert (mask.sum((1, 2)) == 4).all()
  layer = mask_of(w[1].reshape(8, 5), pruning.share(0.5))
  np.testing.assert_array_equal(mask[1].reshape(8, 5), layer)


@pytest.mark.parametrize("name", ["jit", "scan over layers", "one of a stack, traced"])
def test_a_function_of_pruned_leaves_is_that_of_their_arrays(name):
  program = PROGRAMS[name]
  params = tree.map_with_path(
    lambda path, x: Pruned.of(x, jnp.abs(x) > 0.1, path) if path in program.roles else x,
    program.params,
  )
  adapted = adapt(program.f, strict=True)
  assert_close(adapted(params, program.x), program.f(materialize(params), program.x))


@pytest.mark.parametrize(
  "method", [lora_jax.LoRA(rank=2, alpha=2.0), lora_jax.PiSSA(rank=2, alpha=2.0)]
)
def test_what_is_trained_beside_a_pruned_kernel_keeps_its_zeros_when_merged(method):
  params = pruning.prune(W, ["kernel"], pruning.magnitude, pruning.n_of_m(2, 4))
  adapters = lora_jax.init(jax.random.key(0), params, {"kernel": method})
  x, y = normal(5, 8), normal(5, 6)
  apply = adapt(lambda p, x: x @ p["kernel"])

  def loss(adapters):
    return jnp.mean((apply(lora_jax.attach(params, adapters), x) - y) ** 2)

  weights = lora_jax.attach(params, adapters)
  assert_close(lora_jax.detach(weights, adapters), adapters)
  trains, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  gradient = jax.grad(lambda t: jnp.mean((apply(lora_jax.join(t, frozen), x) - y) ** 2))(trains)
  moved = jax.tree.map(lambda p, g: p - 0.3 * g, trains, gradient)
  for _ in range(3):
    gradient = jax.grad(lambda t: jnp.mean((apply(lora_jax.join(t, frozen), x) - y) ** 2))(moved)
    moved = jax.tree.map(lambda p, g: p - 0.3 * g, moved, gradient)
  healed = lora_jax.detach(lora_jax.join(moved, frozen), adapters)
  merged = lora_jax.merge(params, healed)["kernel"]
  assert loss(healed) < loss(adapters)
  assert not np.asarray(merged)[~np.asarray(params["kernel"].mask)].any()
  assert (np.asarray(merged) != np.asarray(params["kernel"].w)).any()
  np.testing.assert_allclose(
    apply(lora_jax.attach(params, healed), x), x @ merged, rtol=1e-5, atol=1e-6
  )


def test_dropout_is_refused_where_an_adapter_is_inside_a_mask():
  params = pruning.prune(W, ["kernel"], pruning.magnitude, pruning.share(0.5))
  spec = lora_jax.LoRA(rank=2, alpha=2.0, dropout=0.5)
  with pytest.raises(ValueError, match=r"kernel: is pruned, .* set its dropout to 0"):
    lora_jax.attach(params, lora_jax.init(jax.random.key(0), params, {"kernel": spec}))


def test_sparsity_is_the_share_of_zeros():
  assert pruning.sparsity(W) == 0
  params = pruning.prune(W, ["kernel"], pruning.magnitude, pruning.n_of_m(1, 4))
  assert pruning.sparsity(params) == 0.75


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: pruning.share(0.0), "must be above 0"),
    (lambda: pruning.n_of_m(4, 4), "is no pattern"),
    (lambda: mask_of(normal(6, 8), pruning.n_of_m(2, 4)), "w: has 6 inputs, .* no multiple of 4"),
    (lambda: mask_of(normal(8, 6), pruning.share(0.5), pruning.wanda({})), "w: has no moments"),
    (lambda: mask_of(normal(8, 6).at[0, 0].set(jnp.nan), pruning.share(0.5)), "holds NaN"),
    (
      lambda: pruning.prune(
        pruning.prune(W, ["kernel"], pruning.magnitude, pruning.share(0.5)),
        ["kernel"],
        pruning.magnitude,
        pruning.share(0.5),
      ),
      "is compressed already",
    ),
  ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_of_few_inputs_one_stays_whatever_the_share_is():
  mask = mask_of(normal(2, 6), pruning.share(0.9))
  np.testing.assert_array_equal(mask.sum(0), 1)
