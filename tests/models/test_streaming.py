"""Texts token by token, against `decode.decode`, and what is read again for the next text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data import chat_templates, chat_tokens, messages
from lora_jax.models import decode, llama, streaming
from lora_jax.train import generation

POSITIONS = 96
CONFIG = llama.LlamaConfig(
  vocab_size=31,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_length=POSITIONS,
)
MODEL = llama.Llama(CONFIG)
PROMPT = [3, 1, 4, 1, 5]
LONG = [n % 31 for n in range(70)]  # more than a chunk
MOST = POSITIONS - len(LONG) + 1  # tokens after it


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  return jax.tree.map(lambda x: 3 * x, params)  # so that logits differ clearly


@pytest.fixture(scope="module")
def others():
  params = MODEL.init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
  return jax.tree.map(lambda x: 3 * x, params)


class Spied(streaming.Streamer):
  """What was compiled, and what was read: the tokens of each call."""

  def __init__(self, choose=decode.greedy):
    self.compiled, self.calls = [], []

    def apply(variables, tokens, **options):
      self.compiled.append(tokens.shape[1])
      return MODEL.apply(variables, tokens, **options)

    def new_cache(rows, slots):
      return llama.init_cache(CONFIG, rows, slots, jnp.float32)

    super().__init__(apply, new_cache, choose=choose, positions=POSITIONS)

  def _read(self, tokens, size, key, step):
    self.calls.append(list(tokens))
    return super()._read(tokens, size, key, step)

  def text(self, params, prompt, steps=12, stop_ids=(), seed=0):
    self.calls.clear()
    key = jax.random.key(seed)
    return list(self.write(params, prompt, steps=steps, stop_ids=stop_ids, key=key))


@functools.partial(jax.jit, static_argnames="choose")
def whole(params, tokens, lengths, key, choose):
  return decode.decode(
    MODEL.apply,
    params,
    tokens,
    lengths,
    steps=MOST,
    choose=choose,
    key=key,
    eos_id=None,
    cache=None,
  )


def decoded(params, prompt, steps=12, choose=decode.greedy, seed=0):
  """The tokens of `decode.decode`, which computes the text anew at each step."""
  # Of one shape, and so compiled once.
  tokens, lengths = decode.pad_prompts([prompt, LONG], 0)
  found = whole(params, tokens, lengths, jax.random.key(seed), choose)
  return np.asarray(found)[0, :steps].tolist()


@pytest.mark.parametrize(
  "choose", [decode.greedy, pytest.param(decode.nucleus(1.5, 0.9), marks=pytest.mark.slow)]
)
def test_the_tokens_are_those_of_decode_and_few_programs_are_compiled(params, choose):
  streamer = Spied(choose)
  for prompt in (PROMPT, LONG, PROMPT[:1]):
    assert streamer.text(params, prompt, seed=3) == decoded(params, prompt, choose=choose, seed=3)
  assert sorted(streamer.compiled) == [1, 64]


def test_a_text_ends_before_its_stop_token_and_the_next_one_may_go_on_from_it(params):
  streamer = Spied()
  free = streamer.text(params, PROMPT)
  stop = free[3]
  assert stop not in free[:3]
  assert streamer.text(params, PROMPT, stop_ids=(stop,)) == free[:3]
  assert streamer.text(params, [*PROMPT, *free[:4]], steps=8) == free[4:]


def test_only_what_is_new_is_read_for_the_next_turn(params):
  streamer = Spied()
  first = streamer.text(params, PROMPT)
  assert streamer.calls == [PROMPT, *([x] for x in first[:-1])]
  # A token of the answer is written in another way, and a question follows.
  turn = [*PROMPT, *first[:6], (first[6] + 1) % 31, 7, 8]
  assert streamer.text(params, turn) == decoded(params, turn)
  assert streamer.calls[0] == turn[len(PROMPT) + 6 :]
  # The same once more: its last token alone has to be read, for its logits.
  assert streamer.text(params, turn) == decoded(params, turn)
  assert streamer.calls[0] == turn[-1:]


def test_with_other_weights_all_is_read_anew(params, others):
  streamer = Spied()
  streamer.text(params, PROMPT)
  assert streamer.text(others, PROMPT) == decoded(others, PROMPT) != decoded(params, PROMPT)
  assert streamer.calls[0] == PROMPT
  assert streamer.text(params, PROMPT) == decoded(params, PROMPT)


def test_a_text_that_is_left_off_goes_on_from_there(params):
  streamer = Spied()
  tokens = streamer.write(params, PROMPT, steps=12, stop_ids=(), key=jax.random.key(0))
  begun = [next(tokens) for _ in range(4)]
  tokens.close()
  turn = [*PROMPT, *begun]
  assert streamer.text(params, turn) == decoded(params, turn)
  assert streamer.calls[0] == turn[-1:]


def test_after_a_call_that_failed_all_is_read_anew(params, monkeypatch):
  streamer = Spied()
  streamer.text(params, PROMPT)
  works = streamer._advance

  def fails(*unused):
    raise KeyboardInterrupt

  monkeypatch.setattr(streamer, "_advance", fails)
  with pytest.raises(KeyboardInterrupt):
    streamer.text(params, PROMPT)
  monkeypatch.setattr(streamer, "_advance", works)
  assert streamer.text(params, PROMPT) == decoded(params, PROMPT)
  assert streamer.calls[0] == PROMPT


def test_a_cache_that_is_too_small_is_made_anew_and_larger(params, monkeypatch):
  monkeypatch.setattr(streaming, "_LEAST_SLOTS", 16)
  streamer = Spied()
  first = streamer.text(params, PROMPT)  # 16 slots
  turn = [*PROMPT, *first, 1, 2]
  assert streamer.text(params, turn) == decoded(params, turn)  # 32
  assert streamer.calls[0] == turn
  assert streamer.text(params, LONG) == decoded(params, LONG)  # 96, as there are positions
  # To the last position, beyond which the padding of a chunk lies.
  assert streamer.room(LONG) == MOST
  assert streamer.text(params, LONG, steps=MOST) == decoded(params, LONG, steps=MOST)


@pytest.mark.slow
def test_the_turns_of_a_real_model_are_those_that_decode_writes_after_the_whole(smollm2):
  model = llama.Llama(smollm2.config)
  words, reads = smollm2.tokenizer, []

  def apply(variables, tokens, **options):
    reads.append(tokens.shape[1])
    return model.apply(variables, tokens, **options)

  streamer = streaming.Streamer(apply, smollm2.new_cache, choose=decode.greedy, positions=8192)
  template = chat_templates.find(words, None)
  said = []
  with chat_templates.Renderer(template, date="2026-01-01") as renderer:
    stops = chat_tokens.stop_ids(renderer, words)
    for question in ("What is the capital of France?", "And of Spain?"):
      said.append({"role": "user", "content": question})
      prompt = chat_tokens.ask(messages.check_asked({"messages": said}), renderer, words)
      key = jax.random.key(0)
      found = list(streamer.write(smollm2.params, prompt, steps=24, stop_ids=stops, key=key))
      tokens, lengths = decode.pad_prompts([prompt], 0)
      whole = decode.decode(
        model.apply,
        smollm2.params,
        tokens,
        lengths,
        steps=24,
        choose=decode.greedy,
        key=key,
        eos_id=stops,
        cache=smollm2.new_cache(1, len(prompt) + 24),
      )
      assert found == generation.until_end(np.asarray(whole)[0].tolist(), stops)
      said.append({"role": "assistant", "content": words.decode(found, after=prompt)})
  assert "Paris" in said[1]["content"] and "Madrid" in said[3]["content"]
  assert sorted(reads) == [1, 64]


@pytest.mark.parametrize(
  ("prompt", "steps", "words"),
  [
    ([], 1, "at least one token to go on from"),
    (LONG, 28, "28 tokens after a prompt of 70 do not fit into 96 positions; use 1 to 27"),
    (LONG, 0, "0 tokens after a prompt of 70 .*; use 1 to 27"),
  ],
)
def test_what_makes_no_sense_is_refused(params, prompt, steps, words):
  with pytest.raises(ValueError, match=words):
    Spied().text(params, prompt, steps=steps)
