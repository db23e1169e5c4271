"""An MLP of experts: what each token gets, that no other token matters, and adapters of stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import full_size_values

import lora_jax
from lora_jax import compat
from lora_jax.models import experts, layers, llama

CONFIG = experts.ExpertConfig(num_experts=5, per_token=2, width=9)
BATCH, LENGTH, WIDTH = 2, 7, 11


def layer(config=CONFIG):
  """(module, parameters, inputs): each leaf random."""
  module = experts.Experts(config)
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD)["params"]
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
  return module, params, x_BTD


def one_by_one(config, params, x_BTD):
  """Each token by each of its experts in turn, in numpy."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  router, stacks = params["router"], params["experts"]
  out_BTD = np.zeros(x_BTD.shape)
  for place in np.ndindex(x_BTD.shape[:2]):
    x = np.asarray(x_BTD[place], np.float64)
    logits = x @ router["kernel"] + router.get("bias", 0)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    chosen = np.argsort(-shares)[: config.per_token]
    total = shares[chosen].sum() if config.normalized else 1.0
    for n in chosen:
      both = x @ stacks["gate_up"]["kernel"][n] + stacks["gate_up"].get("bias", np.zeros(99))[n]
      if config.clamped:
        gate, up = np.minimum(both[::2], 7), np.clip(both[1::2], -7, 7)
        hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
      else:
        gate, up = np.split(both, 2)
        hidden = up * gate / (1 + np.exp(-gate))
      out = hidden @ stacks["down"]["kernel"][n] + stacks["down"].get("bias", np.zeros(99))[n]
      out_BTD[place] += shares[n] / total * out
  return out_BTD


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"normalized": False},
    {"per_token": 5},
    {"per_token": 1},
    {"clamped": True, "biases": True},
  ],
)
def test_a_token_gets_the_weighted_sum_of_its_own_experts(changes):
  config = experts.ExpertConfig(**{"num_experts": 5, "per_token": 2, "width": 9} | changes)
  module, params, x_BTD = layer(config)
  got = jax.jit(module.apply)({"params": params}, x_BTD)
  expected = one_by_one(config, params, x_BTD)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert np.std(expected) > 1


def test_no_token_gets_anything_of_another_one():
  module, params, x_BTD = layer()

  def at(x_BTD):
    return jnp.sum(module.apply({"params": params}, x_BTD)[1, 3] ** 2)

  moved = np.any(np.asarray(jax.jit(jax.grad(at))(x_BTD)) != 0, axis=-1)
  assert np.argwhere(moved).tolist() == [[1, 3]]


def test_tokens_that_all_choose_the_same_expert_are_all_computed():
  module, params, x_BTD = layer(experts.ExpertConfig(num_experts=5, per_token=1, width=9))
  params["router"]["kernel"] = jnp.zeros_like(params["router"]["kernel"]).at[0, 3].set(50.0)
  x_BTD = x_BTD.at[..., 0].set(1.0)
  kernel_DE, kernel_ED = (params["experts"][name]["kernel"][3] for name in ("gate_up", "down"))
  gate, up = jnp.split(x_BTD @ kernel_DE, 2, axis=-1)
  expected = (jax.nn.silu(gate) * up) @ kernel_ED
  got = module.apply({"params": params}, x_BTD)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_stacks_are_applied_in_factors_and_the_same_as_merged():
  module, params, x_BTD = layer()
  axes = lora_jax.trace_axes(lambda p, x: module.apply({"params": p}, x), params, x_BTD)
  assert {path: x.roles for path, x in axes.items()} == {
    "experts/down/kernel": "sio",
    "experts/gate_up/kernel": "sio",
    "router/kernel": "io",
  }
  specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=3, alpha=6.0))], axes)
  assert list(specs) == ["experts/down/kernel", "experts/gate_up/kernel"]
  adapters = lora_jax.init(jax.random.key(1), params, specs, axes)
  assert adapters["experts/gate_up/kernel"].a.shape == (5, WIDTH, 3)
  adapters = jax.tree.map(lambda x: x + 0.3, adapters)
  apply = lora_jax.adapt(module.apply, strict=True)

  def output(adapters):
    return apply({"params": lora_jax.attach(params, adapters)}, x_BTD)

  merged = lora_jax.merge(params, adapters)
  np.testing.assert_allclose(
    jax.jit(output)(adapters), module.apply({"params": merged}, x_BTD), rtol=1e-4, atol=1e-4
  )
  gradient = jax.grad(lambda adapters: jnp.sum(output(adapters) ** 2))
  assert all(np.any(x != 0) for x in jax.tree.leaves(jax.jit(gradient)(adapters)))
  # No value of the base's size is formed, except where the bare gradient forms it too: JAX 0.8
  # transposes a kernel that it multiplies by, and later versions do not.
  matrices = {(5, WIDTH, 18), (5, 9, WIDTH)}
  bare = jax.grad(lambda x: jnp.sum(module.apply({"params": params}, x) ** 2))
  formed = full_size_values(bare, (x_BTD,), matrices)
  assert formed == (2 if compat.VERSION.startswith("0.8.") else 0)
  assert full_size_values(output, (adapters,), matrices) == 0
  assert full_size_values(gradient, (adapters,), matrices) <= formed


def test_scanned_layers_of_experts_are_those_apart_and_decode_with_a_cache():
  config = llama.LlamaConfig(
    vocab_size=31,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=32,
    experts=CONFIG,
  )
  scanned = llama.LlamaConfig(**vars(config) | {"scan_layers": True})
  tokens_BT = jnp.arange(12).reshape(2, 6)
  params = llama.Llama(config).init(jax.random.key(0), tokens_BT)["params"]
  expected = jax.jit(llama.Llama(config).apply)({"params": params}, tokens_BT)
  stacked = layers.stack_layers(params)
  apply = jax.jit(llama.Llama(scanned).apply)
  np.testing.assert_allclose(apply({"params": stacked}, tokens_BT), expected, atol=1e-5)
  cache = llama.init_cache(scanned, 2, 8)
  cached, _ = apply({"params": stacked}, tokens_BT, cache=cache)
  np.testing.assert_allclose(cached, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_experts": 0}, "num_experts must be a positive integer, not 0"),
    ({"num_experts": 1 << 15}, "num_experts 32768 is over the limit of 16,384"),
    ({"per_token": 6}, "per_token 6 is more than the 5 experts"),
    ({"per_token": True}, "per_token must be a positive integer, not True"),
    ({"width": "9"}, "width must be a positive integer, not '9'"),
    ({"normalized": 1}, "normalized must be True or False, not 1"),
  ],
)
def test_experts_that_no_model_has_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    experts.ExpertConfig(**{"num_experts": 5, "per_token": 2, "width": 9} | changes)


@pytest.mark.parametrize("changes", [{"experts": 8}, {"activation": "gelu_tanh"}])
def test_a_decoder_has_experts_with_silu_or_none(changes):
  fields = {
    "vocab_size": 31, "width": 16, "mlp_width": 24, "num_layers": 2, "num_heads": 2,
    "num_kv_heads": 1, "head_dim": 8, "max_length": 32, "experts": CONFIG,
  }  # fmt: skip
  with pytest.raises(ValueError, match="must be an ExpertConfig, with the activation 'silu'"):
    llama.LlamaConfig(**fields | changes)
