"""BERT's tokenizer from a `vocab.txt`, for folders without a `tokenizer.json`.

    from_vocabulary("bert-base-uncased")        # a tokenizers.Tokenizer

The file has a token on each line, whose number from 0 is its id; `tokenizer_config.json` says
whether text is lowered, as `transformers`' BertTokenizer reads it (Devlin et al. 2019, section 4;
Wu et al. 2016, section 4.1).
"""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.checks import shown
from lora_jax.io import files, json_files

VOCABULARY = "vocab.txt"
_SETTINGS = "tokenizer_config.json"
_MAX_BYTES = 40 << 20
_UNKNOWN, _BEGIN, _END = "[UNK]", "[CLS]", "[SEP]"
_SPECIAL = ("[PAD]", _UNKNOWN, _BEGIN, _END, "[MASK]")
# Of a tokenizer_config.json, as BertTokenizer has them where they are absent.
_DEFAULTS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


def from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a folder's `vocab.txt`.

  Raises:
    ValueError: for text that is not UTF-8, a token that stands twice, a vocabulary without a token
      that BERT needs, and a setting that is not true, false or null.
  """
  path = folder / VOCABULARY
  try:
    lines = files.read_bytes(path, _MAX_BYTES).decode().split("\n")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: byte {error.start} is not UTF-8; write it in that") from None
  tokens = [line.rstrip("\r") for line in (lines[:-1] if not lines[-1] else lines)]
  ids = {token: number for number, token in enumerate(tokens)}
  if len(ids) < len(tokens):
    twice = next(token for number, token in enumerate(tokens) if ids[token] != number)
    raise ValueError(f"{path}: the token {shown(twice)} stands there twice")
  if missing := [token for token in (_UNKNOWN, _BEGIN, _END) if token not in ids]:
    raise ValueError(f"{path}: lacks the token {missing[0]}, and is no vocabulary of BERT's")
  found = json_files.read_json(folder / _SETTINGS) if (folder / _SETTINGS).exists() else {}
  settings = {name: found.get(name, default) for name, default in _DEFAULTS.items()}
  for name, value in settings.items():
    if value is not None and type(value) is not bool:
      raise ValueError(f"{folder / _SETTINGS}: {name} {shown(value)} is not true, false or null")
  words = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=_UNKNOWN))
  words.normalizer = normalizers.BertNormalizer(
    lowercase=bool(settings["do_lower_case"]),
    strip_accents=settings["strip_accents"],
    handle_chinese_chars=bool(settings["tokenize_chinese_chars"]),
  )
  words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  words.decoder = decoders.WordPiece(prefix="##")
  words.post_processor = processors.TemplateProcessing(
    single=f"{_BEGIN} $A {_END}",
    pair=f"{_BEGIN} $A {_END} $B:1 {_END}:1",
    special_tokens=[(token, ids[token]) for token in (_BEGIN, _END)],
  )
  words.add_special_tokens([token for token in _SPECIAL if token in ids])
  return words
