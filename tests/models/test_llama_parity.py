"""The model against transformers' PyTorch implementation on the same SmolLM2-135M weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch, transformers

from lora_jax.io import assets, pretrained
from lora_jax.models import layers, llama

SENTENCES = [
  "The capital of France is Paris, and that of Italy is Rome.",
  "Review: a gorgeous, witty, seductive movie.\nSentiment: positive",
  "In 1969, 650 million people watched the first steps on the Moon; nobody forgot them.",
  "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
  "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
]
PROMPTS = [
  "The capital of France is",
  "Once upon a time, in a village by the sea,",
  "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
  "def fibonacci(n):\n",
  "Review: one of the worst films of the year.\nSentiment:",
]
NEW_TOKENS = 32
ATOL = 2e-3


@pytest.fixture(scope="module")
def peer():
  path = assets.resolve(pretrained.DEFAULT)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def forward(smollm2):
  model = llama.Llama(smollm2.config)
  return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT))


def padded(rows: list[list[int]]) -> np.ndarray:
  """Rows filled up on the right, where nothing that comes before can see it."""
  tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for filled, row in zip(tokens_BT, rows, strict=True):
    filled[: len(row)] = row
  return tokens_BT


@torch.no_grad()
def peer_logits(peer, rows: list[list[int]]) -> list[np.ndarray]:
  logits_BTV = peer(torch.tensor(padded(rows))).logits.numpy()
  return [logits_TV[: len(row)] for logits_TV, row in zip(logits_BTV, rows, strict=True)]


@pytest.fixture(scope="module")
def greedy(smollm2):
  """Continues all prompts at once with the cache, each row at its own position."""
  model = llama.Llama(smollm2.config)
  prompts = [smollm2.tokenizer.encode(prompt) for prompt in PROMPTS]
  lengths_B = np.array([len(prompt) for prompt in prompts])
  tokens_BT = padded(prompts)

  @functools.partial(jax.jit, donate_argnames="cache")
  def step(params, tokens_BT, positions_BT, at_B1, cache):
    logits_B1V, cache = model.apply(
      {"params": params}, tokens_BT, positions_BT=positions_BT, at_BC=at_B1, cache=cache
    )
    return jnp.argmax(logits_B1V, axis=-1), cache

  cache = llama.init_cache(smollm2.config, len(prompts), lengths_B.max() + NEW_TOKENS)
  at_B1 = lengths_B[:, None] - 1
  positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
  next_B1, cache = step(smollm2.params, tokens_BT, positions_BT, at_B1, cache)
  continued = [next_B1]
  for i in range(1, NEW_TOKENS):
    next_B1, cache = step(smollm2.params, next_B1, at_B1 + i, np.zeros_like(at_B1), cache)
    continued.append(next_B1)
  return prompts, np.concatenate(continued, axis=1).tolist()


def test_logits_are_those_of_transformers(smollm2, peer, forward):
  rows = [smollm2.tokenizer.encode(sentence) for sentence in SENTENCES]
  ours_BTV = forward(smollm2.params, padded(rows))
  for ours_TV, theirs_TV in zip(ours_BTV, peer_logits(peer, rows), strict=True):
    np.testing.assert_allclose(ours_TV[: len(theirs_TV)], theirs_TV, atol=ATOL, rtol=0)


@pytest.mark.slow
def test_32_greedy_tokens_on_five_prompts_are_those_of_transformers(peer, greedy):
  prompts, continued = greedy
  texts = [prompt + new for prompt, new in zip(prompts, continued, strict=True)]
  # Its greedy choice after every prefix of our text, in one pass: where all are our tokens, its own
  # greedy text is ours.
  for prompt, new, theirs_TV in zip(prompts, continued, peer_logits(peer, texts), strict=True):
    assert theirs_TV.argmax(-1)[len(prompt) - 1 : -1].tolist() == new
    assert len(new) == NEW_TOKENS


@pytest.mark.slow
def test_the_greedy_tokens_with_a_cache_are_those_without_one(smollm2, forward, greedy):
  prompts, continued = greedy
  texts = [prompt + new for prompt, new in zip(prompts, continued, strict=True)]
  best_BT = np.argmax(forward(smollm2.params, padded(texts)), axis=-1)
  for prompt, new, best_T in zip(prompts, continued, best_BT, strict=True):
    assert best_T[len(prompt) - 1 : len(prompt) + NEW_TOKENS - 1].tolist() == new


def test_scanned_layers_give_the_logits_of_transformers(smollm2, peer):
  row = smollm2.tokenizer.encode(SENTENCES[0])
  model = llama.Llama(dataclasses.replace(smollm2.config, scan_layers=True))
  params = layers.stack_layers(smollm2.params)
  [ours_TV] = jax.jit(model.apply)({"params": params}, np.asarray([row]))
  [theirs_TV] = peer_logits(peer, [row])
  np.testing.assert_allclose(ours_TV, theirs_TV, atol=ATOL, rtol=0)
