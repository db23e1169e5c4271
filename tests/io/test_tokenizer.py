"""Token ids against the tokenizers that transformers makes of the same files."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import transformers

from lora_jax.io import gguf, pretrained, tokenizer
from lora_jax.io.assets import resolve

TEXTS = [
  "",
  "Hello world",
  " leading and trailing ",
  "It's they'll we've I'D DON'T",
  "1 22 333 4444, 3.14159; 1,000,000 and x2y3",
  "tabs\tand\nnew\n\nlines\r\n  and   runs    of spaces     \n\t ",
  "Größe, naïve café — “quotes” … § ° ±",
  "日本語のテキスト。 русский текст, ελληνικά, עברית, हिन्दी",
  "emoji 😀👩‍👩‍👧 e\u0301 \u200b zero width",
  "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
  "<|endoftext|><|im_end|> <|im_end|><repo_name>x<file_sep>",
  "<|im_start |> <|not_a_token|> <| im_end |>",
  "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass",
  "Review: one of the worst films of the year.\nSentiment:",
  "\x00\x07\x1b\ufeff\uffff",
]


@pytest.fixture(scope="module")
def metadata():
  return gguf.read(resolve(pretrained.DEFAULT)).metadata


@pytest.fixture(scope="module")
def ours(metadata):
  return tokenizer.from_gguf(metadata)


@pytest.fixture(scope="module")
def peer():
  path = resolve(pretrained.DEFAULT)
  return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(ours, peer, text):
  # Without the BOS that transformers may prepend in spite of the file.
  assert ours.encode(text) == peer.encode(text, add_special_tokens=False)


LIKELY = st.sampled_from(
  [*" \n\ta1é😀.'", "  ", " ½", "’s", "'re", "<|im_end|>", "<|", "word", "٣"]
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(LIKELY).map("".join))
def test_ids_of_any_text_with_digits_apart_are_those_of_transformers(ours, peer, text):
  theirs = peer(split_before_digits(text), add_special_tokens=False).input_ids
  assert ours.encode(text) == list(itertools.chain.from_iterable(theirs))


def split_before_digits(text: str) -> list[str]:
  """Each digit apart: SmolLM2 splits so first, and the tokenizer from transformers does not."""
  pieces = [""]
  for character in text:
    if character.isnumeric() or pieces[-1][-1:].isnumeric():
      pieces.append("")
    pieces[-1] += character
  return pieces


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_ids_lead_back_to_the_text(ours, text):
  assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_digits_are_split_off_before_runs_of_spaces_are_cut(ours, peer):
  # SmolLM2's own tokenizer.json has Digits(individual_digits=True) in front of ByteLevel, so that
  # both spaces stay together and one token holds them.
  assert ours.encode("  12") == [*ours.encode("  "), *ours.encode("1"), *ours.encode("2")]
  assert len(ours.encode("  12")) == 3
  assert len(peer.encode("  12", add_special_tokens=False)) == 4


def test_nothing_is_put_around_a_text_where_the_file_says_so(ours):
  assert ours.encode("Hello world") == [19556, 905]
  assert ours.encode("Hello world", add_special_tokens=False) == [19556, 905]
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
  assert ours.vocab_size == 49152


def test_a_file_that_wants_a_bos_gets_one(metadata):
  with_bos = tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_bos_token": True})
  assert with_bos.encode("Hello world") == [1, 19556, 905]
  assert with_bos.encode("") == [1]
  assert with_bos.encode("Hello world", add_special_tokens=False) == [19556, 905]


def test_special_tokens_are_left_out_of_decoded_text_unless_asked_for(ours):
  ids = ours.encode("<|im_start|>user<|im_end|>")
  assert ours.decode(ids) == "user"
  assert ours.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"


def test_llama_3s_way_to_split_is_that_of_its_tokenizer_json(metadata, tmp_path):
  fields = {**metadata, "tokenizer.ggml.pre": "llama-bpe"}
  del fields["tokenizer.ggml.add_bos_token"]
  ours = tokenizer.from_gguf(fields)
  assert ours.encode("word")[0] == ours.bos_id
  ours.save(tmp_path)
  backend = json.loads((tmp_path / "tokenizer.json").read_text())
  assert backend["model"]["ignore_merges"] is True
  split, level = backend["pre_tokenizer"]["pretokenizers"]
  # As in tokenizer.json of meta-llama/Llama-3.2-1B.
  assert split["pattern"] == {
    "Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
  }
  assert (split["behavior"], split["invert"]) == ("Isolated", False)
  assert (level["type"], level["add_prefix_space"], level["use_regex"]) == (
    "ByteLevel",
    False,
    False,
  )


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"model": "rwkv"}, r"model 'rwkv' is not supported; supported: 'gpt2'.*tokenizer.json"),
    ({"pre": "viking"}, r"pre 'viking' is not supported; supported: gpt-2, .*smollm, .*llama-bpe"),
    ({"tokens": ["a", "b"]}, r"2 tokens but 49152 token types"),
    ({"tokens": None}, r"tokenizer.ggml.tokens must be a list of str"),
    ({"merges": ["zzzz yyyy"]}, r"merges do not fit"),
    ({"merges": ["one"]}, r"merges do not fit"),
    ({"eos_token_id": 49152}, r"eos_token_id=49152 is not one of the 49152 tokens"),
    ({"add_bos_token": True, "bos_token_id": None}, r"wants a BOS token and lacks"),
  ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(metadata, change, words):
  changed = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
  with pytest.raises(ValueError, match=words):
    tokenizer.from_gguf(changed)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_saved_tokenizer_is_read_alike_by_us_and_by_transformers(metadata, tmp_path, add_bos):
  saved = tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_bos_token": add_bos})
  saved.save(tmp_path)
  back = tokenizer.from_folder(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in [*TEXTS, "  12  a"]:
    ids = saved.encode(text)
    assert back.encode(text) == ids
    # A text that begins with BOS has it already, and transformers puts another before it.
    doubled = add_bos and text.startswith("<|im_start|>")
    assert theirs.encode(text) == ([1] if doubled else []) + ids
    assert theirs.encode(text, add_special_tokens=False) == saved.encode(
      text, add_special_tokens=False
    )
  assert (back.bos_id, back.eos_id, back.pad_id) == (1, 2, 2)
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
  assert back.chat_template == theirs.chat_template == metadata["tokenizer.chat_template"]


def test_lengths_fixed_in_tokenizer_json_cut_and_fill_nothing(ours, tmp_path):
  ours.save(tmp_path)
  fields = json.loads((tmp_path / "tokenizer.json").read_text())
  fields["truncation"] = {
    "direction": "Right",
    "max_length": 2,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
  assert len(tokenizer.from_folder(tmp_path).encode("a b c d")) == 4


def test_a_folder_without_a_tokenizer_is_refused_with_a_remedy(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file; .*save_pretrained"):
    tokenizer.from_folder(tmp_path)


def test_damaged_tokenizer_files_are_refused_by_name(ours, tmp_path):
  ours.save(tmp_path)
  settings_path, path = tmp_path / "tokenizer_config.json", tmp_path / "tokenizer.json"
  good = settings_path.read_text()
  settings_path.write_text(good.replace("<|im_end|>", "<|nowhere|>", 1))
  with pytest.raises(ValueError, match=r"eos_token '<\|nowhere\|>' is not in tokenizer.json"):
    tokenizer.from_folder(tmp_path)
  settings_path.write_text(good[:-20])
  with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON"):
    tokenizer.from_folder(tmp_path)
  settings_path.write_text(good)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
    tokenizer.from_folder(tmp_path)


PIECES = [
  [("<|im_start|>user\n", True), ("What does <|im_end|> mean?", False), ("<|im_end|>\n", True)],
  [
    ("é<|im_end|>", False),
    ("<|im_end|>", True),
    (" 日本 <|im_start|>", False),
    ("", True),
    ("x", True),
  ],
  [("one text", True)],
  [],
]


@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_are_one_text_whose_tokens_lie_where_it_says(ours, pieces):
  ids, offsets = ours.encode_pieces(pieces)
  text = "".join(piece for piece, _ in pieces)
  assert ours.decode(ids, skip_special_tokens=False) == text
  special = {number: token for token, number in ours.special_tokens.items()}
  meant = [
    token for piece, is_meant in pieces if is_meant for token in special.values() if token in piece
  ]
  assert [special[n] for n in ids if n in special] == meant
  for n, (start, end) in zip(ids, offsets, strict=True):
    if n in special:
      assert text[start:end] == special[n]
  # Every character lies in a token, and the tokens follow each other.
  assert {n for start, end in offsets for n in range(start, end)} == set(range(len(text)))
  assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


def test_special_tokens_are_those_of_transformers(ours, peer):
  expected = {str(x): n for n, x in peer.added_tokens_decoder.items() if x.special}
  assert ours.special_tokens == expected and len(expected) > 10
  assert ours.named_tokens == {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
  }
