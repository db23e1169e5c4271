"""Conversations as examples: only the assistant's turns are learned.

  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

  found = encode(records, tokenizer, None, date="2026-01-01", learn="all", max_length=512,
                 too_long="drop")

`lora_jax.data.chat_tokens` describes which tokens the loss covers, and when one conversation
becomes several examples.
"""

import dataclasses
from collections.abc import Sequence

from lora_jax.checks import shown
from lora_jax.data import chat_templates, chat_tokens, messages
from lora_jax.data.chat_tokens import Tokens
from lora_jax.data.examples import Example
from lora_jax.data.records import Record
from lora_jax.io.tokenizer import Tokenizer

LEARN = ("all", "last")
TOO_LONG = ("cut_left", "cut_right", "drop", "error")
_BEGINNING = 60  # characters of a conversation in an error


def encode(
  records: Sequence[Record],
  tokenizer: Tokenizer,
  template: str | None,
  *,
  date: str,
  learn: str,
  max_length: int,
  too_long: str,
) -> list[Example]:
  """Returns the examples of records, in order, without those that are dropped.

  A record becomes one example, or several if the template changes earlier turns. An example ends
  with its last learned token. Its completion is the last learned turn, and its prompt is everything
  before.

  Args:
    records: with `messages` and optionally `tools`; see `lora_jax.data.messages.check`.
    tokenizer: of the model.
    template: see `chat_templates.find`.
    date: the date for templates that print it, as 2026-01-31.
    learn: "all" turns of the assistant, or only the "last".
    max_length: the most tokens of an example.
    too_long: how to treat longer ones. "cut_left" removes the beginning except BOS, "cut_right" the
      end; "drop" drops the example, counted in `Example.left_out` of the next one; "error" raises.

  Raises:
    ValueError: for an invalid conversation, or one that the template rejects; for one without
      learned tokens, or none after truncation; and if all examples are dropped.
  """
  kept: list[Example] = []
  longer: list[tuple[int, int]] = []  # (record, number of tokens)
  left_out = 0
  with chat_templates.renderers(tokenizer, template, date) as renderer:
    for number, record in enumerate(records):
      try:
        conversation = messages.check(record)
        with_tools = conversation.tools is not None
        found = chat_tokens.tokenise(conversation, renderer(with_tools), tokenizer, learn)
        continues = False
        for tokens in found:
          example = _example(tokens)
          if len(example.tokens) > max_length:
            longer.append((number, len(example.tokens)))
            if too_long == "drop":
              left_out += 1
              continue
            if too_long != "error":
              keeps_bos = example.tokens[0] == tokenizer.bos_id
              left = too_long == "cut_left"
              example = _cut(example, tokens.turns, max_length, left, keeps_bos)
          kept.append(dataclasses.replace(example, left_out=left_out, continues=continues))
          left_out, continues = 0, True
      except ValueError as error:
        raise ValueError(f"{_where(number, record)}: {error}") from None
  if longer and too_long == "error":
    first, most = longer[0][0], max(length for _, length in longer)
    raise ValueError(
      f"{len({number for number, _ in longer})} of {len(records)} conversations are longer than "
      f"max_length {max_length} (first: {_where(first, records[first])}); use max_length >= "
      f"{most}, or let data.too_long cut or drop them"
    )
  if not kept:
    least = min(length for _, length in longer)
    raise ValueError(
      f"all {len(records)} conversations are longer than max_length {max_length}, so that none is "
      f"left; use max_length >= {least}"
    )
  kept[-1] = dataclasses.replace(kept[-1], left_out=kept[-1].left_out + left_out)
  return kept


def _example(tokens: Tokens) -> Example:
  learnt = sorted({n for turn in tokens.turns for n in turn} - {0})
  return Example(
    tokens=tuple(tokens.ids[: learnt[-1] + 1]),
    prompt_length=max(tokens.turns[-1][0], 1),
    cut=0,
    shared=tokens.shared,
    learnt=tuple(learnt),
  )


def _cut(
  example: Example, turns: Sequence[Sequence[int]], max_length: int, left: bool, keeps_bos: bool
) -> Example:
  """Truncates an example to `max_length` tokens."""
  assert example.learnt is not None  # of a conversation
  cut = len(example.tokens) - max_length
  if left:
    kept = (example.tokens[:1] if keeps_bos else ()) + example.tokens[cut + keeps_bos :]
    learnt = tuple(n - cut for n in example.learnt if n - cut > keeps_bos)
    prompt_length = example.prompt_length - cut
    too_little = prompt_length < 1 + keeps_bos
  else:
    kept = example.tokens[:max_length]
    learnt = tuple(n for n in example.learnt if n < max_length)
    starts = [max(turn[0], 1) for turn in turns if turn[0] < max_length]
    prompt_length = starts[-1] if starts else 1
    too_little = not learnt
  if too_little:
    what = "the last answer alone fills" if left else "what comes before the first answer fills"
    raise ValueError(
      f"{what} max_length {max_length}, of {len(example.tokens)} tokens; use a larger max_length, "
      "or data.too_long 'drop'"
    )
  return dataclasses.replace(
    example, tokens=kept, prompt_length=prompt_length, cut=cut, learnt=learnt
  )


def _where(number: int, record: Record) -> str:
  """Names a record by its number and its beginning, since its place in the file may differ."""
  given = record.get("messages")
  for message in given if isinstance(given, list) else ():
    if isinstance(message, dict) and message.get("content"):
      return f"record {number}, which has {shown(message['content'], _BEGINNING)}"
  return f"record {number}"
