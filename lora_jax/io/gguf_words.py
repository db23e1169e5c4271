"""Converts tokenizers between GGUF files and `tokenizers`.

This module handles byte-level BPE: the format has tokens, their types and the merges, and names the
pre-tokenizer (`gguf_splits`). SentencePiece tokenizers are in `gguf_pieces`. Special tokens and
chat templates of both are here too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from lora_jax.checks import shown
from lora_jax.io import gguf_pieces, gguf_splits, panics
from lora_jax.io.gguf_pieces import CONTROL, NORMAL, UNUSED, USER_DEFINED
from lora_jax.io.tokenizer_files import Special

# By kind of SentencePiece: the defaults for adding a token before and after a text.
_AROUND_PIECES = {"llama": (True, False), "t5": (False, True)}
_REMEDY = "export the model as a folder, with its tokenizer.json"
# The keys of end tokens, in the order in which a tokenizer's stop tokens are assigned to them.
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_IDS = ("bos_token_id", *_STOPS, "padding_token_id")
_TEMPLATE = "tokenizer.chat_template"


def read_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """Returns the tokenizer that the metadata of a GGUF file describes.

  Raises ValueError for another kind of tokenizer, an unknown pre-tokenizer, or an inconsistent
  vocabulary.
  """
  kind = metadata.get("tokenizer.ggml.model")
  if kind != "gpt2" and kind not in (*_AROUND_PIECES,):
    raise ValueError(
      f"tokenizer.ggml.model {shown(kind)} is not supported; supported: 'gpt2' (byte-level BPE), "
      "'llama' and 't5' (SentencePiece's BPE and unigram). Load the same model from a folder or "
      "from hf://, with its tokenizer.json"
    )
  split = gguf_splits.named(metadata.get("tokenizer.ggml.pre")) if kind == "gpt2" else None
  tokens = _list(metadata, "tokenizer.ggml.tokens", str)
  types = _list(metadata, "tokenizer.ggml.token_type", int)
  if len(types) != len(tokens):
    raise ValueError(f"the GGUF metadata has {len(tokens)} tokens but {len(types)} token types")
  ids = {token: i for i, token in enumerate(tokens)}
  if len(ids) != len(tokens):
    twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
    raise ValueError(f"tokenizer.ggml.tokens hold {shown(twice)} twice")
  typed = list(zip(tokens, types, strict=True))
  if split is not None:
    backend = _byte_level(metadata, ids, split)
    add_bos, add_eos = split.add_bos, False
  else:
    backend = gguf_pieces.read(kind, metadata, tokens, types)
    add_bos, add_eos = _AROUND_PIECES[kind]
    typed = [(token, type_) for token, type_ in typed if gguf_pieces.is_added(token, type_)]
  backend.add_special_tokens(
    [AddedToken(t, normalized=False) for t, k in typed if k in (CONTROL, gguf_pieces.UNKNOWN)]
  )
  backend.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == USER_DEFINED])

  special = read_special(metadata)
  around = {}
  for name, token_id, default in (
    ("bos", special.bos_id, add_bos),
    ("eos", special.eos_id, add_eos),
  ):
    adds = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    if not isinstance(adds, bool):
      raise ValueError(f"tokenizer.ggml.add_{name}_token must be a bool, not {shown(adds)}")
    if not adds:
      continue
    if token_id is None:
      raise ValueError(
        f"the GGUF metadata wants a {name.upper()} token and lacks tokenizer.ggml.{name}_token_id"
      )
    around[name] = (tokens[token_id], token_id)
  if around:
    before, after = ([around[name][0]] if name in around else [] for name in ("bos", "eos"))
    backend.post_processor = processors.TemplateProcessing(
      single=[*before, "$A", *after],
      pair=[*before, "$A", "$B", *after],
      special_tokens=list(around.values()),
    )
  return backend


def _byte_level(
  metadata: Mapping[str, Any], ids: dict[str, int], split: gguf_splits.Split
) -> tokenizers.Tokenizer:
  """Byte-level BPE, without its added tokens."""
  merges = _list(metadata, "tokenizer.ggml.merges", str)
  unfit = "tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"
  pairs = [tuple(merge.split(" ", 1)) for merge in merges]
  if odd := next((pair for pair in pairs if len(pair) != 2), None):
    raise ValueError(f"{unfit}: {shown(odd[0])} is no pair of tokens")
  with panics.as_value_errors(unfit):
    model = models.BPE(vocab=ids, merges=pairs, ignore_merges=split.ignore_merges)
  backend = tokenizers.Tokenizer(model)
  if split.normalizer is not None:
    backend.normalizer = split.normalizer
  backend.pre_tokenizer = split.pre_tokenizer
  backend.decoder = decoders.ByteLevel()
  return backend


def read_special(metadata: Mapping[str, Any]) -> Special:
  """Returns the tokens that begin, end and pad a text.

  A text ends with EOS, and with the tokens that end a turn (EOT) or a message (EOM).

  Raises ValueError for an id without a token.
  """
  size = len(_list(metadata, "tokenizer.ggml.tokens", str))
  ids = {name: _token_id(metadata, f"tokenizer.ggml.{name}", size) for name in _IDS}
  stops = [found for name in _STOPS if (found := ids[name]) is not None]
  return Special(
    bos_id=ids["bos_token_id"],
    eos_id=ids["eos_token_id"],
    pad_id=ids["padding_token_id"],
    stop_ids=tuple(dict.fromkeys(stops)),
  )


def read_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
  """Returns the chat templates by their names; the one without a name is "default".

  Raises ValueError for a template that is not text.
  """
  key = "tokenizer.chat_templates"
  names = _list(metadata, key, str) if key in metadata else []
  found = {"default": metadata.get(_TEMPLATE)} | {
    name: metadata.get(f"{_TEMPLATE}.{name}") for name in names
  }
  found = {name: template for name, template in found.items() if template is not None}
  for name, template in found.items():
    if not isinstance(template, str):
      raise ValueError(f"the chat template {shown(name)} is {shown(template)} and no text")
  return found


def describe_vocabulary(fields: Mapping[str, Any], size: int) -> dict[str, Any]:
  """Returns the metadata of a vocabulary, the inverse of `read_tokenizer`.

  fields: of a `tokenizer.json`.
  size: the number of tokens of the model; ids without a token are written as unused.

  Raises ValueError for a tokenizer of another kind, or with steps that the format cannot express.
  """
  _check_words(fields)
  if fields["model"]["type"] == "Unigram" or fields["model"].get("byte_fallback"):
    return gguf_pieces.describe(fields, size, _REMEDY)
  split_name = gguf_splits.name_of(fields, _REMEDY)
  tokens = [f"[PAD{i}]" for i in range(size)]
  types = [UNUSED] * size
  for token, token_id in fields["model"]["vocab"].items():
    tokens[token_id], types[token_id] = token, NORMAL
  for added in fields["added_tokens"]:
    tokens[added["id"]] = added["content"]
    types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": split_name,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.merges": [" ".join(pair) for pair in fields["model"]["merges"]],
    "tokenizer.ggml.add_space_prefix": False,
  }


def describe_special(
  special: Special, before: Sequence[int], after: Sequence[int]
) -> dict[str, Any]:
  """Returns the metadata of the tokens that begin, end and pad a text.

  before, after: the tokens that the tokenizer adds around a text.

  Raises ValueError for tokens around a text other than BOS and EOS, and for more end tokens than
  the format has keys.
  """
  if before not in ([], [special.bos_id]) or after not in ([], [special.eos_id]):
    raise ValueError(
      f"the tokenizer puts tokens around a text, {before} before it and {after} after it, which "
      f"are not the BOS {special.bos_id} and the EOS {special.eos_id}; a GGUF file has no words "
      f"for that; {_REMEDY}"
    )
  if len(special.stop_ids) > len(_STOPS):
    raise ValueError(
      f"texts end with each of the tokens {list(special.stop_ids)}, and a GGUF file has words for "
      f"{len(_STOPS)}; {_REMEDY}"
    )
  ids = dict(zip(_STOPS, special.stop_ids, strict=False))
  ids |= {"bos_token_id": special.bos_id, "padding_token_id": special.pad_id}
  around = {"tokenizer.ggml.add_bos_token": bool(before)}
  if after:
    around["tokenizer.ggml.add_eos_token"] = True
  return around | {f"tokenizer.ggml.{name}": x for name, x in ids.items() if x is not None}


def describe_templates(templates: Mapping[str, str]) -> dict[str, Any]:
  """Returns the metadata of chat templates, the inverse of `read_templates`."""
  named = {name: template for name, template in templates.items() if name != "default"}
  metadata: dict[str, Any] = {f"{_TEMPLATE}.{name}": x for name, x in named.items()}
  if named:
    metadata["tokenizer.chat_templates"] = list(named)
  if "default" in templates:
    metadata[_TEMPLATE] = templates["default"]
  return metadata


def _check_words(fields: Mapping[str, Any]) -> None:
  """Raises ValueError for settings of a `tokenizer.json` that a GGUF file cannot express."""
  model, decoder = fields["model"], fields["decoder"] or {}
  is_known = (
    model["type"] == "Unigram"
    or (model["type"] == "BPE" and bool(model.get("byte_fallback")))
    or (model["type"], decoder.get("type")) == ("BPE", "ByteLevel")
  )
  problems = {
    f"is a {model['type']}, neither byte-level BPE nor one of SentencePiece's": not is_known,
    "drops merges, or marks the parts of words": any(
      model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ),
    "takes in the spaces next to an added token, or whole words only": any(
      added["lstrip"] or added["rstrip"] or added["single_word"] for added in fields["added_tokens"]
    ),
  }
  for problem, found in problems.items():
    if found:
      raise ValueError(f"the tokenizer {problem}, for which a GGUF file has no words; {_REMEDY}")


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
  values = metadata.get(key)
  if not isinstance(values, list) or not all(type(value) is kind for value in values):
    raise ValueError(f"{key} must be a list of {kind.__name__}")
  return values


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
  value = metadata.get(key)
  if value is not None and not (type(value) is int and 0 <= value < size):
    raise ValueError(f"{key}={shown(value)} is not one of the {size} tokens")
  return value
