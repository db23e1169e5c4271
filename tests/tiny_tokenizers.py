"""Tiny tokenizers of each kind that models have, and a random Llama in a folder with one."""

import json

import tokenizers
from peers import torch, transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_CORPUS = [
  "a joy of a film . positive review",
  "the worst film ever , negative review",
  "Review: good\nSentiment: positive",
  "Sentiment: negative Review: bad [x]",
  "hello world! how are you today? 1 2 3  two  spaces",
] * 30
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level(before=("<s>",), after=()) -> tokenizers.Tokenizer:
  """Byte-level BPE, as GPT-2's and Llama 3's; puts special tokens around a text."""
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = decoders.ByteLevel()
  # With "!" at id 0, as GPT-2 and Llama 3 have it: an id 0 that stands for no token is seen.
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
  words.train_from_iterator(_CORPUS, trainer)
  words.add_special_tokens(["<s>", "</s>", "<|eot|>"])
  assert words.token_to_id("!") == 0
  return _put_around(words, before, after)


def sentencepiece_bpe() -> tokenizers.Tokenizer:
  """As Llama 2's and TinyLlama's: a space before the text, no pre-tokenizer, bytes as a refuge."""
  words = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
  special = ["<unk>", "<s>", "</s>", *_BYTES]
  trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
  words.train_from_iterator(_CORPUS, trainer)
  words = _changed(words, pre_tokenizer=None, special=special[:3])
  strip = [decoders.Strip(" ", 1, 0)]
  words.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  return _put_around(words, ["<s>"])


def metaspace() -> tokenizers.Tokenizer:
  """As transformers 5 writes Llama 2's and Mistral's: a space before the first word alone."""
  words = sentencepiece_bpe()
  fields = json.loads(words.to_str())
  space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
  other = tokenizers.Tokenizer(models.BPE())
  other.pre_tokenizer = space
  fields["normalizer"] = None
  fields["pre_tokenizer"] = json.loads(other.to_str())["pre_tokenizer"]
  return tokenizers.Tokenizer.from_str(json.dumps(fields))


def unigram() -> tokenizers.Tokenizer:
  """As T5's: unigram pieces, a space before every word."""
  special = ["<unk>", "<s>", "</s>"]
  whole = ["▁positive", "▁negative", "▁good", "pos", "itive", "nega", "tive", "Sentiment:", "▁the"]
  single = sorted(set("".join(_CORPUS)) - set(" \n")) + ["▁", "\n"]
  scores = dict.fromkeys(single, -8.0) | dict.fromkeys(whole, -3.0) | dict.fromkeys(special, 0.0)
  pieces = [*special, *whole, *single]
  words = tokenizers.Tokenizer(models.Unigram([(x, scores[x]) for x in pieces], unk_id=0))
  words.add_special_tokens(special)
  words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
  words.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
  return _put_around(words, ["<s>"])


def gemma() -> tokenizers.Tokenizer:
  """As Gemma's: spaces are characters, and nothing comes before the text."""
  fields = json.loads(sentencepiece_bpe().to_str())
  fields["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
  words = tokenizers.Tokenizer.from_str(json.dumps(fields))
  words.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  return words


KINDS = {make.__name__: make for make in (byte_level, sentencepiece_bpe, metaspace, unigram, gemma)}


def write(
  folder, words=None, settings=SETTINGS, dtype=torch.float32, config=(), generation=None, std=None
):
  """Writes a random Llama's folder, and returns it; None for a file that is not to be there."""
  words = words or byte_level()
  torch.manual_seed(0)
  fields = {
    "vocab_size": words.get_vocab_size(),
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
  }
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).to(dtype)
  for parameter in model.parameters() if std else ():
    torch.nn.init.normal_(parameter, std=std)
  model.save_pretrained(folder)
  words.save(str(folder / "tokenizer.json"))
  described = json.loads((folder / "config.json").read_text())
  described = {k: v for k, v in described.items() if k not in IDS} | dict(config)
  (folder / "config.json").write_text(json.dumps(described))
  (folder / "generation_config.json").unlink()
  for name, content in (("tokenizer_config", settings), ("generation_config", generation)):
    if content is not None:
      (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def _changed(words, *, pre_tokenizer, special):
  fields = json.loads(words.to_str())
  fields["pre_tokenizer"] = pre_tokenizer
  fields["added_tokens"] = [x for x in fields["added_tokens"] if x["content"] in special]
  return tokenizers.Tokenizer.from_str(json.dumps(fields))


def _put_around(words, before, after=()):
  if before or after:
    words.post_processor = processors.TemplateProcessing(
      single=[*before, "$A", *after],
      pair=[*before, "$A", *after, "$B"],
      special_tokens=[(token, words.token_to_id(token)) for token in (*before, *after)],
    )
  return words
