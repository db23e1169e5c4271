"""Tokenizers from the metadata of GGUF files, against transformers and llama.cpp.

Both read the same file: a page of text in several scripts, with code, runs of spaces and special
tokens, must have the ids that it has here.
"""

import base64
import functools
import json
import urllib.request
import zlib

import gguf
import gguf_peers
import numpy as np
import pytest
import tokenizers
from peers import transformers
from tokenizers import models, pre_tokenizers, trainers

from lora_jax.io import gguf_pieces, gguf_splits, gguf_words, tokenizer

PAGE = [
  "",
  "Hello world, it's they'll we've I'D DON'T O'Neill'S",
  "1 22 333 4444, 3.14159; 1,000,000 and x2y3 \u0663\u0664 ½",
  "tabs\tand\nnew\n\nlines\r\n  and   runs    of spaces     \n\t ",
  "Größe, naïve CAFÉ — “quotes” … § ° ± McDonald iPhone XMLHttp ABC",
  "日本語のテキスト。 русский текст, ελληνικά, עברית, हिन्दी, ไทย",
  "emoji 😀👩‍👩‍👧 ok \u200b zero width",
  "def f(x):\n    return x ** 2  # a/b//c\n\n\nclass A:\n\tpass\n",
  "<|user|>hi<|end|>\n<|user|> no <|tool|>x <|end |> <| user|>",
  "Review: one of the worst films of the year.\nSentiment: ../path/to",
  "\x07\x1b\ufeff $x^2 + y_1 <= |z| ~ `code` #tag @name {a: [1]}",
  "a" + " " * 37 + "b" + "\n" * 9 + "=" * 12,
  "  two spaces before",
  " <|user|> one",
  "\n\n  x ",
  "all quotable words",
]
_SPECIAL = {"<|end|>": 3, "<|user|>": 3, "<|tool|>": 4}
# What SentencePiece makes of four rules: U+FB01 is "fi", a tab and a line feed are spaces, and
# U+2126 (ohm) is U+03C9 (omega).
_CHARACTERS = zlib.decompress(
  base64.b85decode(
    "c-ke?Rj?3L5C-7G9e4l%0VM=!>5%T0ZV)LIX(Xk)xzgR864If9DBUO$N+Zn>LwCb>VQ0SCJ@dcp%+3kXLkOuth#5"
    "14STRCW^^cqx5f;S>!L$GJ0uf<=A;SEDFczW^n-7UgeB$vD2}sDtBqkA`kc4C;B{`pxk`$zVzd}e$8q)C@8AwkiG"
    "LnVNWFsq|lbxL8AUC<lOCIu*kAf7SFoh^e5sFicl9b>JN>PT=l%p&aC{HCSQiaM?qbfD1&X?5WD{4`P+SH>iUsIo"
    "N`G)UkKqDH`gvK<ZDJ^JDOTMQyt!PUdexMy4Xiq0P(uK}+qboh=PA_`Whu-v~F9V{E&L9TzBasYYFvA$i2!=C?k&"
    "Iz9;~2{X#xseDOkpz9n92;MGmDwbVK(!a%L3-Jke^u0B7SBG%UH?^ma~eLtYJ0lSj(^c!g_w=cQ)_`8`;F4Y+*Co"
    "*vbyJvx}YVVK@8O%U|s00Dp6ke>lt`{^bZq`H$lq<0L0I%_;up4Cgq@1<rGci(KI{SGkiTTDY!Xi^`Tn3peyz+>F"
    "Y&%{}h&fcre+Ay0VBGoJE-=e*)2Z+QLg?=^234h{=%0ZKxLf&"
  )
)
_AROUND = {
  "tokenizer.ggml.bos_token_id": 3,
  "tokenizer.ggml.eos_token_id": 1,
  "tokenizer.ggml.add_bos_token": False,
  "tokenizer.ggml.add_eos_token": False,
}


@functools.cache
def trained_on_bytes():
  """Merges that reach over every place where one of the ways to split may cut."""
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
  words.train_from_iterator(
    [text for text in PAGE if "<|" not in text and "quot" not in text] * 3, trainer
  )
  return json.loads(words.to_str())["model"]


def byte_level(pre):
  model = trained_on_bytes()
  tokens = [*_SPECIAL, *model["vocab"], "Ġquotable"]  # the last is made by no merge
  return _AROUND | {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [_SPECIAL.get(token, 1) for token in tokens],
    "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
  }


def pieces(kind, *, runs=False, **flags):
  """Pieces of the page: BPE with bytes as a refuge, or unigram; `runs` of spaces among them."""
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
  trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
  text = [line.replace(" ", "▁") for line in PAGE if "日" not in line and "<|" not in line]
  words.train_from_iterator(text * 3, trainer)
  found = [token for token, _ in sorted(words.get_vocab().items(), key=lambda x: x[1])]
  normal = [x for x in found if x == "▁" or "▁" not in x[1:]]
  types = {"<pad>": 3, "</s>": 3, "<unk>": 2} | _SPECIAL
  if kind == "llama":
    types |= {f"<0x{i:02X}>": 6 for i in range(256)} | {" " * n: 4 for n in range(2, 17) if runs}
  else:  # a table of characters, or what transformers does to words, has made them spaces
    normal = [x for x in normal if x == x.strip()]
  types |= dict.fromkeys(normal, 1)
  scores = dict.fromkeys(types, 0.0)
  for n, token in enumerate(normal):
    scores[token] = -float(n) if kind == "llama" else len(token) - 20.0 - n % 7 / 2
  return _AROUND | {
    "tokenizer.ggml.model": kind,
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": [*types],
    "tokenizer.ggml.token_type": [*types.values()],
    "tokenizer.ggml.scores": [scores[token] for token in types],
    "tokenizer.ggml.unknown_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    **{f"tokenizer.ggml.{name}": value for name, value in flags.items()},
  }


def write(path, metadata, architecture, tensors=()):
  writer = gguf.GGUFWriter(path, architecture)
  adders = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
    bytes: writer.add_array,
  }
  for key, value in metadata.items():
    adders[type(value)](key, value)
  for name, tensor in dict(tensors).items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def by_transformers(folder, metadata, architecture="llama"):
  write(folder / "words.gguf", metadata, architecture)
  return transformers.PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="words.gguf")


def by_llama_cpp(folder, metadata):
  """Ids by text, of llama.cpp's server."""
  size = {
    "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
    "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16,
  }  # fmt: skip
  model = {f"llama.{name}": value for name, value in size.items()}
  model["llama.attention.layer_norm_rms_epsilon"] = 1e-5
  shapes = {
    "token_embd": (len(metadata["tokenizer.ggml.tokens"]), 32), "output_norm": (32,),
    "blk.0.attn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (32, 32), "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32),
  }  # fmt: skip
  tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
  write(folder / "model.gguf", model | metadata, "llama", tensors)
  server = gguf_peers.server(folder / "model.gguf")

  def ids(text):
    asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    headers = {"Content-Type": "application/json"}
    address = f"{server.listening_address}/tokenize"
    with urllib.request.urlopen(urllib.request.Request(address, asked, headers)) as answer:
      return json.load(answer)["tokens"]

  return ids


def read(metadata, architecture="llama"):
  characters = metadata.get("tokenizer.ggml.precompiled_charsmap")
  if characters is not None:
    metadata = metadata | {"tokenizer.ggml.precompiled_charsmap": list(characters)}
  return tokenizer.from_gguf(metadata | {"general.architecture": architecture})


def assert_same_ids(ours, theirs, texts=PAGE):
  for text in texts:
    ids = theirs(text)
    assert ours.encode(text) == ids, repr(text)


# transformers knows no way of these names, and has no whole tokens that no merge makes.
OF_LLAMA_CPP = ["smollm", "default", "llama-bpe", "dbrx"]
OF_TRANSFORMERS = ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"]


@pytest.mark.parametrize("pre", OF_TRANSFORMERS)
def test_bytes_have_the_ids_of_transformers(tmp_path, pre):
  metadata = byte_level(pre)
  whole = gguf_splits.SPLITS[pre].ignore_merges
  texts = [text for text in PAGE if not (whole and "quotable" in text)]
  assert_same_ids(read(metadata), by_transformers(tmp_path, metadata).encode, texts)


@pytest.mark.parametrize("pre", OF_LLAMA_CPP)
def test_bytes_have_the_ids_of_llama_cpp(tmp_path, pre):
  metadata = byte_level(pre)
  assert_same_ids(read(metadata), by_llama_cpp(tmp_path, metadata))


def test_each_way_to_split_is_held_to_a_peer():
  held = [gguf_splits.SPLITS[name] for name in {*OF_TRANSFORMERS, *OF_LLAMA_CPP}]
  assert all(split in held for split in gguf_splits.SPLITS.values())


def test_qwen_composes_characters_as_its_own_tokenizer_does():
  metadata = byte_level("qwen2")
  tokens, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
  vocabulary = {token: i for i, token in enumerate(tokens)}
  peer = transformers.Qwen2Tokenizer(vocabulary, [tuple(x.split(" ")) for x in merges])
  ours = read(metadata)
  for text in ["e\u0301t\u00e9", "A\u030a \u1100\u1161 \u212b", *PAGE[1:8]]:
    assert ours.encode(text) == peer.encode(text)
  assert ours.encode("e\u0301") == ours.encode("é") != read(byte_level("dbrx")).encode("e\u0301")


@pytest.mark.parametrize("pre", ["qwen2", "tekken", "smollm"])
def test_a_way_to_split_is_written_by_its_name(pre):
  metadata = byte_level(pre)
  written = tokenizer.to_gguf(read(metadata), len(metadata["tokenizer.ggml.tokens"]))
  assert {key: metadata[key] for key in written} | {
    "tokenizer.ggml.add_eos_token": False
  } == metadata


@pytest.mark.parametrize(
  ("flags", "architecture"),
  [({"add_space_prefix": False, "runs": True}, "gemma3"), ({}, "llama"), ({}, "phi3")],
  ids=["Gemma", "Llama", "Phi-3"],
)
def test_pieces_with_bytes_have_the_ids_and_the_text_of_transformers(tmp_path, flags, architecture):
  metadata = pieces("llama", **flags)
  ours = read(metadata, architecture)
  peer = by_transformers(tmp_path, metadata, architecture)
  assert_same_ids(ours, peer.encode)
  for text in PAGE:
    ids = ours.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == peer.decode(ids)
    for cut in range(1, len(ids)):
      start, rest = ours.decode(ids[:cut]), ours.decode(ids[cut:], after=ids[:cut])
      if "\ufffd" not in start:  # a character whose bytes are not all there yet
        assert start + rest == ours.decode(ids)


@pytest.mark.parametrize(
  "flags",
  [{}, {"add_space_prefix": False, "runs": True}, {"add_bos_token": True}],
  ids=lambda flags: "+".join(flags),
)
def test_pieces_with_bytes_have_the_ids_of_llama_cpp(tmp_path, flags):
  metadata = pieces("llama", **flags)
  texts = [text for text in PAGE if " " * 17 not in text]  # it takes the longest run first
  ours = read(metadata, "phi3")  # whose spaces are llama.cpp's for every model
  assert_same_ids(ours, by_llama_cpp(tmp_path, metadata), texts)


BOTH = {"add_space_prefix": True, "remove_extra_whitespaces": True}


def test_unigram_pieces_have_the_ids_of_transformers(tmp_path):
  metadata = pieces("t5", **BOTH)
  assert_same_ids(read(metadata), by_transformers(tmp_path, metadata).encode)


@pytest.mark.parametrize(
  "flags",
  [BOTH, {"add_space_prefix": True}, {"add_bos_token": True}],
  ids=lambda flags: "+".join(flags),
)
def test_unigram_pieces_have_the_ids_of_llama_cpp(tmp_path, flags):
  flags = {"add_space_prefix": False, "remove_extra_whitespaces": False} | flags
  metadata = pieces("t5", precompiled_charsmap=_CHARACTERS, **flags)
  # It takes a carriage return for a character, and of what is a space alone it makes one piece.
  texts = [text for text in PAGE if "\r" not in text]
  if flags["add_space_prefix"] and not flags["remove_extra_whitespaces"]:
    texts = [text for text in texts if "<|" not in text]
  assert_same_ids(read(metadata), by_llama_cpp(tmp_path, metadata), [*texts, "ﬁlm \u2126 ﬁ\tﬁ"])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_spaces_around_a_text_and_between_words_go_where_a_file_says_so(kind):
  def encode(text, **flags):
    return read(pieces(kind, **flags)).encode(text)

  fewer = {"remove_extra_whitespaces": True, "add_space_prefix": False}
  assert encode("  the   year ", **fewer) == encode("the year", **fewer)
  assert encode("the year", **fewer) == encode("the year", add_space_prefix=False)
  assert encode("the year", **BOTH) == encode(
    " the year", **fewer | {"remove_extra_whitespaces": False}
  )
  kept = {"remove_extra_whitespaces": False, "add_space_prefix": False}
  assert encode("the  year", **kept) != encode("the year", **kept)


def test_what_is_put_around_a_text_is_what_the_file_says(tmp_path):
  for n, (kind, flags) in enumerate(
    [("llama", {}), ("t5", {}), ("llama", {"add_eos_token": True, "add_bos_token": False})]
  ):
    metadata = pieces(kind, **flags)
    for flag in ("add_bos_token", "add_eos_token"):
      if flag not in flags:  # llama.cpp's own: BOS before "llama", EOS after "t5"
        del metadata[f"tokenizer.ggml.{flag}"]
    ours = read(metadata)
    before, after = ([3], []) if (kind, flags) == ("llama", {}) else ([], [1])
    ours.save(tmp_path / str(n))
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / str(n))
    ids = ours.encode("the year", add_special_tokens=False)
    assert peer.encode("the year") == [*before, *ids, *after]
    assert ours.encode("the year") == [*before, *ids]  # which may be continued


@pytest.mark.parametrize(
  ("kind", "flags"),
  [
    ("llama", {"add_space_prefix": False, "runs": True}),
    ("llama", {}),
    ("llama", {"remove_extra_whitespaces": True}),
    ("t5", BOTH),
    ("t5", {"add_space_prefix": False, "precompiled_charsmap": _CHARACTERS}),
  ],
  ids=["Gemma", "Llama", "fewer spaces", "T5", "characters"],
)
def test_pieces_are_written_and_read_back(kind, flags):
  ours = read(pieces(kind, **flags))
  written = tokenizer.to_gguf(ours, ours.vocab_size + 3)
  assert written["tokenizer.ggml.token_type"][-3:] == [5] * 3
  back = read(written)
  assert_same_ids(back, ours.encode)
  assert [back.decode(ours.encode(text)) for text in PAGE] == [
    ours.decode(ours.encode(text)) for text in PAGE
  ]
  assert (back.bos_id, back.eos_id, back.pad_id) == (3, 1, 0)


def test_a_rank_of_pairs_that_scores_of_tokens_cannot_say_is_refused():
  fields = read(pieces("llama")).describe()
  size, merges = len(fields["model"]["vocab"]), fields["model"]["merges"]
  twice = next(x + y for x, y in merges if sum(x + y == a + b for a, b in merges) > 1)
  others = [pair for pair in merges if pair != next(x for x in merges if "".join(x) == twice)]
  with pytest.raises(ValueError, match="joins some pairs of tokens and not others"):
    gguf_words.describe_vocabulary(fields | {"model": fields["model"] | {"merges": others}}, size)
  other = fields | {"normalizer": {"type": "NFKC"}}
  with pytest.raises(ValueError, match="treats spaces, or characters, in a way of its own"):
    gguf_words.describe_vocabulary(other, size)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"scores": None}, r"scores must be a list of \d+ numbers"),
    ({"scores": [float("nan")]}, "scores must be a list of"),
    ({"add_space_prefix": 1}, "add_space_prefix must be a bool, not 1"),
    ({"remove_extra_whitespaces": "no"}, "remove_extra_whitespaces must be a bool, not 'no'"),
    ({"unknown_token_id": 9999}, r"unknown_token_id=9999 is not one of the \d+ tokens"),
    ({"unknown_token_id": True}, "unknown_token_id=True is not one of"),
    ({"model": "bert"}, "model 'bert' is not supported; supported: 'gpt2' .*'llama' and 't5'"),
    ({"model": ["llama"]}, "is not supported"),
  ],
)
def test_pieces_that_cannot_be_are_refused(change, words):
  metadata = pieces("llama") | {f"tokenizer.ggml.{key}": x for key, x in change.items()}
  with pytest.raises(ValueError, match=words):
    read(metadata)


def test_scores_tables_and_tokens_that_would_take_all_memory_are_refused():
  metadata = pieces("t5", **BOTH)
  metadata["tokenizer.ggml.scores"] = [float("inf")] * len(metadata["tokenizer.ggml.scores"])
  with pytest.raises(ValueError, match="scores must be finite numbers"):
    read(metadata)
  for table in ([300], "abc", [1.0], [0] * 7, [255] * 40, [0] * 4 + [65] * 257):
    with pytest.raises(ValueError, match="precompiled_charsmap"):
      tokenizer.from_gguf(pieces("t5", **BOTH) | {"tokenizer.ggml.precompiled_charsmap": table})
  metadata = pieces("llama")
  metadata["tokenizer.ggml.tokens"][-1] = "a" * 257
  with pytest.raises(ValueError, match="has 257 characters, 256 are allowed"):
    read(metadata)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gguf_pieces, "_MOST_MERGES", 100)
    with pytest.raises(ValueError, match="over 100 pairs of them are tokens"):
      read(pieces("llama"))
