"""Tokenizers, from `tokenizer.json` or from the vocabulary that a GGUF file carries.

tokenizer = from_folder("SmolLM2-135M-Instruct")
tokenizer.encode("Hello world")       # [19556, 905]
tokenizer.decode([19556, 905])        # "Hello world"
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of the GGUF format

_IDS_GGUF = ("bos_token_id", "eos_token_id", "padding_token_id")
_SPECIAL = ("bos_token", "eos_token", "pad_token")
_REMEDY = "export the model as a folder, with its tokenizer.json"

# What `tokenizer.json` of the Llama 3 models splits text by.
_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(NamedTuple):
  """How text is cut before the merges, and the habits that go with it.

  ignore_merges: a piece which is a token as it stands is not cut at all.
  add_bos: whether a file that does not say so wants the beginning-of-sequence token.
  """

  pre_tokenizer: pre_tokenizers.PreTokenizer
  ignore_merges: bool
  add_bos: bool


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_SPLITS = {
  "gpt-2": _Split(_byte_level(), ignore_merges=False, add_bos=False),
  "smollm": _Split(
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    ignore_merges=False,
    add_bos=False,
  ),
  "llama-bpe": _Split(
    pre_tokenizers.Sequence(
      [pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"), _byte_level(use_regex=False)]
    ),
    ignore_merges=True,
    add_bos=True,
  ),
}


class Tokenizer:
  """Text to token ids and back.

  backend: the `tokenizers` object that does the work.
  bos_id, eos_id: the tokens that begin and end a text, or None where the model has none.
  pad_id: the token that fills up a row; `eos_id` or 0 where the model names none.
  chat_template: the Jinja template of a conversation, kept for `save`.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    chat_template: str | None = None,
  ):
    self._backend = backend
    self.bos_id = bos_id
    self.eos_id = eos_id
    self.pad_id = pad_id if pad_id is not None else eos_id or 0
    self.chat_template = chat_template

  @property
  def vocabulary(self) -> dict[str, int]:
    """The id of every token, by the token as the model's files spell it."""
    return self._backend.get_vocab(with_added_tokens=True)

  @property
  def vocab_size(self) -> int:
    """The largest token id plus one."""
    return max(self.vocabulary.values()) + 1

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns the ids of `text`; special tokens written out in it count as one token each.

    add_special_tokens: whether what the model's own settings put around a text (a BOS in Llama 3,
      nothing in SmolLM2) is added; False for text that continues another.
    """
    return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of `ids`, without special tokens unless they are asked for."""
    return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

  def to_json(self) -> str:
    """The text of its `tokenizer.json`."""
    return self._backend.to_str()

  def save(self, folder: str | Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._backend.save(str(folder / "tokenizer.json"))
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, token_id in zip(_SPECIAL, (self.bos_id, self.eos_id, self.pad_id), strict=True):
      if token_id is not None:
        fields[name] = self._backend.id_to_token(token_id)
    if self.chat_template is not None:
      fields["chat_template"] = self.chat_template
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def from_folder(folder: str | Path) -> Tokenizer:
  """Reads the `tokenizer.json` of a model's folder, and `tokenizer_config.json` where there is one.

  Raises FileNotFoundError without a `tokenizer.json`, ValueError for one that cannot be read.
  """
  folder = Path(folder)
  path = folder / "tokenizer.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such file; a SentencePiece `tokenizer.model` is not read: save the tokenizer "
      "with transformers' `save_pretrained` to make a tokenizer.json"
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the Rust side raises bare Exception
    raise ValueError(f"{path}: not a tokenizer: {error}") from None
  backend.no_truncation()
  backend.no_padding()

  settings = folder / "tokenizer_config.json"
  fields = _json(settings)
  ids = {}
  for name in _SPECIAL:
    token = fields.get(name)
    token = token["content"] if isinstance(token, dict) else token
    ids[name] = None if token is None else backend.token_to_id(token)
    if token is not None and ids[name] is None:
      raise ValueError(
        f"{folder / 'tokenizer_config.json'}: {name} {token!r} is not in {path.name}"
      )
  template = folder / "chat_template.jinja"
  chat_template = template.read_text("utf-8") if template.is_file() else fields.get("chat_template")
  return Tokenizer(
    backend,
    bos_id=ids["bos_token"],
    eos_id=ids["eos_token"],
    pad_id=ids["pad_token"],
    chat_template=chat_template,
  )


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  """Builds the byte-level BPE tokenizer that a GGUF file's metadata describes.

  Raises ValueError for another kind of tokenizer, an unknown way to split text, or a vocabulary
  which contradicts itself.
  """
  kind, split_name = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
  if kind != "gpt2":
    raise ValueError(
      f"tokenizer.ggml.model {kind!r} is not supported; supported: 'gpt2' (byte-level BPE). "
      "Load the same model from a folder or from hf://, with its tokenizer.json"
    )
  if split_name not in _SPLITS:
    raise ValueError(
      f"tokenizer.ggml.pre {split_name!r} is not supported; supported: {', '.join(_SPLITS)}"
    )
  split = _SPLITS[split_name]
  tokens = _list(metadata, "tokenizer.ggml.tokens", str)
  types = _list(metadata, "tokenizer.ggml.token_type", int)
  merges = _list(metadata, "tokenizer.ggml.merges", str)
  if len(types) != len(tokens):
    raise ValueError(f"the GGUF metadata has {len(tokens)} tokens but {len(types)} token types")
  ids = {name: _token_id(metadata, f"tokenizer.ggml.{name}", len(tokens)) for name in _IDS_GGUF}
  try:
    model = models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ", 1)) for merge in merges],
      ignore_merges=split.ignore_merges,
    )
  except Exception as error:  # the Rust side raises bare Exception
    raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from None

  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = split.pre_tokenizer
  backend.decoder = decoders.ByteLevel()
  typed = list(zip(tokens, types, strict=True))
  backend.add_special_tokens([AddedToken(t, normalized=False) for t, k in typed if k == _CONTROL])
  backend.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == _USER_DEFINED])

  bos_id, eos_id, pad_id = ids.values()
  if metadata.get("tokenizer.ggml.add_bos_token", split.add_bos):
    if bos_id is None:
      raise ValueError("the GGUF metadata wants a BOS token and lacks tokenizer.ggml.bos_token_id")
    bos = tokens[bos_id]
    backend.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
    )
  return Tokenizer(
    backend,
    bos_id=bos_id,
    eos_id=eos_id,
    pad_id=pad_id,
    chat_template=metadata.get("tokenizer.chat_template"),
  )


def to_gguf(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
  """Returns the metadata that describes a tokenizer in a GGUF file, the inverse of `from_gguf`.

  size: how many tokens the model has; ids without a token are written as unused.

  Raises ValueError for a tokenizer which is no byte-level BPE, or does something besides that the
  format has no words for.
  """
  if tokenizer.vocab_size > size:
    raise ValueError(
      f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {size} rows"
    )
  fields = json.loads(tokenizer.to_json())
  _check_words(fields)
  split_name = _split_name(fields)
  tokens = [f"[PAD{i}]" for i in range(size)]
  types = [_UNUSED] * size
  for token, token_id in fields["model"]["vocab"].items():
    tokens[token_id], types[token_id] = token, _NORMAL
  for added in fields["added_tokens"]:
    tokens[added["id"]] = added["content"]
    types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": split_name,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.merges": [" ".join(pair) for pair in fields["model"]["merges"]],
    "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
    "tokenizer.ggml.add_space_prefix": False,
  }
  ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
  for name, token_id in zip(_IDS_GGUF, ids, strict=True):
    if token_id is not None:
      metadata[f"tokenizer.ggml.{name}"] = token_id
  if tokenizer.chat_template is not None:
    metadata["tokenizer.chat_template"] = tokenizer.chat_template
  return metadata


def _check_words(fields: Mapping[str, Any]) -> None:
  """That a `tokenizer.json` says nothing which a GGUF file could not."""
  model, decoder = fields["model"], fields["decoder"] or {}
  problems = {
    f"is a {model['type']} and no byte-level BPE": (model["type"], decoder.get("type"))
    != ("BPE", "ByteLevel"),
    "normalises text": fields["normalizer"] is not None,
    "drops merges, or marks the parts of words": any(
      model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ),
    "takes in the spaces beside an added token, or whole words only": any(
      added["lstrip"] or added["rstrip"] or added["single_word"] for added in fields["added_tokens"]
    ),
  }
  for problem, found in problems.items():
    if found:
      raise ValueError(f"the tokenizer {problem}, for which a GGUF file has no words; {_REMEDY}")


def _split_name(fields: Mapping[str, Any]) -> str:
  """The format's name of how a `tokenizer.json` cuts text before the merges."""
  for name, split in _SPLITS.items():
    known = tokenizers.Tokenizer(models.BPE())
    known.pre_tokenizer = split.pre_tokenizer
    cuts = _that_matters(json.loads(known.to_str())["pre_tokenizer"])
    ways = (cuts, split.ignore_merges)
    if ways == (_that_matters(fields["pre_tokenizer"]), fields["model"]["ignore_merges"]):
      return name
  raise ValueError(
    f"the tokenizer cuts text in a way of its own before its merges, and a GGUF file names one of "
    f"{', '.join(_SPLITS)}; {_REMEDY}"
  )


def _that_matters(pre_tokenizer: Any) -> Any:
  """The settings of a pre-tokenizer by which ids may differ."""
  if isinstance(pre_tokenizer, dict):
    return {k: _that_matters(x) for k, x in pre_tokenizer.items() if k != "trim_offsets"}
  if isinstance(pre_tokenizer, list):
    return [_that_matters(x) for x in pre_tokenizer]
  return pre_tokenizer


def _adds_bos(tokenizer: Tokenizer) -> bool:
  bare, whole = (tokenizer.encode("a", add_special_tokens=x) for x in (False, True))
  if whole not in (bare, [tokenizer.bos_id, *bare]):
    raise ValueError(
      f"the tokenizer puts tokens around a text, {whole} for {bare}, which are not the one that "
      f"begins it; a GGUF file has no words for that; {_REMEDY}"
    )
  return whole != bare


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
  values = metadata.get(key)
  if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
    raise ValueError(f"{key} must be a list of {kind.__name__}")
  return values


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
  value = metadata.get(key)
  if value is not None and not (isinstance(value, int) and 0 <= value < size):
    raise ValueError(f"{key}={value!r} is not one of the {size} tokens")
  return value


def _json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from None
