r"""Tokenised examples: a prompt, and the completion that alone is trained on.

  examples = encode(
    records, tokenizer,
    prompt="Review: {text}\nSentiment:", completion=" {label}", max_length=128, append_eos=False,
  )

An example with a prompt of three tokens and a completion of two. The last token is not fed to the
model, since no prediction follows it:

  tokens     p0 p1 p2 c0 c1
  inputs     p0 p1 p2 c0          length 4
  positions         2  3          the inputs whose next token belongs to the completion
  targets          c0 c1
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lora_jax.data import templates
from lora_jax.data.records import Record

Pieces = Sequence[tuple[str, bool]]
"""Parts of a text, each with whether special tokens written out in it are meant as tokens."""


class Tokenizer(Protocol):
  """The interface of a tokenizer; `lora_jax.io.tokenizer.Tokenizer` implements it.

  `encode("")` returns the special tokens that begin a text (BOS, or none).
  """

  eos_id: int | None

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@runtime_checkable
class PairTokenizer(Protocol):
  """A tokenizer that knows the positions of its tokens in a text.

  `encode_pair` returns the ids of a prompt and its completion as one text, the number of prompt
  tokens, and whether the completion's first token begins within the prompt.
  """

  def encode_pair(self, prompt: Pieces, completion: Pieces) -> tuple[list[int], int, bool]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """The tokens of a prompt followed by those of its completion.

  Attributes:
    tokens: token ids of both, with EOS if `append_eos` is True.
    prompt_length: the number of prompt tokens, at least 1.
    cut: the number of prompt tokens truncated to the maximum length.
    shared: whether a token has characters of both prompt and completion, see `encode`.
    `learnt`: the increasing indices, from 1, of the tokens that are learned, if these are not just
      the completion, as in a conversation with several answers.
    left_out: the number of examples dropped just before this one because of their length; for the
      last example also those after it.
    continues: whether it is from the same record as the example before it.
  """

  tokens: tuple[int, ...]
  prompt_length: int
  cut: int
  shared: bool = False
  learnt: tuple[int, ...] | None = None
  left_out: int = 0
  continues: bool = False

  @property
  def inputs(self) -> tuple[int, ...]:
    """The tokens fed to the model: all but the last."""
    return self.tokens[:-1]

  @property
  def completion(self) -> tuple[int, ...]:
    """The tokens after the prompt."""
    return self.tokens[self.prompt_length :]

  @property
  def targets(self) -> tuple[int, ...]:
    """The tokens that are learned: the completion's, or those of `learnt`."""
    if self.learnt is None:
      return self.completion
    return tuple(self.tokens[n] for n in self.learnt)

  @property
  def positions(self) -> Sequence[int]:
    """The positions in `inputs` where the model predicts `targets`."""
    if self.learnt is None:
      return range(self.prompt_length - 1, len(self.tokens) - 1)
    return [n - 1 for n in self.learnt]


def encode(
  records: Sequence[Record],
  tokenizer: Tokenizer,
  prompt: str,
  completion: str,
  max_length: int,
  append_eos: bool,
  special_tokens: bool = False,
) -> list[Example]:
  """Returns an example for each record, in order.

  Prompt and completion are tokenized as one text. A token that begins in the prompt and ends in the
  completion belongs to the completion: after "Sentiment: ", with a vocabulary that has the token
  " positive", the model also learns the space. `Example.shared` marks such examples; a completion
  template that begins with the space avoids them. The token belongs to the prompt only if the
  prompt would otherwise be empty.

  A prompt that is too long is truncated on the left, after BOS, since the question or the cue is
  usually at its end. `Example.cut` counts the removed tokens. Completions are never truncated.

  Args:
    records: from `lora_jax.data.records.read`.
    tokenizer: see `Tokenizer`. Without the methods of `PairTokenizer`, the boundary is where the
      tokens of the prompt and of the whole text begin to differ, and the tokenizer decides about
      special tokens.
    prompt: template of the prompt, see `lora_jax.data.templates`. The tokenizer's prefix, such as
      BOS, comes before it once, even if the prompt contains it.
    completion: template of the completion; in most vocabularies a word begins with its space.
    max_length: the most tokens of prompt and completion together, EOS included.
    append_eos: whether EOS ends the completion and is a target. Generated text needs it to stop; a
      choice between a few words does not.
    special_tokens: whether special tokens in a column are parsed as tokens, like those of the
      templates, or are plain text.

  Raises:
    ValueError: for a template that the records cannot fill, a prompt or a completion without
      tokens, completions that leave no room for a prompt token, a column of neither text nor
      numbers, or a tokenizer without EOS.
  """
  templates.check(prompt, records, "prompt")
  templates.check(completion, records, "completion")
  if append_eos and tokenizer.eos_id is None:
    raise ValueError("append_eos: this tokenizer has no EOS token")
  before = tokenizer.encode("")

  pairs: list[tuple[list[int], list[int], bool]] = []
  for number, record in enumerate(records):
    parts = [
      [(text, own or special_tokens) for text, own in templates.pieces(template, record)]
      for template in (prompt, completion)
    ]
    ids, boundary, shared = _encode_pair(tokenizer, *parts)
    if shared and not before + ids[:boundary]:
      boundary = 1
    asked, answer = ids[:boundary], ids[boundary:]
    if append_eos and answer[-1:] != [tokenizer.eos_id]:
      answer = [*answer, tokenizer.eos_id]
    if not before + asked:
      raise ValueError(f"record {number}: the prompt has no tokens to predict from; add some text")
    if not answer:
      raise ValueError(f"record {number}: the completion has no tokens, so nothing to learn")
    pairs.append((asked, answer, shared))

  least = len(before) or 1
  shortest = [least + len(answer) for _, answer, _ in pairs]
  too_long = [number for number, length in enumerate(shortest) if length > max_length]
  if too_long:
    raise ValueError(
      f"max_length {max_length} has no room for {len(too_long)} of {len(records)} completions "
      f"(first: record {too_long[0]}) with {least} prompt token{'s' if least > 1 else ''}; "
      f"use max_length >= {max(shortest)} or leave these records out"
    )
  return [_join(before, asked, answer, shared, max_length) for asked, answer, shared in pairs]


def choice_ids(
  tokenizer: Tokenizer,
  completions: Sequence[str],
  prompt: str = "\n",
  special_tokens: bool = False,
) -> list[int]:
  """Returns the first token of each completion; their logits decide between the completions.

  Args:
    tokenizer: as in `encode`.
    completions: the texts to choose from, exactly as the completion template writes them, e.g.
      [" positive", " negative"].
    prompt: the text before them, such as the end of a prompt; in most vocabularies a line break
      does not merge with the next token.
    special_tokens: as in `encode`.

  Raises:
    ValueError: for a completion without tokens, two with the same first token, or two that begin
      at different positions, because one shares a token with the prompt.
  """
  owners, starts = {}, {}
  for completion in completions:
    ids, boundary, _ = _encode_pair(tokenizer, [(prompt, True)], [(completion, special_tokens)])
    start, tokens = tuple(ids[:boundary]), ids[boundary:]
    if not tokens:
      raise ValueError(f"choice {completion!r} has no tokens")
    if tokens[0] in owners:
      raise ValueError(
        f"choices {owners[tokens[0]]!r} and {completion!r} both begin with token {tokens[0]}; "
        "word them so that their first tokens differ"
      )
    owners[tokens[0]] = completion
    starts.setdefault(start, completion)
  if len(starts) > 1:
    first, second, *_ = starts.values()
    raise ValueError(
      f"after {prompt!r} the choices {first!r} and {second!r} begin at different tokens, because "
      "one of them shares a token with the prompt; move the space from the prompt's end to the "
      "beginning of each choice"
    )
  return list(owners)


def describe(examples: Sequence[Example]) -> dict[str, Any]:
  """Returns statistics of the lengths of examples.

  Returns:
    {"examples": number of them, "cut": number of those with a shortened prompt, "shared": number of
    those with a token of both prompt and completion, "longest": the most input tokens}.
  """
  return {
    "examples": len(examples),
    "cut": sum(example.cut > 0 for example in examples),
    "shared": sum(example.shared for example in examples),
    "longest": max(len(example.inputs) for example in examples),
  }


def _encode_pair(
  tokenizer: Tokenizer, prompt: Pieces, completion: Pieces
) -> tuple[list[int], int, bool]:
  if isinstance(tokenizer, PairTokenizer):
    return tokenizer.encode_pair(prompt, completion)
  texts = ["".join(text for text, _ in pieces) for pieces in (prompt, completion)]
  asked = tokenizer.encode(texts[0], add_special_tokens=False)
  whole = tokenizer.encode("".join(texts), add_special_tokens=False)
  same = [a == b for a, b in zip(asked, whole, strict=False)]
  boundary = same.index(False) if False in same else len(same)
  return whole, boundary, boundary < len(asked)


def _join(
  before: list[int], asked: list[int], answer: list[int], shared: bool, max_length: int
) -> Example:
  cut = max(0, len(before) + len(asked) + len(answer) - max_length)
  start = before + asked[cut:]
  return Example(tokens=tuple(start + answer), prompt_length=len(start), cut=cut, shared=shared)
