"""Whole texts and pairs, as an encoder reads them, against `tokenizers` and transformers."""

import json

import pytest
import tiny_encoder
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import transformers

from lora_jax.io import tokenizer

WORDS = st.lists(
  st.sampled_from(["a", "fine", "film", "dull", "12", "review", ",", "xyz", "[UNK]", "Ä"]),
  min_size=1,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  return tiny_encoder.write_tokenizer(tmp_path_factory.mktemp("words"))


def bytes_of_roberta():
  """Byte-level pieces, and RoBERTa's tokens around a text and between two."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  ids = {piece: n for n, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet, "fi"])}
  words = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [("f", "i")], unk_token="<unk>"))
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = tokenizers.decoders.ByteLevel()
  words.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
  words.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
  return words


@pytest.mark.parametrize("make", [tiny_encoder.wordpiece, bytes_of_roberta])
def test_a_text_and_a_pair_are_cut_as_the_library_cuts_them(tmp_path, make):
  make().save(str(tmp_path / "tokenizer.json"))
  ours, backend = tokenizer.from_folder(tmp_path), make()

  @settings(deadline=None, max_examples=100)
  @given(WORDS, st.none() | WORDS, st.integers(6, 30))
  def check(text, second, most):
    check_whole(ours, backend, [" ".join(x) for x in (text, second) if x is not None], most)

  check()


def check_whole(ours, backend, texts, most):
  backend.no_truncation()
  whole = backend.encode(*texts)
  backend.enable_truncation(most, strategy="longest_first")
  expected = backend.encode(*texts)
  found = ours.encode_whole(*texts, max_length=most)
  assert (found.ids, found.types) == (expected.ids, expected.type_ids)
  assert found.cut == len(whole.ids) - len(expected.ids)
  own = [n for n, added in enumerate(expected.special_tokens_mask) if not added]
  assert [n for span in found.spans for n in range(*span)] == own


def test_a_pairs_texts_are_found_in_its_tokens(ours):
  found = ours.encode_whole("a fine [UNK]", "dull", max_length=24)
  assert len(found.spans) == 2
  texts = [ours.decode(found.ids[slice(*span)], skip_special_tokens=False) for span in found.spans]
  assert texts == ["a fine [UNK]", "dull"]


@pytest.mark.parametrize(
  ("texts", "most", "words"),
  [
    (("",), 8, "the text '' has no tokens; add some text"),
    ((" \n",), 8, "has no tokens"),
    (("a film", " "), 8, "the text ' ' has no tokens"),
    (("a",), 2, "2 tokens leave no room for 1 texts; use more"),
    (("a", "b"), 4, "4 tokens leave no room for 2 texts"),
    (("half \ud800",), 8, r"U\+D800, half of a surrogate pair"),
  ],
)
def test_a_text_that_cannot_be_read_is_refused(ours, texts, most, words):
  with pytest.raises(ValueError, match=words):
    ours.encode_whole(*texts, max_length=most)


def test_a_tokenizer_that_puts_nothing_around_joins_no_pair(tmp_path):
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words.save(str(tmp_path / "tokenizer.json"))
  plain = tokenizer.from_folder(tmp_path)
  found = plain.encode_whole("a b a", max_length=2)
  assert (found.ids, found.cut, found.spans) == ([0, 1], 1, [(0, 2)])
  with pytest.raises(
    ValueError, match="has no post-processor, which says how two texts are joined"
  ):
    plain.encode_whole("a", "b", max_length=8)


# ---- vocab.txt


def write_vocabulary(folder, settings=None):
  ids = tiny_encoder.wordpiece().get_vocab()
  tokens = sorted(ids, key=ids.get)
  (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
  if settings is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return tokens


TEXTS = ("A FINE film, number 3!", "Ärger über Größe", "日本 film", "[SEP] a [MASK]", "x" * 120)


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_gives_the_ids_of_transformers(tmp_path, lower):
  write_vocabulary(tmp_path, tiny_encoder.SETTINGS | {"do_lower_case": lower})
  ours = tokenizer.from_folder(tmp_path)
  theirs = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=lower)
  for text in TEXTS:
    assert ours.encode_whole(text, max_length=500).ids == theirs(text).input_ids
    pair = theirs(text, TEXTS[0])
    found = ours.encode_whole(text, TEXTS[0], max_length=500)
    assert (found.ids, found.types) == (pair.input_ids, pair.token_type_ids)
  assert ours.pad_id == 0 and ours.special_tokens["[CLS]"] == 2
  # What is written again has a tokenizer.json.
  ours.save(tmp_path / "again")
  again = tokenizer.from_folder(tmp_path / "again")
  assert again.encode_whole(TEXTS[0], max_length=500) == ours.encode_whole(TEXTS[0], max_length=500)
  assert again.describe() == ours.describe()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda tokens: [*tokens, tokens[-1]], "stands there twice"),
    (lambda tokens: [x for x in tokens if x != "[SEP]"], r"lacks the token '?\[SEP\]"),
  ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, change, words):
  tokens = write_vocabulary(tmp_path)
  (tmp_path / "vocab.txt").write_text("\n".join(change(tokens)) + "\n", encoding="utf-8")
  with pytest.raises(ValueError, match=words):
    tokenizer.from_folder(tmp_path)


def test_a_setting_of_a_vocabulary_that_is_none_is_refused(tmp_path):
  write_vocabulary(tmp_path, {"do_lower_case": "yes"})
  with pytest.raises(ValueError, match="do_lower_case 'yes' is not true, false or null"):
    tokenizer.from_folder(tmp_path)
