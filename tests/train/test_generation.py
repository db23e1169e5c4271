import collections
import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu

from lora_jax.models import decode, llama
from lora_jax.train.generation import generate, make_generate_step, prompt_batches
from lora_jax.train.text_scores import bleu, chrf

CONFIG = llama.LlamaConfig(
  vocab_size=31,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_length=32,
  scan_layers=True,
)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5, 8], [9, 7, 9]]
EOS, STEPS = 10, 6


@pytest.fixture(scope="module")
def params():
  init = jax.jit(llama.Llama(CONFIG).init)
  params = init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
  return jax.tree.map(lambda x: 2 * x, params)  # so that logits differ clearly


def run(params, prompts, batch_size, buckets, beams):
  step = make_generate_step(
    llama.Llama(CONFIG).apply,
    functools.partial(llama.init_cache, CONFIG),
    max_tokens=STEPS,
    beams=beams,
    penalty=decode.power(1.0),
    eos_id=EOS,
  )
  batches = prompt_batches(prompts, batch_size, buckets, pad_id=0)
  return generate(step, params, batches, eos_id=EOS)


def test_each_prompt_is_in_one_batch_of_its_length_and_the_last_is_filled_up():
  batches = prompt_batches(PROMPTS, batch_size=2, buckets=(2, 8), pad_id=0)
  assert [batch.tokens_BT.shape for batch in batches] == [(2, 2), (2, 8), (2, 8)]
  assert [batch.index_B.tolist() for batch in batches] == [[1, 2], [0, 3], [4, -1]]
  for batch in batches:
    for tokens, length, index in zip(*batch, strict=True):
      prompt = PROMPTS[index if index >= 0 else batch.index_B[0]]
      assert tokens.tolist() == prompt + [0] * (len(tokens) - len(prompt))
      assert length == len(prompt)


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_text_of_a_prompt_does_not_depend_on_its_batch(params, beams):
  together = run(params, PROMPTS, batch_size=2, buckets=(2, 8), beams=beams)
  tokens, lengths = decode.pad_prompts(PROMPTS, pad_id=0)
  f = functools.partial(
    decode.beam_search,
    llama.Llama(CONFIG).apply,
    steps=STEPS,
    beams=beams,
    penalty=decode.power(1.0),
    eos_id=EOS,
    cache=None,
    exact=False,
  )
  expected = jax.jit(f)(params, tokens, lengths).tokens_BKS[:, 0].tolist()
  assert together == [x[: x.index(EOS)] if EOS in x else x for x in expected]
  assert {len(text) < STEPS for text in together} == {True, False}  # some end, some do not


def test_prompts_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="prompt 0 has 5 tokens, more than the last bucket, 4"):
    prompt_batches(PROMPTS, batch_size=2, buckets=(2, 4), pad_id=0)
  with pytest.raises(ValueError, match="at least one token"):
    prompt_batches([], batch_size=2, buckets=(2,), pad_id=0)


def test_bleu_takes_all_references_of_each_text_and_says_how_it_was_computed():
  texts = ["the cat sat on the mat", "a pub by the river , cheap"]
  references = [
    ["a cat sat on the mat", "the cat sat on a mat", "there sat the cat"],
    ["a cheap pub by the river"],
  ]
  score = bleu(texts, references)
  assert score["signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
  assert score["texts"] == 2
  # A reference that is given twice changes no n-gram's greatest count and no closest length.
  padded = [references[0], references[1] * 3]
  whole = sacrebleu.corpus_bleu(texts, [list(stream) for stream in zip(*padded, strict=True)])
  assert score["bleu"] == pytest.approx(whole.score)
  fewer = bleu(texts, [references[0][:1], references[1]])
  assert fewer["bleu"] < score["bleu"] < 100
  assert fewer["signature"].startswith("nrefs:1|")
  same = bleu(["a cheap pub ."] * 2, [["no", "a cheap pub ."], ["a cheap pub ."]])
  assert same["bleu"] == pytest.approx(100)


def test_chrf_is_its_formula_on_one_text():
  """F2 of the mean precision and recall of n-grams of one to six characters, spaces left out."""
  text, reference = "ab acab", "abcacab"

  def grams(of, n):
    of = of.replace(" ", "")
    return collections.Counter(of[i : i + n] for i in range(len(of) - n + 1))

  orders = range(1, 7)
  hits = [(grams(text, n) & grams(reference, n)).total() for n in orders]
  precision = np.mean([x / grams(text, n).total() for n, x in zip(orders, hits, strict=True)])
  recall = np.mean([x / grams(reference, n).total() for n, x in zip(orders, hits, strict=True)])
  expected = 100 * 5 * precision * recall / (4 * precision + recall)
  assert chrf([text], [[reference]])["chrf"] == pytest.approx(expected)
  assert chrf([text], [["no such thing", text]])["chrf"] == pytest.approx(100)


def test_bleu_is_its_formula_on_one_text():
  # All words and pairs are in a reference, 3 of 4 triples and 1 of 3 fours; it is not too short.
  score = bleu(["the cat sat on a mat"], [["the cat sat on the mat", "on a mat there is a cat"]])
  assert score["bleu"] == pytest.approx(100 * np.prod([6 / 6, 5 / 5, 3 / 4, 1 / 3]) ** 0.25)


@pytest.mark.parametrize("references", [[], [["a"], []], [["a"]]])
def test_a_text_without_references_is_refused(references):
  with pytest.raises(ValueError, match="at least one reference"):
    bleu(["a", "b"], references)


def test_without_sacrebleu_the_extra_that_installs_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  monkeypatch.delitem(sys.modules, "lora_jax.train.text_scores")
  with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_jax\[eval\]"'):
    importlib.import_module("lora_jax.train.text_scores")
