"""What does not train does not move: the README's loop, and trees whose parts are sealed."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import normal
from method_table import METHODS

import lora_jax
from lora_jax import LoRA, VeRA, adapt

PARAMS, X = {"w": normal(11, 13), "bias": normal(13)}, normal(3, 11)
KEY = jax.random.key(0)
UNTRAINED = {
  "LoRA-FA": {"a"}, "VeRA": {"a", "b"}, "DoRA": {"norm"}, "DoRA, the norm not constant": {"norm"},
  "PiSSA": {"a0", "b0"}, "PiSSA, randomised": {"a0", "b0"}, "OLoRA": {"a0", "b0"},
}  # fmt: skip
OPTIMIZERS = {
  "adam": optax.adam(1e-2),
  "adamw": optax.adamw(1e-2, weight_decay=0.1),
}
# What is made here is small, and most of the time is the compiler's.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def loss(adapters):
  y = adapt(lambda p, x: x @ p["w"] + p["bias"])(lora_jax.attach(PARAMS, adapters), X)
  return jnp.sum(jnp.sin(y))


def start(spec, key=KEY):
  return lora_jax.init(key, PARAMS, {"w": spec})


@pytest.mark.parametrize("name", METHODS)
def test_the_loop_of_the_readme_moves_all_that_trains_and_nothing_else(name):
  gradient = quick_jit(jax.grad(loss))
  for tx in OPTIMIZERS.values():
    adapters = before = start(METHODS[name].spec)
    state = tx.init(adapters)
    for _ in range(3):
      updates, state = tx.update(gradient(adapters), state, adapters)
      adapters = optax.apply_updates(adapters, updates)
    parts, after = before["w"].parts, adapters["w"].parts
    untrained = UNTRAINED.get(name, set())
    assert {n for n in parts if np.array_equal(parts[n], after[n])} == untrained
    # Nor is there anything for them in the optimizer's state, or in what it is made of.
    assert len(jax.tree.leaves(adapters)) == len(parts) - len(untrained)
    # As they are used, too.
    weights = [lora_jax.attach(PARAMS, each) for each in (before, adapters)]
    frozen = [lora_jax.partition(each, lora_jax.trainable_mask(each))[1] for each in weights]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *frozen)))
    assert loss(adapters) < loss(before)


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_does_not_train_has_no_gradient_where_it_is_a_leaf(name):
  spec = METHODS[name].spec
  adapters = jax.jit(lambda key, params: lora_jax.init(key, params, {"w": spec}))(KEY, PARAMS)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  assert set(UNTRAINED[name]) <= set(adapters["w"].parts) - set(adapters["w"].sealed)
  gradient = jax.grad(loss)(adapters)["w"]
  for part in adapters["w"].parts:
    assert np.any(getattr(gradient, part)) == (part not in UNTRAINED[name]), part


def test_a_whole_step_under_jit_carries_sealed_parts_and_compiles_once():
  tx = OPTIMIZERS["adamw"]
  traces = []

  @jax.jit
  def step(adapters, state):
    traces.append(1)
    updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
    return optax.apply_updates(adapters, updates), state

  before = start(LoRA(rank=2, alpha=1.0, train_a=False))
  adapters, state = step(before, tx.init(before))
  adapters, state = step(copy.deepcopy(adapters), state)
  assert len(traces) == 1
  np.testing.assert_array_equal(adapters["w"].a, before["w"].a)
  # Other values that do not train are another program, not this one with the wrong values.
  other = start(LoRA(rank=2, alpha=1.0, train_a=False), jax.random.key(1))
  after, _ = step(other, tx.init(other))
  assert len(traces) == 2
  np.testing.assert_array_equal(after["w"].a, other["w"].a)


def test_adapters_that_differ_in_sealed_parts_are_stacked_unsealed_or_not_at_all():
  spec = LoRA(rank=2, alpha=1.0, train_a=False)
  two = [start(spec, jax.random.key(n)) for n in range(2)]
  with pytest.raises(ValueError, match=r"a \(11, 2\) sealed.*lora_jax.unseal"):
    jax.tree.map(lambda *xs: jnp.stack(xs), *two)
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *map(lora_jax.unseal, two))
  losses = jax.vmap(loss)(jax.tree.map(lambda x: x + 0.1, stacked))
  assert not np.allclose(losses[0], losses[1])
  layers = lora_jax.Axes("sio", ("dot_general",))
  params = {"w": normal(4, 11, 13)}
  of_layers = lora_jax.init(KEY, params, {"w": spec}, axes={"w": layers})
  sliced = jax.tree.map(lambda x: x[0], of_layers)
  with pytest.raises(ValueError, match="sliced or stacked without a, which is sealed"):
    lora_jax.attach({"w": params["w"][0]}, sliced)


def test_detach_seals_and_unseal_reaches_every_adapter_of_a_tree():
  adapters = start(VeRA(rank=2))
  again = lora_jax.detach(lora_jax.attach(PARAMS, adapters), adapters)
  assert jax.tree.structure(again) == jax.tree.structure(adapters)
  state = optax.adam(0.1).init(adapters)
  count = len(jax.tree.leaves(state))
  assert len(jax.tree.leaves(lora_jax.unseal(state))) == count + 2 * len(UNTRAINED["VeRA"])
  assert jax.tree.structure(lora_jax.seal(lora_jax.unseal(state))) == jax.tree.structure(state)
