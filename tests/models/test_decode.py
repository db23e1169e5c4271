"""Decoding: with a cache and without, rows of different length, ends, and sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import decode, llama

CONFIG = llama.LlamaConfig(
  vocab_size=31,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_length=32,
)
MODEL = llama.Llama(CONFIG)
FORWARD = jax.jit(MODEL.apply)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6]]


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  return jax.tree.map(lambda x: 3 * x, params)  # so that logits differ clearly


def run(params, prompts, *, steps=6, choose=decode.greedy, seed=0, eos_id=None, cached=True):
  tokens, lengths = decode.pad_prompts(prompts, pad_id=0)
  cache = None
  if cached:
    cache = llama.init_cache(CONFIG, len(prompts), tokens.shape[1] + steps, jnp.float32)
  f = functools.partial(
    decode.decode, MODEL.apply, steps=steps, choose=choose, key=jax.random.key(seed), eos_id=eos_id
  )
  return np.asarray(jax.jit(f)(params, tokens, lengths, cache=cache))


def one_by_one(params, prompt, steps):
  """The slow twin: the whole text through the model for every token."""
  text = list(prompt)
  for _ in range(steps):
    # Padding after a token changes nothing before it, and one length is compiled once.
    padded = jnp.asarray([text + [0] * (32 - len(text))])
    logits = FORWARD({"params": params}, padded)
    text.append(int(logits[0, len(text) - 1].argmax()))
  return text[len(prompt) :]


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_of_different_length_decode_together_as_each_would_alone(params, cached):
  together = run(params, PROMPTS, cached=cached)
  assert together.tolist() == [one_by_one(params, prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_row_that_has_ended_is_filled_with_its_end_and_the_others_go_on(params, cached):
  free = run(params, PROMPTS)
  eos_id = int(free[0, 2])
  ended = run(params, PROMPTS, eos_id=eos_id, cached=cached)
  for with_end, without in zip(ended.tolist(), free.tolist(), strict=True):
    stop = without.index(eos_id) if eos_id in without else len(without)
    assert with_end[: stop + 1] == without[: stop + 1]
    assert set(with_end[stop + 1 :]) <= {eos_id}


@pytest.mark.parametrize(
  "choose", [decode.greedy, pytest.param(decode.nucleus(2.0, 0.9), marks=pytest.mark.slow)]
)
def test_a_row_ends_at_each_of_several_tokens(params, choose):
  free = run(params, PROMPTS, choose=choose)
  ends = [int(free[0, 2]), int(free[1, 1])]
  ended = run(params, PROMPTS, choose=choose, eos_id=ends)
  for with_end, without in zip(ended.tolist(), free.tolist(), strict=True):
    stop = min([n for n, token in enumerate(without) if token in ends], default=len(without))
    assert with_end[: stop + 1] == without[: stop + 1]
    assert set(with_end[stop + 1 :]) <= {ends[0]}
  assert {row[-1] for row in ended.tolist()} & set(ends)
  np.testing.assert_array_equal(run(params, PROMPTS, choose=choose, eos_id=()), free)


@pytest.mark.slow
def test_a_tiny_nucleus_is_greedy_and_the_same_key_gives_the_same_text(params):
  greedy = run(params, PROMPTS)
  np.testing.assert_array_equal(run(params, PROMPTS, choose=decode.nucleus(1.0, 1e-6)), greedy)
  np.testing.assert_array_equal(run(params, PROMPTS, choose=decode.nucleus(1e-4, 1.0)), greedy)
  sample = functools.partial(run, params, PROMPTS, choose=decode.nucleus(2.0, 0.9))
  np.testing.assert_array_equal(sample(seed=1), sample(seed=1))
  np.testing.assert_array_equal(sample(seed=1), sample(seed=1, cached=False))
  assert (sample(seed=1) != sample(seed=2)).any()


def test_the_nucleus_samples_its_tokens_by_their_share_and_no_others():
  probabilities = np.array([0.02, 0.4, 0.08, 0.3, 0.2])
  logits = jnp.log(probabilities)[None].repeat(20_000, 0)
  tokens = decode.nucleus(1.0, 0.75)(jax.random.key(0), logits)
  share = np.bincount(tokens, minlength=5) / len(tokens)
  # 0.4 + 0.3 do not reach 0.75, so 0.2 is in; the rest is out.
  np.testing.assert_allclose(share, [0, 4 / 9, 0, 3 / 9, 2 / 9], atol=0.015)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: decode.nucleus(0.0, 0.9), "temperature is 0.0"),
    (lambda: decode.nucleus(1.0, 0.0), "top_p is 0.0"),
    (lambda: decode.nucleus(1.0, 1.5), "top_p is 1.5"),
    (lambda: decode.pad_prompts([[1], []], 0), "at least one token"),
    (lambda: decode.pad_prompts([], 0), "at least one token"),
  ],
)
def test_what_makes_no_sense_is_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()
