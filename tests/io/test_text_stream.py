"""The text of tokens one by one, against that of all of them, and tokens as people read them."""

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.token_texts import token_texts
from lora_jax.io import tokenizer
from lora_jax.io.text_stream import TextStream

TEXTS = [
  "",
  " leading and trailing ",
  "Größe, naïve café — “quotes”",
  "日本語 русский हिन्दी 😀👩‍👩‍👧 e\u0301",
  "a\n\n b\t<|im_end|> c </s>",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, smollm2_tokenizer):
  """SmolLM2's, and those of the kinds of Llama 2's and T5's, which leave out a first space."""
  found = {"smollm2": smollm2_tokenizer}
  for name in ("sentencepiece_bpe", "metaspace", "unigram"):
    folder = tiny_tokenizers.write(tmp_path_factory.mktemp(name), tiny_tokenizers.KINDS[name]())
    found[name] = tokenizer.from_folder(folder)
  return found


@pytest.mark.parametrize("name", ["smollm2", "sentencepiece_bpe", "metaspace", "unigram"])
def test_the_pieces_of_a_stream_are_the_text_of_all_tokens(tokenizers, name):
  words = tokenizers[name]
  for before in ("", "Review: good", "hello world! " * 10):
    for text in TEXTS:
      pair = words.encode_pair([(before, True)], [(text, True)])
      after, ids = pair.ids[: pair.boundary], pair.ids[pair.boundary :]
      stream = TextStream(words, after=after)
      pieces = [stream.add(token) for token in ids]
      assert not any("\ufffd" in piece for piece in pieces)
      assert "".join(pieces) + stream.end() == words.decode(ids, after=after)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), skip=st.booleans())
def test_a_stream_of_any_tokens_gives_out_each_whole_character(tokenizers, ids, skip):
  words = tokenizers["smollm2"]
  stream = TextStream(words, skip_special_tokens=skip)
  found = "".join(map(stream.add, ids)) + stream.end()
  wanted = words.decode(ids, skip_special_tokens=skip)
  # Bytes that make no character may be counted in another way.
  assert found.replace("\ufffd", "") == wanted.replace("\ufffd", "")
  assert not stream.held


def test_half_a_character_waits_for_the_rest_and_is_shown_where_none_comes(tokenizers):
  words = tokenizers["smollm2"]
  ids = words.encode("😀")
  assert len(ids) > 1
  stream = TextStream(words)
  assert [stream.add(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]
  assert stream.add(ids[0]) == "" and stream.held == ids[:1]
  assert stream.end() == "\ufffd" and stream.end() == ""


def test_the_tokens_of_a_text_are_told_apart_and_special_ones_from_text_that_reads_like_them(
  tokenizers,
):
  words = tokenizers["smollm2"]
  pieces = [("<|im_start|>", True), ("user\n<|im_end|> é😀", False), ("<|im_end|>", True)]
  ids, _ = words.encode_pieces(pieces)
  found = token_texts(words, ids, learnt={len(ids) - 1})
  assert "".join(each.text for each in found) == "".join(text for text, _ in pieces)
  assert sum(each.count for each in found) == len(ids)
  assert [each.text for each in found if each.special] == ["<|im_start|>", "<|im_end|>"]
  assert [each.learnt for each in found] == [False] * (len(found) - 1) + [True]
  [emoji] = [each for each in found if "😀" in each.text]
  assert emoji.count > 1 and not emoji.special


def test_half_a_character_before_a_special_token_is_a_text_of_its_own(tokenizers):
  words = tokenizers["smollm2"]
  end = words.special_tokens["<|im_end|>"]
  ids = [words.encode("😀")[0], end, words.encode("😀")[0]]
  found = token_texts(words, ids, learnt={0})
  assert [each.text for each in found] == ["\ufffd", "<|im_end|>", "\ufffd"]
  assert [each.special for each in found] == [False, True, False]
  assert [each.learnt for each in found] == [True, False, False]
