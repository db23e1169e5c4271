r"""Tokenised examples: a prompt, and the completion that alone is trained on.

  examples = encode(
    records, tokenizer,
    prompt="Review: {text}\nSentiment:", completion=" {label}", max_length=128, append_eos=False,
  )

One example, with its prompt of three tokens and its completion of two; the last token is never
fed to the model, as there is nothing after it to predict:

  tokens     p0 p1 p2 c0 c1
  inputs     p0 p1 p2 c0          length 4
  positions         2  3          the inputs whose next token belongs to the completion
  targets          c0 c1
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from lora_jax.data import templates
from lora_jax.data.records import Record


class Tokenizer(Protocol):
  """What the data needs of a tokenizer; `lora_jax.io.tokenizer.Tokenizer` has it.

  `encode("")` gives the special tokens that begin a text (BOS, or none).
  """

  eos_id: int | None

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """The tokens of a prompt followed by those of its completion.

  Attributes:
    tokens: token ids of both, with EOS where it was asked for.
    prompt_length: how many of them are the prompt's, at least 1.
    cut: how many tokens of the prompt were left out to keep to the maximum length.
  """

  tokens: tuple[int, ...]
  prompt_length: int
  cut: int

  @property
  def inputs(self) -> tuple[int, ...]:
    """The tokens that are fed to the model: all but the last."""
    return self.tokens[:-1]

  @property
  def targets(self) -> tuple[int, ...]:
    """The completion's tokens."""
    return self.tokens[self.prompt_length :]

  @property
  def positions(self) -> range:
    """The positions in `inputs` where the model predicts `targets`."""
    return range(self.prompt_length - 1, len(self.tokens) - 1)


def encode(
  records: Sequence[Record],
  tokenizer: Tokenizer,
  prompt: str,
  completion: str,
  max_length: int,
  append_eos: bool,
) -> list[Example]:
  """Returns an example for each record, in their order.

  A prompt that is too long loses tokens from its left, after BOS: the end, where the question or
  the cue usually stands, is kept. `Example.cut` counts them. A completion is never shortened.

  Args:
    records: as `lora_jax.data.records.read` returns them.
    tokenizer: see `Tokenizer`.
    prompt: template of the prompt, see `lora_jax.data.templates`.
    completion: template of the completion; in most vocabularies a word begins with its space.
    max_length: the most tokens that prompt and completion have together, EOS included.
    append_eos: whether EOS ends the completion and is a target. Text that is generated needs it
      to stop; a choice between a few words does not.

  Raises:
    ValueError: a template that the records cannot fill, a prompt or a completion without tokens,
      completions that leave no room for a prompt token, or no EOS in the tokenizer.
    TypeError: a column that holds neither text nor a number.
  """
  templates.check(prompt, records, "prompt")
  templates.check(completion, records, "completion")
  if append_eos and tokenizer.eos_id is None:
    raise ValueError("append_eos: this tokenizer has no EOS token")
  before = tokenizer.encode("")
  after = [tokenizer.eos_id] if append_eos else []

  pairs = []
  for number, record in enumerate(records):
    # Each part is tokenised alone. Tokenised as one text, the prompt's last characters could merge
    # with the completion's first, and then the boundary falls inside a token, and the prompt's ids
    # are not those that the model meets when the completion is yet to be generated.
    asked = tokenizer.encode(templates.fill(prompt, record), add_special_tokens=False)
    answer = tokenizer.encode(templates.fill(completion, record), add_special_tokens=False) + after
    if not before + asked:
      raise ValueError(f"record {number}: the prompt has no tokens to predict from; add some text")
    if not answer:
      raise ValueError(f"record {number}: the completion has no tokens, so nothing to learn")
    pairs.append((asked, answer))

  least = len(before) or 1
  shortest = [least + len(answer) for _, answer in pairs]
  too_long = [number for number, length in enumerate(shortest) if length > max_length]
  if too_long:
    raise ValueError(
      f"max_length {max_length} has no room for {len(too_long)} of {len(records)} completions "
      f"(first: record {too_long[0]}) with {least} prompt token{'s' if least > 1 else ''}; "
      f"use max_length >= {max(shortest)} or leave these records out"
    )
  return [_join(before, asked, answer, max_length) for asked, answer in pairs]


def choice_ids(tokenizer: Tokenizer, completions: Sequence[str]) -> list[int]:
  """Returns the first token of each completion, whose logits decide between them.

  Args:
    tokenizer: see `Tokenizer`.
    completions: the texts to choose from, just as the completion template writes them, e.g.
      [" positive", " negative"].

  Raises:
    ValueError: a completion without tokens, or two that begin with the same token.
  """
  owners = {}
  for completion in completions:
    tokens = tokenizer.encode(completion, add_special_tokens=False)
    if not tokens:
      raise ValueError(f"choice {completion!r} has no tokens")
    if tokens[0] in owners:
      raise ValueError(
        f"choices {owners[tokens[0]]!r} and {completion!r} both begin with token {tokens[0]}; "
        "word them so that their first tokens differ"
      )
    owners[tokens[0]] = completion
  return list(owners)


def _join(before: list[int], asked: list[int], answer: list[int], max_length: int) -> Example:
  cut = max(0, len(before) + len(asked) + len(answer) - max_length)
  start = before + asked[cut:]
  return Example(tokens=tuple(start + answer), prompt_length=len(start), cut=cut)
