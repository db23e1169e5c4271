"""Converts SentencePiece tokenizers between GGUF files and `tokenizers`.

There are two kinds, by `tokenizer.ggml.model`: BPE with byte fallback ("llama": Llama 2, Mistral,
Gemma, Phi-3) and unigram ("t5"). Both have a score for each token and no merges; a space is spelled
`▁` (Kudo and Richardson 2018, "SentencePiece", section 3). BPE joins the two adjacent tokens whose
result has the highest score. `tokenizers` does this by a list of pairs, the best first.

As in `transformers`, no space is added after a special token, or before a text that begins with a
space; SentencePiece and llama.cpp add one in both places.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from lora_jax.checks import shown
from lora_jax.io import panics

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of the GGUF format."""

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# More than in any vocabulary; a damaged file may claim any number.
_LONGEST_TOKEN, _MOST_MERGES = 256, 1 << 22
_BEST, _WORST = float("inf"), -1e6
_UNKNOWN_TOKEN = "tokenizer.ggml.unknown_token_id"
_CHARACTERS = "tokenizer.ggml.precompiled_charsmap"
_FLAGS = {"add_space_prefix": True, "remove_extra_whitespaces": False}

Fields = Mapping[str, Any]


class Spaces(NamedTuple):
  """The normalization of spaces before a text is split into pieces.

  prefix: a space is added before the text.
  fewer: spaces around the text are stripped, and runs of spaces are collapsed to one.
  everywhere: a space is also added after a special token, and before a space.
  """

  prefix: bool
  fewer: bool
  everywhere: bool = False


def read(kind: str, metadata: Fields, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
  """Returns the tokenizer that the metadata of a GGUF file describes, without its added tokens.

  kind: "llama" or "t5".
  tokens, types: of the metadata, of the same length.

  Raises ValueError for invalid scores, flags or character tables, and for tokens that are too long.
  """
  scores = metadata.get("tokenizer.ggml.scores")
  if not isinstance(scores, list) or len(scores) != len(tokens):
    raise ValueError(f"tokenizer.ggml.scores must be a list of {len(tokens)} numbers")
  if not all(type(x) in (int, float) and abs(x) < _BEST for x in scores):
    raise ValueError("tokenizer.ggml.scores must be finite numbers")
  if longest := next((x for x in tokens if len(x) > _LONGEST_TOKEN), None):
    raise ValueError(
      f"tokenizer.ggml.tokens: {shown(longest)} has {len(longest)} characters, {_LONGEST_TOKEN} "
      "are allowed"
    )
  spaces = _spaces(kind, metadata)
  unknown = _unknown(metadata, types, default=0 if kind == "llama" else 2)
  with panics.as_value_errors("tokenizer.ggml.tokens are no vocabulary"):
    if kind == "t5":
      pieces = list(zip(tokens, map(float, scores), strict=True))
      backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    else:
      ids = {_spelled(x, type_): i for i, (x, type_) in enumerate(zip(tokens, types, strict=True))}
      if len(ids) < len(tokens):
        raise ValueError("two runs of spaces are of one length")
      merges = merges_of(tokens, types, scores)
      backend = tokenizers.Tokenizer(
        models.BPE(
          vocab=ids, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
        )
      )
  _set_spaces(backend, kind, spaces)
  if kind == "t5" and _CHARACTERS in metadata:
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([_characters(metadata[_CHARACTERS]), *own])
  return backend


def merges_of(
  tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
  """Returns the pairs of tokens that BPE joins, the best first.

  Only normal tokens and user-defined runs of spaces are results of joins. The runs come first:
  SentencePiece extracts them from the text before anything else.

  Raises ValueError for more pairs than any vocabulary has.
  """
  ranked = {}
  for token, type_, score in zip(tokens, types, scores, strict=True):
    if type_ == NORMAL:
      ranked[token] = score
    elif _is_run(token, type_):
      ranked[_spelled(token, type_)] = _BEST
  found = []
  for token, score in ranked.items():
    halves = ((token[:n], token[n:]) for n in range(1, len(token)))
    found += [(score, left, right) for left, right in halves if left in ranked and right in ranked]
    if len(found) > _MOST_MERGES:
      raise ValueError(f"tokenizer.ggml.tokens: over {_MOST_MERGES:,} pairs of them are tokens")
  # Runs are ordered by length. Pairs with equal scores have the longer halves first, as in
  # transformers.
  found.sort(key=lambda x: (x[0], -len(x[1] + x[2]) * (x[0] == _BEST), len(x[1])), reverse=True)
  return [(left, right) for _, left, right in found]


def describe(fields: Fields, size: int, remedy: str) -> dict[str, Any]:
  """Returns the metadata of a vocabulary of pieces, the inverse of `read`.

  fields: of a `tokenizer.json` whose model is BPE with `byte_fallback`, or Unigram.
  size: the number of tokens of the model; ids without a token are written as unused.
  remedy: the end of an error.

  Raises ValueError for a tokenizer with steps that the format cannot express.
  """
  model = fields["model"]
  kind = "t5" if model["type"] == "Unigram" else "llama"
  spaces, characters = _described_spaces(fields, kind, remedy)
  tokens = [f"[PAD{i}]" for i in range(size)]
  types, scores = [UNUSED] * size, [0.0] * size
  if kind == "t5":
    if model.get("byte_fallback"):
      raise ValueError(f"the tokenizer is unigram with bytes, which a GGUF file has not; {remedy}")
    vocabulary, unknown = {token: i for i, (token, _) in enumerate(model["vocab"])}, model["unk_id"]
    for i, (_, score) in enumerate(model["vocab"]):
      scores[i] = float(score)
  else:
    vocabulary = model["vocab"]
    unknown = vocabulary.get(model["unk_token"])
  for token, i in vocabulary.items():
    is_byte = kind == "llama" and _BYTE_TOKEN.fullmatch(token)
    tokens[i], types[i] = token, BYTE if is_byte else NORMAL
  for added in fields["added_tokens"]:
    i, text = added["id"], added["content"]
    tokens[i], types[i] = text, CONTROL if added["special"] else USER_DEFINED
    if kind == "llama" and types[i] == USER_DEFINED and set(text) == {_SPACE}:
      tokens[i] = " " * len(text)
  if unknown is not None:
    types[unknown] = UNKNOWN
  if kind == "llama":
    scores = _scores(model["merges"], tokens, types, remedy)
  found = {
    "tokenizer.ggml.model": kind,
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": scores,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.add_space_prefix": spaces.prefix,
    "tokenizer.ggml.remove_extra_whitespaces": spaces.fewer,
  }
  if unknown is not None:
    found[_UNKNOWN_TOKEN] = unknown
  if characters is not None:
    found[_CHARACTERS] = characters
  return found


# ---- tokens


def _is_run(token: str, type_: int) -> bool:
  """Whether a token is a user-defined run of spaces, which llama.cpp's files do not spell `▁`."""
  return type_ == USER_DEFINED and len(token) > 1 and not token.strip(" ")


def _spelled(token: str, type_: int) -> str:
  return token.replace(" ", _SPACE) if _is_run(token, type_) else token


def is_added(token: str, type_: int) -> bool:
  """Whether a token is extracted from a text before it is split into pieces."""
  return type_ in (UNKNOWN, CONTROL) or (type_ == USER_DEFINED and not _is_run(token, type_))


def _unknown(metadata: Fields, types: Sequence[int], default: int) -> int:
  """The id of the token for text without a piece."""
  found = metadata.get(_UNKNOWN_TOKEN, types.index(UNKNOWN) if UNKNOWN in types else default)
  if not (type(found) is int and 0 <= found < len(types)):
    raise ValueError(f"{_UNKNOWN_TOKEN}={shown(found)} is not one of the {len(types)} tokens")
  return found


def _scores(
  merges: Iterable[Sequence[str]], tokens: Sequence[str], types: Sequence[int], remedy: str
) -> list[float]:
  """Scores by which BPE joins the pairs of tokens in the order of the merges."""
  apart = {x for x, type_ in zip(tokens, types, strict=True) if is_added(x, type_)}
  # Tokens that are extracted first are never joined from pieces.
  pairs = [(x, y) for x, y in merges if apart.isdisjoint((x, y, x + y))]
  order = {token: n for n, token in enumerate(dict.fromkeys(x + y for x, y in pairs))}
  scores = [
    -float(order[_spelled(x, type_)]) if _spelled(x, type_) in order else _WORST
    for x, type_ in zip(tokens, types, strict=True)
  ]
  again = merges_of(tokens, types, scores)
  if set(again) != set(pairs) or [*dict.fromkeys(x + y for x, y in again)] != [*order]:
    raise ValueError(
      "the tokenizer joins some pairs of tokens and not others that make the same token, or not by "
      f"the order of what they make, and a GGUF file has scores of tokens alone; {remedy}"
    )
  return scores


# ---- spaces


def _spaces(kind: str, metadata: Fields) -> Spaces:
  flags = {}
  for name, default in _FLAGS.items():
    flags[name] = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(flags[name], bool):
      raise ValueError(f"tokenizer.ggml.{name} must be a bool, not {shown(flags[name])}")
  # Files do not distinguish these two; Phi-3's tokenizer.json has this one.
  everywhere = kind == "llama" and metadata.get("general.architecture") == "phi3"
  return Spaces(flags["add_space_prefix"], flags["remove_extra_whitespaces"], everywhere)


def _set_spaces(backend: tokenizers.Tokenizer, kind: str, spaces: Spaces) -> None:
  """Sets the normalizer and the decoder of spaces."""
  steps: list[normalizers.Normalizer] = []
  words = kind == "t5" and spaces.prefix and spaces.fewer  # as in T5's own
  if spaces.fewer and not words:
    steps += [
      normalizers.Replace(Regex(r"\A +| +\z"), ""),
      normalizers.Replace(Regex(" {2,}"), " "),
    ]
  if words:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
      ]
    )
  elif kind == "llama" and spaces.prefix and not spaces.everywhere:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
      replacement=_SPACE, prepend_scheme="first", split=False
    )
  else:
    steps += [normalizers.Prepend(_SPACE)] * spaces.prefix + [normalizers.Replace(" ", _SPACE)]
  if steps:
    backend.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
  if kind == "t5":
    scheme = "always" if spaces.prefix else "never"
    backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
  else:
    strip = [decoders.Strip(" ", 1, 0)] * spaces.prefix
    backend.decoder = decoders.Sequence(
      [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _described_spaces(fields: Fields, kind: str, remedy: str) -> tuple[Spaces, bytes | None]:
  """The normalization of spaces in a `tokenizer.json`, and its table of characters."""
  steps = _steps(fields["normalizer"], "normalizers")
  cuts = _steps(fields["pre_tokenizer"], "pretokenizers")
  # Gemma's splits at spaces, but none is left by then.
  cuts = [x for x in cuts if x.get("pattern") != {"String": " "} or kind != "llama"]
  characters = None
  if kind == "t5" and steps and steps[0]["type"] == "Precompiled":
    characters = base64.b64decode(steps.pop(0)["precompiled_charsmap"])
  found = (steps, cuts, fields["decoder"])
  for prefix in (True, False):
    for fewer in (False, True):
      for everywhere in (False, True):
        spaces = Spaces(prefix, fewer, everywhere)
        known = tokenizers.Tokenizer(models.BPE())
        _set_spaces(known, kind, spaces)
        theirs = json.loads(known.to_str())
        if found == (
          _steps(theirs["normalizer"], "normalizers"),
          _steps(theirs["pre_tokenizer"], "pretokenizers"),
          theirs["decoder"],
        ):
          return spaces, characters
  raise ValueError(
    f"the tokenizer treats spaces, or characters, in a way of its own, for which a GGUF file has "
    f"no words; {remedy}"
  )


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
  """The steps of a normalizer or a pre-tokenizer."""
  if part is None:
    return []
  return [*part[key]] if part["type"] == "Sequence" else [part]


def _characters(table: Any) -> normalizers.Normalizer:
  """The normalizer that replaces characters by SentencePiece's own table."""
  if not isinstance(table, list) or not all(type(x) is int and -128 <= x < 256 for x in table):
    raise ValueError(f"{_CHARACTERS} must be a list of bytes")
  content = bytes(x & 255 for x in table)
  # A tree of so many bytes, then what characters are replaced by, each with a zero byte after it.
  replacements = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
  if max(map(len, replacements)) > _LONGEST_TOKEN:
    raise ValueError(f"{_CHARACTERS} replaces a character by over {_LONGEST_TOKEN} bytes")
  with panics.as_value_errors(f"{_CHARACTERS} is no table of characters"):
    made = normalizers.Precompiled(content)
    made.normalize_str("a 1 .")  # the table is checked only at its use
  return made
