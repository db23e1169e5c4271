"""Each family of decoders against transformers, on tiny random models that transformers wrote."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch

from lora_jax.families import family_of, param_shapes
from lora_jax.io import pretrained
from lora_jax.io.checked_fields import SWITCHES
from lora_jax.models import decode, layers, llama, llama_config

PROMPTS = [[5, 17, 300, 3, 3, 41, 0, 64, 2], [11, 40, 8], [7, 7, 350, 12, 9, 101]]
NEW_TOKENS = 32
ATOL = 2e-3  # logits of order ten, float32


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """(the model of transformers, what `pretrained.load` makes of its folder), by the kind's name."""

  @functools.cache
  def load(name):
    folder = tmp_path_factory.mktemp("family")
    peer = families.write(folder, name)
    return peer, pretrained.load(folder)

  return load


def peer_logits(peer, rows):
  with torch.no_grad():
    return peer(torch.tensor(np.asarray(rows))).logits.numpy()


def logits(config, params, tokens_BT, **options):
  apply = jax.jit(family_of(config).make_model(config).apply)
  return np.asarray(apply({"params": params}, jnp.asarray(tokens_BT), **options))


def kinds(*everyday, without=()):
  """Every kind, those that are not named marked as slow."""
  return [
    name if name in everyday else pytest.param(name, marks=pytest.mark.slow)
    for name in families.KINDS
    if name not in without
  ]


# Those that differ from another one of these by what is tested with it are slow.
RARER = {"Ministral", "Ministral 3", "OLMo 3", "SmolLM 3", "Granite"}
EVERYDAY = {*families.FIRST.values(), "Qwen 3, tied"} - RARER


@pytest.mark.parametrize("name", kinds(*EVERYDAY))
def test_logits_and_greedy_tokens_are_those_of_transformers(loaded, name):
  peer, found = loaded(name)
  assert found.config.family == families.KINDS[name].family
  tokens_BT, lengths_B = decode.pad_prompts(PROMPTS, 0)
  apply = found.family.make_model(found.config).apply
  cache = found.family.init_cache(found.config, len(PROMPTS), tokens_BT.shape[1] + NEW_TOKENS)
  settings = {"steps": NEW_TOKENS, "choose": decode.greedy, "eos_id": None}
  made_BS = jax.jit(functools.partial(decode.decode, apply, **settings))(
    found.params, tokens_BT, lengths_B, key=jax.random.key(0), cache=cache
  )
  # The choice after every prefix of our text, in one pass: where all are our tokens, the greedy
  # text is ours, theirs and that without a cache.
  texts = np.zeros((len(PROMPTS), tokens_BT.shape[1] + NEW_TOKENS), np.int32)
  for row, prompt, made in zip(texts, PROMPTS, np.asarray(made_BS), strict=True):
    row[: len(prompt) + NEW_TOKENS] = [*prompt, *made]
  theirs_BTV = peer_logits(peer, texts)
  ours_BTV = logits(found.config, found.params, texts)
  np.testing.assert_allclose(ours_BTV, theirs_BTV, atol=ATOL, rtol=0)
  assert np.std(theirs_BTV) > 0.5
  for i, prompt in enumerate(PROMPTS):
    for logits_BTV in (ours_BTV, theirs_BTV):
      best_S = np.argmax(logits_BTV[i, len(prompt) - 1 :], axis=-1)[:NEW_TOKENS]
      assert best_S.tolist() == np.asarray(made_BS)[i].tolist()


# Rows that are longer than the first context of its rope hold one text (test_rope.py).
LONGER = ("Phi 4 mini, longer than its first context",)


@pytest.mark.parametrize("name", kinds("Mistral", "Gemma 3", "SmolLM 3", without=LONGER))
def test_texts_that_share_a_row_of_scanned_layers_have_the_logits_that_they_have_alone(
  loaded, name
):
  _, found = loaded(name)
  texts = [[*range(20, 32)], [*range(50, 59)], [*range(70, 90)]]
  together_1T = np.concatenate(texts)[None]
  segments_1T = np.repeat([1, 2, 3], [len(text) for text in texts])[None]
  config, params = found.config, found.params
  if found.family.layers_alike:
    config = dataclasses.replace(config, scan_layers=True)
    params = layers.stack_layers(params)
  [packed_TV] = logits(config, params, together_1T, segments_BT=segments_1T)
  tokens_BT, lengths_B = decode.pad_prompts(texts, 0)
  alone_BTV = logits(found.config, found.params, tokens_BT)
  alone_TV = np.concatenate([rows[:n] for rows, n in zip(alone_BTV, lengths_B, strict=True)])
  np.testing.assert_allclose(packed_TV, alone_TV, atol=1e-4)


def test_scanned_layers_of_two_kinds_decode_with_a_cache_as_layers_apart_do(loaded):
  _, found = loaded("Gemma 3")
  tokens_BT, lengths_B = decode.pad_prompts(PROMPTS, 0)

  def continued(config, params):
    cache = llama.init_cache(config, len(PROMPTS), tokens_BT.shape[1] + 8)
    settings = {"steps": 8, "choose": decode.greedy, "eos_id": None, "key": jax.random.key(0)}
    run = jax.jit(functools.partial(decode.decode, llama.Llama(config).apply, **settings))
    return run(params, tokens_BT, lengths_B, cache=cache)

  scanned = dataclasses.replace(found.config, scan_layers=True)
  np.testing.assert_array_equal(
    continued(scanned, layers.stack_layers(found.params)), continued(found.config, found.params)
  )


@pytest.mark.parametrize("cached", [False, True])
def test_a_token_sees_the_window_of_each_layer_and_no_more(cached):
  config = llama.LlamaConfig(
    vocab_size=16,
    width=8,
    mlp_width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_length=16,
    window=3,
  )
  tokens_1T = jnp.arange(10)[None]  # each token once: a row of the embedding is a position
  model = llama.Llama(config)
  params = model.init(jax.random.key(0), tokens_1T)["params"]

  def logit_at(embedding_VD, position):
    variables = {"params": params | {"embed": {"embedding": embedding_VD}}}
    if not cached:
      return jnp.sum(model.apply(variables, tokens_1T)[0, position] ** 2)
    out, cache = model.apply(variables, tokens_1T[:, :6], cache=llama.init_cache(config, 1, 12))
    rest, _ = model.apply(
      variables, tokens_1T[:, 6:], positions_BT=jnp.arange(6, 10)[None], cache=cache
    )
    return jnp.sum(jnp.concatenate([out, rest], axis=1)[0, position] ** 2)

  gradient = jax.jit(jax.grad(logit_at))
  for position, seen in ((1, [0, 1]), (5, [3, 4, 5]), (7, [5, 6, 7]), (9, [7, 8, 9])):
    rows = np.any(np.asarray(gradient(params["embed"]["embedding"], position)) != 0, axis=1)
    assert list(np.flatnonzero(rows)) == seen


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [x for x in families.FIRST.values() if x not in ("GPT-2", "Gemma 4")]
)
def test_no_switch_of_a_family_could_be_left_off(loaded, name):
  _, found = loaded(name)
  tokens_BT = np.arange(40).reshape(2, 20)
  expected = logits(found.config, found.params, tokens_BT)
  together = {
    "window": ("local_layers", "local_rope_theta"),
    "qk_norm": ("whole_qk_norm",),
    "query_growth": ("query_length",),
    "query_length": ("query_growth",),
  }
  on = [x for x, off in SWITCHES.items() if getattr(found.config, x) != off]
  assert on
  for switch in on:
    changes = {x: SWITCHES[x] for x in (switch, *together.get(switch, ()))}
    if switch == "rotary_dim":
      continue  # the factors of the frequencies are as many: a config without it is refused
    if switch == "experts":
      changes = {"experts": dataclasses.replace(found.config.experts, normalized=False)}
    config = dataclasses.replace(found.config, **changes)
    if switch in ("fused", "pre_norms", "whole_qk_norm"):
      assert param_shapes(config) != param_shapes(found.config)  # they could not be read
      continue
    assert abs(logits(config, found.params, tokens_BT) - expected).max() > 10 * ATOL, switch


def test_layers_with_and_without_a_window_have_their_own_configuration():
  config = llama.LlamaConfig(
    vocab_size=16,
    width=8,
    mlp_width=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_length=16,
    window=3,
    local_layers=(True, True, False),
    local_rope_theta=100.0,
    rope_scaling=llama.LinearRope(factor=2.0),
  )
  assert llama_config.locality(config) == (True, True, False)
  local, full = (llama_config.layer_config(config, x) for x in (True, False))
  assert (local.window, local.rope_theta, local.rope_scaling) == (3, 100.0, None)
  assert (full.window, full.rope_theta, full.rope_scaling) == (None, 1e4, config.rope_scaling)
  same = llama_config.layer_config(dataclasses.replace(config, local_rope_theta=None), True)
  assert (same.rope_theta, same.rope_scaling) == (1e4, config.rope_scaling)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"window": 0}, "window must be a positive integer, not 0"),
    ({"window": True}, "window must be a positive integer, not True"),
    ({"local_layers": (True,)}, r"local_layers \(True,\) must be True or False for each of the 3"),
    ({"local_layers": (1, 0, 1)}, "local_layers"),
    ({"window": None, "local_layers": (True, True, False)}, "need a window"),
    ({"window": None, "local_rope_theta": 10.0}, "need a window"),
    ({"local_rope_theta": 0.5}, "local_rope_theta must be a number from 1.0"),
    ({"attn_softcap": 0.0}, "attn_softcap must be a number from 0.001"),
    ({"logit_softcap": "30"}, "logit_softcap must be a number"),
    ({"query_divisor": -1}, "query_divisor must be a number"),
    ({"activation": "relu"}, "activation 'relu' is not one of silu, gelu_tanh"),
    ({"qk_norm": 1}, "qk_norm must be True or False, not 1"),
  ],
)
def test_a_switch_that_no_model_has_is_refused(changes, words):
  fields = {
    "vocab_size": 16, "width": 8, "mlp_width": 8, "num_layers": 3, "num_heads": 2,
    "num_kv_heads": 1, "head_dim": 4, "max_length": 16, "window": 3,
  }  # fmt: skip
  with pytest.raises(ValueError, match=words):
    llama.LlamaConfig(**fields | changes)
