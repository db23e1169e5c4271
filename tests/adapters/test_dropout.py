"""Dropout of a LoRA's inputs, seen through factors that are identities.

With W = 0 and a = b = 1 a layer returns what is left of its input, so the mask itself is seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from jaxprs import primitives
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA, LowRank, adapt, attach, init, with_dropout

KEY, D, RATE = jax.random.key(3), 16, 0.25


def convolve(w, x):
  return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def scanned(w, x):
  """What every layer of a stack makes of the same input."""
  return lax.scan(lambda _, w: (None, x @ w), None, w)[1]


# (function, shape of the weight, roles, shape of the input)
LAYERS = {
  "matrix": (lambda w, x: x @ w, (D, D), "io", (2, 15, D)),
  "transposed": (lambda w, x: x @ w.T, (D, D), "io", (30, D)),
  "convolution": (convolve, (1, D, D), "iio", (2, 15, D)),
  "grouped experts": (
    lambda w, x: lax.ragged_dot(x, w, jnp.array([14, 0, 16], jnp.int32)),
    (3, D, D),
    "io",
    (30, D),
  ),
  "batched experts": (lambda w, x: jnp.einsum("end,edk->enk", x, w), (3, D, D), "io", (3, 10, D)),
  "scanned layers": (scanned, (3, D, D), "io", (10, D)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def see_through(shape, roles):
  a = jnp.broadcast_to(jnp.eye(D), shape)
  b = a.reshape(*shape[: len(shape) - len(roles)], D, D)
  return LowRank(jnp.zeros(shape), a, b, dropout=RATE, roles=roles)


def left_of(layer, key, path="w"):
  """What a layer leaves of an input of ones."""
  f, shape, roles, x_shape = layer
  weights = with_dropout({path: see_through(shape, roles)}, key)
  return np.asarray(adapt(f, strict=True)(weights[path], jnp.ones(x_shape)))


@every_layer
def test_inputs_are_dropped_by_their_share_and_the_rest_made_larger_for_it(layer):
  left = left_of(layer, KEY)
  np.testing.assert_allclose(left[left != 0], 1 / (1 - RATE), rtol=1e-6)
  # The standard deviation of the share is below 0.02 for 480 inputs.
  assert abs(np.mean(left == 0) - RATE) < 0.08


@every_layer
def test_the_same_key_drops_the_same_inputs_and_another_key_or_path_others(layer):
  left = left_of(layer, KEY)
  np.testing.assert_array_equal(left, left_of(layer, KEY))
  assert np.mean(left != left_of(layer, jax.random.key(4))) > RATE
  assert np.mean(left != left_of(layer, KEY, path="v")) > RATE


@pytest.mark.parametrize("name", ["batched experts", "scanned layers"])
def test_every_layer_of_a_stack_drops_inputs_of_its_own(name):
  first, second, third = left_of(LAYERS[name], KEY)
  assert min(np.mean(first != second), np.mean(second != third), np.mean(first != third)) > RATE


@every_layer
def test_without_a_key_nothing_is_dropped(layer):
  f, shape, roles, x_shape = layer
  weight, x = see_through(shape, roles), normal(*x_shape)
  undropped = dataclasses.replace(weight, dropout=0.0)
  np.testing.assert_array_equal(adapt(f)(weight, x), adapt(f)(undropped, x))


def adapted(rate, shape=(D, 5), roles="io"):
  params = {"w": normal(*shape)}
  axes = {"w": lora_jax.Axes(roles, ("dot_general",))}
  adapters = init(KEY, params, {"w": LoRA(rank=2, alpha=3.0, dropout=rate)}, axes)
  moved = jax.tree.map(lambda x: x + normal(*x.shape), adapters)
  return attach(params, moved)


def test_on_average_the_product_is_the_undropped_one():
  weights, x = adapted(RATE), normal(4, D)
  expected = x @ weights["w"].materialize()

  def dropped(key):
    return adapt(lambda p, x: x @ p["w"])(with_dropout(weights, key), x)

  y = jax.jit(jax.vmap(dropped))(jax.random.split(KEY, 4000))
  error = y.std(axis=0) / 4000**0.5
  assert y.std(axis=0).min() > 0.05
  assert np.max(np.abs(y.mean(axis=0) - expected) / error) < 4.5


def test_the_base_s_own_product_sees_every_input():
  weights, x = adapted(0.9), normal(4, D)
  flat = dataclasses.replace(weights["w"], b=jnp.zeros_like(weights["w"].b))
  y = adapt(lambda w, x: x @ w)(flat.with_dropout(KEY), x)
  np.testing.assert_array_equal(y, x @ flat.w)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_the_gradient_is_that_of_the_formula_with_the_same_inputs_dropped(wrap):
  weights, x = adapted(RATE), normal(4, D)
  w = with_dropout(weights, KEY)["w"]
  mask = jnp.asarray(left_of((lambda w, x: x @ w, (D, D), "io", (4, D)), KEY))

  def ours(a, b, x):
    return jnp.sum(jnp.sin(wrap(adapt(lambda w, x: x @ w))(dataclasses.replace(w, a=a, b=b), x)))

  def formula(a, b, x):
    return jnp.sum(jnp.sin(x @ w.w + w.scale * (mask * x) @ a @ b))

  gradients = jax.grad(ours, (0, 1, 2))(w.a, w.b, x)
  assert_close(gradients, jax.grad(formula, (0, 1, 2))(w.a, w.b, x))


def test_rows_that_are_looked_up_have_no_input_to_drop():
  weights = adapted(0.9, shape=(7, D))
  look_up = adapt(lambda p: p["w"][jnp.arange(5)], strict=True)
  assert_close(look_up(with_dropout(weights, KEY)), look_up(weights))


def test_the_array_that_it_stands_for_is_the_undropped_one():
  weights = adapted(0.9)
  assert_close(lora_jax.materialize(with_dropout(weights, KEY)), lora_jax.materialize(weights))


def test_a_rate_of_zero_traces_nothing():
  weights, x = adapted(0.0), normal(4, D)

  def f(weights, x, key):
    return adapt(lambda p, x: x @ p["w"])(with_dropout(weights, key), x)

  assert not [p for p in primitives(f, weights, x, KEY) if p.startswith("random")]
  assert [p for p in primitives(f, adapted(0.1), x, KEY) if p.startswith("random")]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_share_is_refused(rate):
  with pytest.raises(ValueError, match=rf"dropout {rate} is not in \[0, 1\)"):
    LoRA(rank=2, alpha=1.0, dropout=rate)
