"""Haiku and Equinox models, untouched."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from jaxprs import full_size_values
from programs import normal
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
    "mlp/~/linear_0/w": "io", "mlp/~/linear_1/w": "io",
    **{f"multi_head_attention/{name}/w": "io" for name in ("key", "query", "value", "linear")},
  }  # fmt: skip
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
    "layers/0/weight": "oi", "layers/3/layers/0/weight": "oi", "layers/3/layers/1/weight": "oi",
  }  # fmt: skip
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
