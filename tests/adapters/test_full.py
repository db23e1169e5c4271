"""Leaves trained in full, as specs: biases, norms, heads and whole kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from tolerances import assert_close

import lora_jax
from lora_jax import Full, LoRA, adapt, attach, init, join, match, partition, trainable_mask, tree
from lora_jax import weights as kinds

KEY = jax.random.key(0)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.gelu(nn.Dense(13, name="up")(nn.LayerNorm(name="ln_1")(x)))
    return x + nn.Dense(11, name="down")(nn.RMSNorm(name="post_norm")(h))


X = normal(3, 11)
PARAMS = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), Block().init(KEY, X)["params"])


def loss(params):
  return jnp.sum(jnp.sin(Block().apply({"params": params}, X)))


def attached(rules, params=PARAMS):
  return attach(params, init(KEY, params, match(params, rules)))


def gradient(weights, f=loss):
  """Of what trains, by the path of the leaf or of the part."""
  train, rest = partition(weights, trainable_mask(weights))
  return tree.flatten(
    jax.jit(jax.grad(lambda train: adapt(f, strict=True)(join(train, rest))))(train)
  )


def test_the_gradient_is_that_of_full_fine_tuning_leaf_by_leaf():
  ours = gradient(attached([(".*", Full())]))
  wanted = tree.flatten(jax.grad(loss)(PARAMS))
  assert set(ours) == {f"{path}/dw" for path in wanted}
  assert_close({path: ours[f"{path}/dw"] for path in wanted}, wanted)


def test_bias_alone_is_bitfit():
  assert set(gradient(attached([("bias", Full())]))) == {
    "up/bias/dw",
    "down/bias/dw",
    "ln_1/bias/dw",
  }


def test_norm_alone_is_layernorm_tuning():
  assert set(gradient(attached([("norm", Full())]))) == {
    "ln_1/scale/dw",
    "ln_1/bias/dw",
    "post_norm/scale/dw",
  }


def test_full_leaves_stand_beside_adapters_of_others():
  rules = [("norm", Full()), (r"down/bias", Full()), ("all-linear", LoRA(rank=2, alpha=4.0))]
  ours = gradient(attached(rules))
  assert {"ln_1/scale/dw", "down/bias/dw", "up/kernel/a", "down/kernel/b"} <= set(ours)
  wanted = tree.flatten(jax.grad(loss)(PARAMS))
  assert_close(ours["down/bias/dw"], wanted["down/bias"])


@pytest.mark.parametrize(
  ("path", "preset"),
  [
    ("decoder/layer_norm/offset", "norm"),
    ("transformer/h/0/ln_2/bias", "norm"),
    ("ln_f/scale", "norm"),
    ("model/layers/0/input_layernorm/weight", "norm"),
    ("encoderblock_0/LayerNorm_1/scale", "norm"),
    ("stem/bn1/gamma", "norm"),
    ("bn_init/scale", "norm"),
    ("attn/q_norm/scale", "norm"),
    ("attn/query/bias", "bias"),
    ("mlp/linear/b", "bias"),
    ("attn/in_proj_bias", "bias"),
  ],
)
def test_the_presets_know_the_names_that_models_give(path, preset):
  others = {"prenorm/dense/kernel": normal(4, 4), "normal/w": normal(4), "kernel_b/w": normal(4)}
  params = {path: normal(4), **others, f"counts/{path}": jnp.arange(4)}
  assert list(match(params, [(preset, Full())])) == [path]


def test_a_preset_that_finds_nothing_says_so():
  with pytest.raises(ValueError, match="the preset 'bias' matches no leaf of these parameters"):
    match({"up/kernel": normal(3, 4)}, [("bias", Full())])


@pytest.mark.parametrize(
  ("leaf", "words"),
  [(jnp.arange(3), "its dtype int32 is not a float"), (jax.nn.relu, "it is .* and not an array")],
)
def test_a_leaf_of_anything_but_floats_is_refused(leaf, words):
  with pytest.raises(ValueError, match=f"matches x, which cannot be adapted: {words}"):
    match({"x": leaf}, [("x", Full())])


def test_a_scalar_trains_too():
  params = {"logit_scale": jnp.float32(2.0)}
  assert gradient(attached([(".*", Full())], params), lambda p: p["logit_scale"] ** 3) == {
    "logit_scale/dw": 12.0
  }


def test_layers_that_are_scanned_train_each_by_itself():
  params = {"w": normal(4, 11, 11), "bias": normal(4, 11)}

  def f(p):
    return jnp.sum(lax.scan(lambda x, q: (jnp.sin(x @ q["w"] + q["bias"]), None), X, p)[0])

  assert_close(
    gradient(attached([(".*", Full())], params), f),
    {f"{path}/dw": g for path, g in jax.grad(f)(params).items()},
  )


def test_an_update_smaller_than_the_base_can_hold_is_not_lost():
  params = {"scale": jnp.ones(3, jnp.bfloat16)}
  small = jax.tree.map(lambda x: x + 2.0**-10, init(KEY, params, {"scale": Full()}))
  assert small["scale"].dw.dtype == jnp.float32
  assert attach(params, small)["scale"].materialize().dtype == jnp.bfloat16
  four = jax.tree.map(lambda x: 8 * x, small)
  np.testing.assert_array_equal(attach(params, four)["scale"].materialize(), jnp.ones(3) + 2.0**-7)


def test_low_rank_on_a_leaf_that_trained_in_full_is_factored_still():
  weights = attached([("up/kernel", Full())])
  weights = jax.tree.map(lambda x: x + 0.1, weights)
  outer = init(KEY, weights, match(weights, [("up/kernel", LoRA(rank=2, alpha=2.0))]))
  nested = jax.tree.map(lambda x: x + 0.1, attach(weights, outer))
  assert isinstance(nested["up"]["kernel"].w, kinds.Full)
  assert_close(adapt(loss, strict=True)(nested), loss(lora_jax.materialize(nested)))


def test_an_adapter_of_another_shape_is_refused():
  adapters = init(KEY, PARAMS, {"up/bias": Full()})
  with pytest.raises(ValueError, match=r"up/bias: .*\(13,\).* do not fit \(12,\)"):
    attach({"up": {"bias": jnp.zeros(12)}}, adapters)
