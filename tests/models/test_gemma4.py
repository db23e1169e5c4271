"""Gemma 4's text model: what its layers share, what it refuses. Parity: test_families.py."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.io import pretrained
from lora_jax.models import decode, gemma4

CONFIG = gemma4.Gemma4Config(
  vocab_size=16,
  width=8,
  mlp_width=8,
  num_layers=6,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  full_kv_heads=2,
  full_head_dim=8,
  rotary_dim=4,
  max_length=16,
  window=3,
  shared_layers=3,
  local_layers=(True, True, False, True, False, False),
  per_layer_width=4,
  per_layer_vocab=20,
)
SMALL = dataclasses.replace(CONFIG, num_layers=2, shared_layers=0, local_layers=(True, False))
TOKENS = jnp.arange(10)[None]


@functools.cache
def made(config):
  return jax.jit(gemma4.Gemma4(config).init)(jax.random.key(0), TOKENS)["params"]


@functools.cache
def applied(config):
  return jax.jit(gemma4.Gemma4(config).apply)


def logits(config, params):
  return np.asarray(applied(config)({"params": params}, TOKENS))


@pytest.mark.slow
def test_layers_see_the_keys_and_values_of_the_last_one_of_their_kind():
  assert gemma4.sources(CONFIG) == (0, 1, 2, 1, 2, 2)
  params = made(CONFIG)
  with_keys = [i for i in range(6) if "key" in params[f"block_{i}"]["attn"]]
  assert with_keys == [0, 1, 2]
  cache = gemma4.init_cache(CONFIG, batch_size=2, max_length=7)
  assert {name: x.key_BSKH.shape for name, x in cache.items()} == {
    "block_0": (2, 7, 1, 4),
    "block_1": (2, 7, 1, 4),
    "block_2": (2, 7, 2, 8),
  }
  expected = logits(CONFIG, params)
  for i in with_keys:
    block = params[f"block_{i}"]
    other = block | {
      "attn": block["attn"] | {"value": {"kernel": -block["attn"]["value"]["kernel"]}}
    }
    assert abs(logits(CONFIG, params | {f"block_{i}": other}) - expected).max() > 1e-3


@pytest.mark.slow
def test_values_that_are_the_keys_have_no_kernel_in_layers_without_the_window():
  config = dataclasses.replace(CONFIG, keys_are_values=True)
  params = made(config)
  assert ["value" in params[f"block_{i}"]["attn"] for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("window", 4), ("rotary_dim", 2), ("rotary_dim", 8), ("rope_theta", 10.0),
    ("local_rope_theta", 10.0), ("logit_softcap", 0.1), ("norm_eps", 0.1), ("tie_embeddings", None),
  ],
)  # fmt: skip
def test_every_setting_is_used(field, value):
  if value is None:
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    assert made(config)["head"]["kernel"].shape == (8, 16)
    return
  params = made(SMALL)
  changed = logits(dataclasses.replace(SMALL, **{field: value}), params)
  assert abs(changed - logits(SMALL, params)).max() > 1e-5


@pytest.mark.slow
def test_layers_are_rematerialized_with_the_same_gradients():
  def loss(config, params):
    return jnp.sum(gemma4.Gemma4(config).apply({"params": params}, TOKENS) ** 2)

  config = dataclasses.replace(
    SMALL, num_layers=3, shared_layers=1, local_layers=(True, False, False)
  )
  again = dataclasses.replace(config, remat_policy=jax.checkpoint_policies.nothing_saveable)
  params = made(config)
  one, other = (jax.jit(jax.grad(functools.partial(loss, x)))(params) for x in (config, again))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.slow
def test_the_likeliest_of_beams_is_that_without_a_cache(tmp_path):
  families.write(tmp_path, "Gemma 4")
  found = pretrained.load(tmp_path)
  apply = found.family.make_model(found.config).apply
  tokens_BT, lengths_B = decode.pad_prompts([[5, 17, 300], [11]], 0)
  settings = {"steps": 5, "beams": 2, "penalty": decode.power(1.0), "eos_id": None, "exact": True}

  def texts(cache):
    search = jax.jit(functools.partial(decode.beam_search, apply, **settings))
    return search(found.params, tokens_BT, lengths_B, cache=cache)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-4),
    texts(found.new_cache(2, 8)),
    texts(None),
  )


def test_layers_are_not_stacked_and_nothing_is_loaded_for_it(tmp_path):
  families.write(tmp_path, "Gemma 4")
  with pytest.raises(ValueError, match="scan_layers: the layers of a Gemma 4 have parameters of d"):
    pretrained.load(tmp_path, scan_layers=True)
  with pytest.raises(ValueError, match="use scan_layers=False"):
    pretrained.inspect(tmp_path, scan_layers=True)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_kv_heads": 4}, "num_heads 2 is not a multiple of num_kv_heads 4"),
    ({"full_kv_heads": 4}, "num_heads 2 is not a multiple of full_kv_heads 4"),
    ({"full_kv_heads": 0}, "full_kv_heads must be a positive integer, not 0"),
    ({"rotary_dim": 10}, "rotary_dim 10 must be even and up to 8"),
    ({"head_dim": 3}, "head_dim 3 must be even"),
    ({"window": True}, "window must be a positive integer, not True"),
    ({"shared_layers": -1}, "shared_layers must be a positive integer, not -1"),
    ({"shared_layers": False}, "shared_layers must be a positive integer, not False"),
    ({"shared_layers": 6}, "the last 6 of 6 layers share keys and values"),
    ({"shared_layers": 4}, "no layer before them has some of each kind"),
    ({"local_layers": (True,) * 6}, "and False for the last"),
    (
      {"local_layers": (False,)},
      r"local_layers \(False,\) must be True or False for each of the 6",
    ),
    ({"per_layer_width": None}, "per_layer_width and per_layer_vocab are given both or neither"),
    ({"per_layer_vocab": 15}, "per_layer_vocab 15 is less than the vocab_size 16"),
    ({"wide_shared_mlp": 1}, "wide_shared_mlp must be True or False, not 1"),
  ],
)
def test_what_is_no_model_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CONFIG, **changes)
