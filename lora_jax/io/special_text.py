"""Encodes text with some special tokens as tokens and others as plain characters.

A prompt template may write `<|im_end|>` and mean the token, while a column of data that holds the
same characters, as a question about chat formats does, means the characters.

    special = SpecialText(tokenizer_json)
    special.encode([("<|user|>", True), ("what does </s> mean?", False)])
"""

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

Pieces = Sequence[tuple[str, bool]]
"""Parts of a text, each with whether the special tokens written out in it are meant as tokens."""

# A noncharacter, which occurs in no text, marks a following token.
_MARK = "\ufdd0"
# Settings of lengths and of tokens around a text, which the tokenizer itself handles.
_LEFT_OUT = ("truncation", "padding", "post_processor")


class SpecialText:
  """Encodes text whose special tokens are plain characters, except for those that are marked.

  It is the tokenizer once more, told to take special tokens for plain text, with other spellings
  of them that it does recognize.
  """

  def __init__(self, tokenizer_json: str):
    fields = json.loads(tokenizer_json) | dict.fromkeys(_LEFT_OUT)
    added = {token["content"]: token for token in fields["added_tokens"]}
    special = [content for content, token in added.items() if token["special"]]
    _hide(fields["model"], special)
    self._backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    self._backend.encode_special_tokens = True
    self._backend.add_tokens([_respelled(added[content]) for content in special])
    # The ids of added tokens may be others here.
    self._meant = {
      self._backend.token_to_id((_MARK if token["special"] else "") + content): token["id"]
      for content, token in added.items()
    }
    # The longest first, for one may begin as another does.
    longest = sorted(special, key=len, reverse=True)
    self._pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
    self._marked: dict[str, str] = {}

  def encode(self, pieces: Pieces) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of the pieces as one text, and where each of them lies in it.

    Raises ValueError for a plain piece with the character that marks.
    """
    for text, meant in pieces:
      if not meant and _MARK in text:
        raise ValueError(f"the text {text[:40]!r} holds U+FDD0, which is no character; take it out")
    joined = "".join(self._mark(text) if meant else text for text, meant in pieces)
    encoding = self._backend.encode(joined, add_special_tokens=False)
    marks = [found.start() for found in re.finditer(_MARK, joined)]

    def without_marks(at: int) -> int:
      return at - bisect.bisect_left(marks, at)

    offsets = [(without_marks(start), without_marks(end)) for start, end in encoding.offsets]
    return [self._meant.get(i, i) for i in encoding.ids], offsets

  def _mark(self, text: str) -> str:
    if text not in self._marked:  # the parts of a template, which recur with every record
      self._marked[text] = self._pattern.sub(_MARK + r"\g<0>", text)
    return self._marked[text]


def _hide(model: dict[str, Any], special: Sequence[str]) -> None:
  """Keeps a model from finding special tokens in plain text, as a whole word or piece.

  BPE reaches a token by merges alone, and none of them leads to a special one.
  """
  vocabulary = model["vocab"]
  hidden = set(special) - {model.get("unk_token")}
  if model["type"] == "Unigram":
    model["vocab"] = [[_MARK * (x in hidden) + x, score] for x, score in vocabulary]
  elif model["type"] != "BPE":
    model["vocab"] = {_MARK * (x in hidden) + x: token_id for x, token_id in vocabulary.items()}


def _respelled(token: Mapping[str, Any]) -> AddedToken:
  return AddedToken(
    _MARK + token["content"],
    lstrip=token["lstrip"],
    rstrip=token["rstrip"],
    single_word=token["single_word"],
    normalized=False,
    special=False,
  )
