"""Scalings of rotary frequencies against transformers, up to and beyond the first context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from peers import torch, transformers

from lora_jax import families
from lora_jax.io import configs, names
from lora_jax.models import decode, llama, rope

TINY = {
  "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
  "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = {
  "short_factor": [1.0, 1.02, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5],
  "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.5],
}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16} | FACTORS
SCALINGS = {
  "linear": {"rope_type": "linear", "factor": 3.0},
  "llama3": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  },
  "dynamic": {"rope_type": "dynamic", "factor": 4.0},
  "yarn": YARN,
  "yarn, factor of attention": YARN | {"attention_factor": 1.4},
  "yarn, weights of the logarithm": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
  "yarn, one weight of the logarithm": YARN | {"mscale": 0.7},
  "yarn, another ramp": YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
  "yarn, another ramp with its ends as they are": YARN
  | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
  "yarn, no ramp": YARN | {"original_max_position_embeddings": 2},
  "longrope": LONG,
  "longrope, factor": LONG | {"factor": 2.0},
  "longrope, factor of attention": LONG | {"attention_factor": 0.9},
}  # fmt: skip


def peer_config(scaling, **fields):
  return transformers.LlamaConfig(**TINY | fields, rope_parameters={"rope_theta": 5000.0} | scaling)


@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_are_those_of_transformers_at_every_length(name, length):
  theirs = peer_config(SCALINGS[name])
  config = configs.from_hugging_face(theirs.to_dict())
  turn = llama.rotation(config, jnp.arange(length)[None], length)
  modeling = transformers.models.llama.modeling_llama
  embedding = modeling.LlamaRotaryEmbedding(theirs)
  cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
  np.testing.assert_allclose(turn.cos_BTR, cos[..., :8].numpy(), atol=1e-4)
  np.testing.assert_allclose(turn.sin_BTR, sin[..., :8].numpy(), atol=1e-4)
  if name not in ("linear", "llama3", "dynamic", "yarn, weights of the logarithm"):
    assert abs(turn.cos_BTR[0, 0] - 1).min() > 1e-3  # else the factor might have been left out


@pytest.fixture(scope="module")
def loaded():
  """(transformers' model, our config, its parameters) by the name of a scaling."""

  @functools.cache
  def load(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(peer_config(SCALINGS[name])).eval()
    for parameter in model.parameters():
      torch.nn.init.normal_(parameter, std=0.3)
    config = configs.from_hugging_face(model.config.to_dict())
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    paths = names.assign(tensors, names.LLAMA_HF, families.param_shapes(config))
    flat = {
      tuple(path.split("/")): tensors[name].T if path.endswith("kernel") else tensors[name]
      for name, path in paths.items()
    }
    return model, config, traverse_util.unflatten_dict(flat)

  return load


@pytest.mark.parametrize("length", [12, 80])
@pytest.mark.parametrize("name", ["dynamic", "yarn", "longrope"])
def test_logits_are_those_of_transformers_at_every_length(loaded, name, length):
  peer, config, params = loaded(name)
  tokens_1T = np.random.default_rng(0).integers(0, 64, (1, length))
  with torch.no_grad():
    theirs = peer(torch.tensor(tokens_1T)).logits.numpy()
  ours = jax.jit(llama.Llama(config).apply)({"params": params}, tokens_1T)
  np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=0)
  assert np.std(theirs) > 0.3


def test_a_cache_with_room_for_more_than_the_first_context_has_the_long_factors(loaded):
  """Also for the row whose text is short, as without a cache, where it is padded as far."""
  _, config, params = loaded("longrope")
  prompts_BT, lengths_B = decode.pad_prompts([[*range(17)], [7, 8, 9]], 0)
  settings = {"steps": 3, "choose": decode.greedy, "key": jax.random.key(0), "eos_id": None}
  made = [
    jax.jit(functools.partial(decode.decode, llama.Llama(config).apply, **settings))(
      params, prompts_BT, lengths_B, cache=cache
    )
    for cache in (None, llama.init_cache(config, 2, 20))
  ]
  np.testing.assert_array_equal(*made)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("dynamic", {"slots": 65}, "frequencies change after 64 tokens, and the cache has 65 slots"),
    ("dynamic", {"segments_BT": np.ones((1, 70), int)}, "rows of 70 tokens may hold texts of any"),
    ("longrope", {"segments_BT": np.ones((1, 17), int)}, "rows of 17 tokens .* at most 16 tokens"),
    ("longrope", {"positions_BT": np.arange(17)[None]}, "or one text a row from position 0"),
  ],
)
def test_what_holds_texts_of_different_frequencies_is_refused(loaded, name, options, words):
  _, config, _ = loaded(name)
  if "slots" in options:
    options, length = {"cache": llama.init_cache(config, 1, options["slots"])}, 1
  else:
    (length,) = (x.shape[1] for x in options.values())
  tokens_1T = jnp.zeros((1, length), jnp.int32)
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(lambda: llama.Llama(config).init(jax.random.key(0), tokens_1T, **options))


def test_texts_that_share_a_row_within_the_first_context_are_as_they_are_alone(loaded):
  _, config, params = loaded("longrope")
  apply = jax.jit(llama.Llama(config).apply)
  tokens_1T, segments_1T = jnp.arange(16)[None], jnp.repeat(jnp.arange(2), 8)[None]
  together = apply({"params": params}, tokens_1T, segments_BT=segments_1T)
  alone = apply({"params": params}, tokens_1T[:, 8:])
  np.testing.assert_allclose(together[:, 8:], alone, atol=1e-4)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: rope.DynamicRope(factor=0.5, original_length=8), "DynamicRope: factor must be a num"),
    (lambda: rope.DynamicRope(factor=2.0, original_length=0), "original_length must be an integer"),
    (lambda: yarn(factor=float("nan")), "YarnRope: factor must be a number from 1"),
    (lambda: yarn(beta_fast=1.0), "beta_slow 1.0 and beta_fast 1.0 must be numbers"),
    (lambda: yarn(beta_slow=0.0), "the first above 0"),
    (lambda: yarn(attention_factor=0.0), "attention_factor must be a number from 1/1,000,000"),
    (lambda: yarn(attention_factor=True), "attention_factor must be a number"),
    (lambda: yarn(truncate=1), "truncate must be True or False, not 1"),
    (lambda: yarn(original_length=2.5), "original_length must be an integer from 1"),
    (lambda: rope.yarn_attention_factor(2.0, -1.0, 1.0), "mscale must be a number"),
    (lambda: long(short_factors=(1.0, float("inf"))), "each of short_factors must be a number"),
    (lambda: long(long_factors=(1.0, 0.0)), "each of long_factors must be a number"),
    (lambda: long(long_factors=[1.0]), r"long_factors must be a tuple of numbers, not \[1.0\]"),
    (lambda: long(original_length=1), "original_length must be an integer from 2"),
    (lambda: rope.longrope_attention_factor(2.0, 1), "original_length must be an integer from 2"),
    (lambda: config_with(long()), "short_factors has 2 numbers, and heads of 8 .* need 4"),
    (lambda: config_with(yarn(), rope_theta=1.0), "YarnRope: needs a rope_theta above 1"),
    (
      lambda: config_with(rope.DynamicRope(factor=2.0, original_length=8), head_dim=2),
      "DynamicRope: needs 4 rotated features",
    ),
    (lambda: config_with("yarn"), "must be a scaling of lora_jax.models.rope, not 'yarn'"),
    (lambda: config_with(None, rotary_dim=3), "rotary_dim 3 must be even and up to head_dim 8"),
    (lambda: config_with(None, rotary_dim=10), "rotary_dim 10 must be even and up to head_dim 8"),
    (lambda: config_with(None, query_growth=0.1), "query_growth and query_length are given both"),
    (lambda: config_with(None, rotated_layers=(1,)), r"rotated_layers \(1,\) must be True or Fal"),
    (lambda: config_with(None, whole_qk_norm=True), "whole_qk_norm needs qk_norm"),
    (lambda: config_with(None, fused=True, value_dim=4), "values in a fused kernel"),
    (
      lambda: config_with(None, scale_embeddings=True, embedding_multiplier=2.0),
      "scale_embeddings and embedding_multiplier set the same factor",
    ),
    (
      lambda: config_with(None, query_divisor=4.0, attention_multiplier=2.0),
      "query_divisor and attention_multiplier set the same factor",
    ),
  ],
)
def test_values_that_no_model_has_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def yarn(**changes):
  return rope.YarnRope(**{"factor": 2.0, "original_length": 8, "attention_factor": 1.0} | changes)


def long(**changes):
  fields = {"short_factors": (1.0, 1.0), "long_factors": (2.0, 2.0), "attention_factor": 1.0}
  return rope.LongRope(**fields | {"original_length": 8} | changes)


def config_with(scaling, **changes):
  config = llama.LlamaConfig(
    vocab_size=16,
    width=8,
    mlp_width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=16,
  )
  return dataclasses.replace(config, rope_scaling=scaling, **changes)
