"""What is GPT-2's own: its positions end, and layers may differ in the scale of their scores.

Its logits against transformers are in test_families.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import decode, gpt2, layers

CONFIG = gpt2.GPT2Config(
  vocab_size=50,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  head_dim=8,
  max_length=12,
  scale_by_layer=True,
)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(gpt2.GPT2(CONFIG).init, jax.random.key(0), TOKENS)["params"]
  rng = np.random.default_rng(1)  # numpy's, which compiles nothing
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@functools.cache
def apply(config):
  return jax.jit(gpt2.GPT2(config).apply)


def logits(params, tokens, config=CONFIG, **options):
  return np.asarray(apply(config)({"params": params}, jnp.asarray(tokens), **options))


def test_the_parameters_have_the_documented_paths_and_shapes(params):
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert {path: x for path, x in flat.items() if not path.startswith("block_")} == {
    "embed/embedding": (50, 16),
    "positions/embedding": (12, 16),
    "norm/scale": (16,),
    "norm/bias": (16,),
  }
  assert {path: x for path, x in flat.items() if path.startswith("block_1")} == {
    "block_1/attn_norm/scale": (16,), "block_1/attn_norm/bias": (16,),
    "block_1/attn/qkv/kernel": (16, 48), "block_1/attn/qkv/bias": (48,),
    "block_1/attn/out/kernel": (16, 16), "block_1/attn/out/bias": (16,),
    "block_1/mlp_norm/scale": (16,), "block_1/mlp_norm/bias": (16,),
    "block_1/mlp/up/kernel": (16, 24), "block_1/mlp/up/bias": (24,),
    "block_1/mlp/down/kernel": (24, 16), "block_1/mlp/down/bias": (16,),
  }  # fmt: skip


def test_scanned_layers_give_the_logits_and_gradients_of_unrolled_ones(params):
  policy = jax.checkpoint_policies.nothing_saveable
  scanned = dataclasses.replace(CONFIG, scan_layers=True, remat_policy=policy)

  @functools.partial(jax.jit, static_argnums=1)
  @jax.value_and_grad
  def loss(params, config):
    return jnp.mean(jnp.sin(gpt2.GPT2(config).apply({"params": params}, TOKENS)))

  expected, gradient = loss(params, CONFIG)
  found, stacked = loss(layers.stack_layers(params), scanned)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5),
    layers.unstack_layers(stacked),
    gradient,
  )


def test_the_cache_of_scanned_layers_gives_the_logits_of_the_whole_text(params):
  config = dataclasses.replace(CONFIG, scan_layers=True)
  variables = {"params": layers.stack_layers(params)}
  cache, found = gpt2.init_cache(config, 2, CONFIG.max_length), []
  for start, end in ((0, 4), (4, 8), (8, 12)):
    positions = np.broadcast_to(np.arange(start, end), (2, end - start))
    part, cache = apply(config)(
      variables, TOKENS[:, start:end], positions_BT=positions, cache=cache
    )
    found.append(part)
  np.testing.assert_allclose(np.concatenate(found, axis=1), logits(params, TOKENS), atol=1e-5)


def test_texts_that_share_a_row_have_the_logits_that_they_have_alone(params):
  # The row is longer than the positions, its texts are not.
  segments = np.repeat([1, 2], [9, 8])[None]
  row = np.concatenate([TOKENS[0, :9], TOKENS[1, :8]])[None]
  together = logits(params, row, segments_BT=segments)[0]
  alone = logits(params, TOKENS)
  np.testing.assert_allclose(together, np.concatenate([alone[0, :9], alone[1, :8]]), atol=1e-5)


def test_the_logits_are_the_head_of_what_is_hidden_at_the_chosen_positions(params):
  at, model = np.array([[3, 0], [11, 5]]), gpt2.GPT2(CONFIG)

  @jax.jit
  def in_two_calls(variables):
    hidden = model.apply(variables, TOKENS, at_BC=at, method="hidden")
    return model.apply(variables, hidden, method="logits")

  found = in_two_calls({"params": params})
  expected = np.take_along_axis(logits(params, TOKENS), at[..., None], axis=1)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_text_is_longer_than_the_positions_that_were_learned(params):
  longer = np.zeros((1, 13), int)
  with pytest.raises(ValueError, match=r"rows of 13 tokens, and the model has learned 12 posit"):
    logits(params, longer)
  with pytest.raises(ValueError, match=r"a cache of 13 slots: the model has learned 12 positions"):
    gpt2.init_cache(CONFIG, 1, 13)
  cache = gpt2.init_cache(CONFIG, 1, 12)
  with pytest.raises(ValueError, match="rows of 13 tokens"):
    gpt2.GPT2(CONFIG).apply({"params": params}, longer, cache=cache)
  # What shapes do not show is no number, and never the last position again.
  segments = np.ones((1, 13), int)
  assert np.isnan(logits(params, longer, segments_BT=segments)[0, 12]).all()
  positions = np.array([[11, 12]])
  found, _ = apply(CONFIG)({"params": params}, longer[:, :2], positions_BT=positions, cache=cache)
  assert np.isnan(found[0, 1]).all() and np.isfinite(found[0, 0]).all()


def test_a_text_may_have_a_token_at_every_position(params):
  prompts, lengths = decode.pad_prompts([TOKENS[0, :3].tolist(), TOKENS[1, :6].tolist()], 0)
  settings = {"steps": 6, "choose": decode.greedy, "eos_id": None, "key": jax.random.key(0)}
  run = jax.jit(functools.partial(decode.decode, gpt2.GPT2(CONFIG).apply, **settings))
  made = np.asarray(run(params, prompts, lengths, cache=gpt2.init_cache(CONFIG, 2, 12)))
  texts = np.zeros((2, 12), int)
  for text, prompt, new, n in zip(texts, prompts, made, lengths, strict=True):
    text[: n + 6] = [*prompt[:n], *new]
  best = np.argmax(logits(params, texts), axis=-1)
  for n, chosen, new in zip(lengths, best, made, strict=True):
    assert chosen[n - 1 : n + 5].tolist() == new.tolist()


def test_a_cache_with_texts_that_share_a_row_is_refused(params):
  cache = gpt2.init_cache(CONFIG, 2, 12)
  with pytest.raises(ValueError, match="a cache holds one text a row"):
    gpt2.GPT2(CONFIG).apply(
      {"params": params}, TOKENS, segments_BT=np.ones_like(TOKENS), cache=cache
    )


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"head_dim": 0}, "head_dim must be a positive integer, not 0"),
    ({"num_layers": 0}, "num_layers must be a positive integer, not 0"),
    ({"max_length": 1 << 25}, r"max_length 33554432 is over the limit of 16,777,216 learned pos"),
    ({"max_length": "12"}, "max_length must be a positive integer, not '12'"),
    ({"norm_eps": 0.0}, "norm_eps must be a number from"),
    ({"activation": "silu"}, "activation 'silu' is not one of gelu_tanh, gelu"),
    ({"scale_scores": 1}, "scale_scores must be True or False, not 1"),
  ],
)
def test_a_config_whose_numbers_do_not_fit_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CONFIG, **change)
