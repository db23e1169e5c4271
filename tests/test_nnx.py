"""`lora_jax.nnx.split`: pure functions of modules that change state of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functions import normal
from tolerances import assert_close

import lora_jax
from lora_jax import adapt
from lora_jax.nnx import split, update

KEY = jax.random.key(0)
KINDS = {
  "statistics": lambda rngs: nnx.BatchNorm(11, rngs=rngs),
  "dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
  "recurrence": lambda rngs: nnx.RNN(nnx.GRUCell(11, 11, rngs=rngs)),
}
X = normal(2, 3, 11)


class Model(nnx.Module):
  """A layer before something that changes a state."""

  def __init__(self, kind: str = "statistics", seed: int = 0):
    rngs = nnx.Rngs(seed)
    self.linear = nnx.Linear(11, 11, rngs=rngs)
    self.stateful = KINDS[kind](rngs)

  def __call__(self, x):
    self.seen = nnx.Intermediate(x)  # made in the call, so it is no state
    return self.stateful(jnp.sin(self.linear(x)))


def numbers(tree):
  """The leaves as plain numbers, random keys too."""
  keys = (x for x in jax.tree.leaves(tree))
  return [
    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in keys
  ]


def assert_equal(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for x, y in zip(numbers(tree), numbers(other), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def held(module):
  """All that a module holds from one call to the next, as arrays."""
  return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Intermediate)))


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_are_the_same_and_the_module_never_changes(kind):
  module = Model(kind)
  before = held(module)
  f, params = split(module)
  y = f(params, X)
  np.testing.assert_array_equal(f(params, X), y)
  assert_equal(held(module), before)
  # What is done to the module afterwards does not reach f.
  assert_close(module(X), y, "float32")
  module.linear.kernel[...] = jnp.zeros((11, 11))
  np.testing.assert_array_equal(f(params, X), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_with_a_state_goes_through_jit_grad_and_vmap(kind):
  f, params = split(Model(kind))
  assert_close(jax.jit(f)(params, X), f(params, X), "float32")

  def loss(params):
    return jnp.sum(f(params, X) ** 2)

  gradient = jax.grad(loss)(params)
  assert jax.tree.structure(gradient) == jax.tree.structure(params)
  assert float(jnp.abs(gradient["linear"]["kernel"]).max()) > 0
  twice = jax.vmap(f, in_axes=(None, 0))(params, jnp.stack([X, X]))
  assert_close(twice[1], f(params, X), "float32")


@pytest.mark.parametrize("kind", ["statistics", "dropout"])
def test_a_module_with_a_state_is_adapted_and_its_axes_are_traced(kind):
  module = Model(kind)
  f, params = split(module)
  axes = lora_jax.trace_axes(f, params, X)
  assert axes["linear/kernel"].roles == "io"
  specs = lora_jax.match(params, [("linear/kernel", lora_jax.LoRA(rank=2, alpha=4.0))], axes)
  adapters = lora_jax.init(KEY, params, specs, axes)
  adapters = jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), adapters)
  weights, merged = lora_jax.attach(params, adapters), lora_jax.merge(params, adapters)
  strict = adapt(f, strict=True)
  assert_close(jax.jit(strict)(weights, X), f(merged, X), "float32")
  y, state = adapt(f.with_state, strict=True)(weights, f.state, X)
  expected, after = f.with_state(merged, f.state, X)
  assert_close(y, expected, "float32")
  assert_equal(state, after)
  assert not np.allclose(y, f(params, X))
  update(module, lora_jax.materialize(weights), state)
  assert_close(module(X), f.with_state(merged, after, X)[0], "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_the_state_of_the_one_before_are_those_of_the_module(kind):
  module, twin = Model(kind), Model(kind)
  f, params = split(module)
  state, run = f.state, jax.jit(f.with_state)
  for n in range(3):
    y, state = run(params, state, X + n)
    assert_close(y, twin(X + n), "float32")
  update(module, params, state)
  assert_equal(held(module), held(twin))


@pytest.mark.parametrize("kind", ["statistics", "dropout"])
def test_the_state_is_carried_by_a_scan(kind):
  f, params = split(Model(kind))
  xs = jnp.stack([X, X + 1, X + 2])

  def step(state, x):
    y, state = f.with_state(params, state, x)
    return state, y

  last, ys = jax.lax.scan(step, f.state, xs)
  state = f.state
  for x, y in zip(xs, ys, strict=True):
    expected, state = f.with_state(params, state, x)
    assert_close(y, expected, "float32")
  assert jax.tree.structure(last) == jax.tree.structure(state)
  # Each step drops other inputs, or has seen other batches.
  assert float(jnp.abs(ys[0] - ys[1]).max()) > 1e-3


def test_random_streams_among_the_arguments_are_copied():
  class Noisy(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(11, 11, rngs=nnx.Rngs(0))
      self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
      return self.dropout(self.linear(x), rngs=rngs)

  f, params = split(Noisy())
  rngs = nnx.Rngs(dropout=1)
  y = f(params, X, rngs=rngs)
  np.testing.assert_array_equal(f(params, X, rngs=rngs), y)
  assert int(rngs.dropout.count[...]) == 0
  jitted = jax.jit(functools.partial(f, rngs=rngs))
  assert_close(jitted(params, X), y, "float32")


def test_a_state_of_another_module_is_refused():
  f, params = split(Model("statistics"))
  with pytest.raises(ValueError):
    f.with_state(params, {"nothing": jnp.zeros(())}, X)
  with pytest.raises(ValueError):
    update(Model("dropout"), params, f.state)
