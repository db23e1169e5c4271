"""Haiku and Equinox models, untouched."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from functions import normal
from jaxprs import full_size_values
from tolerances import assert_close

import lora_jax

KEY = jax.random.key(0)
SPEC = lora_jax.LoRA(rank=2, alpha=4.0)


def attention_and_mlp(x):
  x = x + hk.MultiHeadAttention(2, 7, w_init=hk.initializers.RandomNormal(), model_size=11)(x, x, x)
  return hk.nets.MLP([13, 11])(x)


def haiku_model():
  transformed = hk.without_apply_rng(hk.transform(attention_and_mlp))
  x = normal(2, 4, 11)
  expected = {
    "mlp/~/linear_0/w": "io",
    "mlp/~/linear_1/w": "io",
    **{f"multi_head_attention/{name}/w": "io" for name in ("key", "query", "value", "linear")},
  }
  return transformed.apply, transformed.init(KEY, x), x, expected


def equinox_model():
  model = eqx.nn.Sequential(
    [
      eqx.nn.Linear(11, 13, key=KEY),
      eqx.nn.Lambda(jax.nn.gelu),
      eqx.nn.LayerNorm(13),
      eqx.nn.MLP(13, 11, 17, 1, key=KEY),
    ]
  )
  params, static = eqx.partition(model, eqx.is_array)

  def f(params, x):
    return jax.vmap(eqx.combine(params, static))(x)

  expected = {
    "layers/0/weight": "oi",
    "layers/3/layers/0/weight": "oi",
    "layers/3/layers/1/weight": "oi",
  }
  return f, params, normal(3, 11), expected


@pytest.mark.parametrize("make", [haiku_model, equinox_model])
def test_all_linear_adapts_every_layer_of_the_model_untouched(make):
  f, params, x, expected = make()
  axes = lora_jax.trace_axes(f, params, x)
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
  assert {path: axes[path].roles for path in specs} == expected
  assert lora_jax.match(params, [("all-linear", SPEC)]).keys() == specs.keys()  # by names, too
  adapters = lora_jax.init(KEY, params, specs, axes)
  fresh = lora_jax.attach(params, adapters)
  apply = lora_jax.adapt(f, strict=True)
  assert_close(apply(fresh, x), f(params, x), "float32")

  adapters = jax.tree.map(lambda leaf: leaf + 0.3 * normal(*leaf.shape), adapters)
  weights = lora_jax.attach(params, adapters)
  assert_close(apply(weights, x), f(lora_jax.materialize(weights), x), "float32")
  assert float(jnp.abs(apply(weights, x) - f(params, x)).max()) > 1e-2

  def loss(adapters, f):
    return jnp.sum(jnp.sin(f(lora_jax.attach(params, adapters), x)))

  def oracle(weights, x):
    return f(lora_jax.materialize(weights), x)

  assert_close(jax.grad(loss)(adapters, apply), jax.grad(loss)(adapters, oracle), "float32")
  matrices = {(11, 13), (13, 11)}
  assert full_size_values(apply, (weights, x), matrices) <= full_size_values(
    f, (params, x), matrices
  )


@pytest.mark.parametrize(("cell", "kernels"), [(hk.LSTM, 1), (hk.GRU, 2), (hk.VanillaRNN, 2)])
def test_all_linear_takes_every_kernel_of_a_recurrent_haiku_network(cell, kernels):
  def network(x):
    core = cell(7)
    return hk.dynamic_unroll(core, x, core.initial_state(3))[0]

  transformed, x = hk.without_apply_rng(hk.transform(network)), normal(4, 3, 11)
  params = jax.eval_shape(transformed.init, KEY, x)
  axes = lora_jax.trace_axes(transformed.apply, params, x)
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
  assert len(specs) == kernels and {axes[path].roles for path in specs} == {"io"}
  assert specs == lora_jax.match(params, [("all-linear", SPEC)])


@pytest.mark.parametrize("cell", [eqx.nn.LSTMCell, eqx.nn.GRUCell])
def test_all_linear_takes_every_kernel_of_a_recurrent_equinox_cell(cell):
  params, static = eqx.partition(cell(11, 7, key=KEY), eqx.is_array)
  state = jnp.ones(7)

  def f(params, x):
    carry = (state, state) if cell is eqx.nn.LSTMCell else state
    return eqx.combine(params, static)(x, carry)

  axes = lora_jax.trace_axes(f, params, normal(11))
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
  assert {path: axes[path].roles for path in specs} == {"weight_hh": "oi", "weight_ih": "oi"}
  assert specs == lora_jax.match(params, [("all-linear", SPEC)])


def test_an_equinox_embedding_that_is_tied_to_the_head_has_roles():
  embed = eqx.nn.Embedding(17, 12, key=KEY)

  def f(embed, ids):
    return jnp.sin(jax.vmap(embed)(ids)) @ embed.weight.T

  axes = lora_jax.trace_axes(f, embed, jnp.arange(5))
  assert axes["weight"] == lora_jax.Axes("io", ("gather", "dot_general"), 10)
  adapters = lora_jax.init(KEY, embed, {"weight": SPEC}, axes)
  weights = lora_jax.attach(embed, jax.tree.map(lambda leaf: leaf + 0.3, adapters))
  y = lora_jax.adapt(f)(weights, jnp.arange(5))
  assert_close(y, f(lora_jax.materialize(weights), jnp.arange(5)), "float32")
