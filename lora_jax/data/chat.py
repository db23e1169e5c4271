"""Conversations as examples: the assistant's turns are learnt, and nothing else.

  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

  found = encode(records, tokenizer, None, date="2026-01-01", learn="all", max_length=512,
                 too_long="drop")

SmolLM2's template writes this. The loss covers the underlined tokens:

  <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>⏎
                                                     ‾‾‾‾‾‾‾‾‾‾‾‾‾‾‾‾

**Which tokens the loss covers.** A template may mark them by `{% generation %}` blocks. Every token
with a character in a block then counts, as in `transformers`' `return_assistant_tokens_mask`.

Without marks, prefixes of the conversation are rendered. The turn of message i is the text that
messages[:i + 1] add to messages[:i] with a generation prompt. Each rendering must be a prefix of
the next. A turn ends with its end-of-turn token, the first of the special tokens at its end. Line
breaks and an EOS after that token do not count.

Some templates change earlier turns when later ones follow: they drop earlier thoughts, say. Then
one rendering is no prefix of the next, and the conversation is refused. With `learn="last"` only
the last turn has to fit.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lora_jax.checks import shown
from lora_jax.data import chat_templates, messages
from lora_jax.data.chat_templates import Renderer, TemplateError, Text
from lora_jax.data.examples import Example
from lora_jax.data.messages import Conversation
from lora_jax.data.records import Record
from lora_jax.io.tokenizer import Tokenizer

LEARN = ("all", "last")
TOO_LONG = ("cut_left", "cut_right", "drop", "error")
_BEGINNING = 60  # characters of a conversation that an error shows
_ENDING = 20  # characters of a message that must be in its text


class Tokens(NamedTuple):
  """A conversation in tokens.

  text: that the template wrote.
  ids: its tokens; nothing is put before them.
  turns: the token indices of each turn that the loss covers.
  shared: whether the first token of a turn begins before it.
  """

  text: str
  ids: list[int]
  turns: list[list[int]]
  shared: bool

  @property
  def mask(self) -> list[int]:
    """1 for each token that is learnt, as `transformers` has it."""
    learnt = set(itertools.chain.from_iterable(self.turns))
    return [int(n in learnt) for n in range(len(self.ids))]


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
  """Returns an example for each record, in their order, without those that are left out.

  The tokens after the last that is learnt are no part of an example. The last turn that is learnt
  counts as its completion, and all before as its prompt.

  Args:
    records: with `messages`, and perhaps `tools`; see `lora_jax.data.messages.check`.
    tokenizer: of the model.
    template: see `chat_templates.find`.
    date: what templates that ask for the day are told, as 2026-01-31.
    learn: "all" turns of the assistant or the "last" alone.
    max_length: the most tokens of an example.
    too_long: what becomes of a longer one. "cut_left" takes away its beginning, BOS aside,
      "cut_right" its end; "drop" leaves it out, `Example.left_out` of the next one counts it;
      "error" refuses it.

  Raises:
    ValueError: for a conversation that is none, or that the template does not take; where nothing
      is learnt of one, or a cut would leave nothing to learn; and where all are left out.
  """
  kept: list[Example] = []
  longer: dict[int, int] = {}
  left_out = 0
  with contextlib.ExitStack() as stack:

    @functools.cache
    def renderer(tools: bool) -> Renderer:
      found = chat_templates.find(tokenizer, template, tools=tools)
      return stack.enter_context(Renderer(found, date=date))

    for number, record in enumerate(records):
      try:
        conversation = messages.check(record)
        with_tools = conversation.tools is not None
        tokens = tokenise(conversation, renderer(with_tools), tokenizer, learn)
        example = _example(tokens)
        if len(example.tokens) > max_length:
          longer[number] = len(example.tokens)
          if too_long.startswith("cut"):
            keeps_bos = example.tokens[0] == tokenizer.bos_id
            example = _cut(example, tokens.turns, max_length, too_long == "cut_left", keeps_bos)
      except ValueError as error:
        raise ValueError(f"{_where(number, record)}: {error}") from None
      if number in longer and too_long == "drop":
        left_out += 1
      else:
        kept.append(dataclasses.replace(example, left_out=left_out))
        left_out = 0
  if longer and too_long == "error":
    raise ValueError(
      f"{len(longer)} of {len(records)} conversations are longer than max_length {max_length} "
      f"(first: {_where(first := min(longer), records[first])}); use max_length >= "
      f"{max(longer.values())}, or let data.too_long cut or drop them"
    )
  if not kept:
    raise ValueError(
      f"all {len(records)} conversations are longer than max_length {max_length}, so that none is "
      f"left; use max_length >= {min(longer.values())}"
    )
  kept[-1] = dataclasses.replace(kept[-1], left_out=kept[-1].left_out + left_out)
  return kept


def tokenise(
  conversation: Conversation, renderer: Renderer, tokenizer: Tokenizer, learn: str
) -> Tokens:
  """Returns the tokens of a conversation, and those that the loss covers; see the module.

  Raises:
    ValueError: as `encode` does.
  """
  special = renderer.template.special
  _check_special(conversation, special)
  with renderer.named():
    text, spans = _spans(conversation, renderer, learn)
    _check_written(conversation, text.text)
    ids, offsets = tokenizer.encode_pieces(text.pieces)
    turns = [
      [n for n, (first, last) in enumerate(offsets) if first < end and last > start]
      for start, end in spans
    ]
    turns = [turn for turn in turns if turn]
    if not any(n for turn in turns for n in turn):  # before the first token is nothing
      raise TemplateError(
        "marks nothing as the assistant's, so nothing is learnt; use another template"
      )
  begins = [offsets[turn[0]][0] for turn in turns]
  shared = any(first < start for first, (start, _) in zip(begins, spans, strict=False))
  return Tokens(text.text, ids, turns, shared)


def end_of_turn(renderer: Renderer) -> str | None:
  """Returns the special token that ends the assistant's turns, or None where there is none.

  It is the first of those that a short conversation closes with.

  Raises:
    ValueError: for a template that does not take one.
  """
  asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  with renderer.named():
    (text,) = renderer.render(asked, None, [(2, False)])
    text = chat_templates.read(text).text
  end = _end(text, text.rfind("b") + 1, renderer.template.special)
  return next((x for x in renderer.template.special if text.endswith(x, 0, end)), None)


def _spans(
  conversation: Conversation, renderer: Renderer, learn: str
) -> tuple[Text, list[tuple[int, int]]]:
  """The text of a conversation, and where in it the turns are that are learnt."""
  given, tools = conversation
  if renderer.marked:
    text = chat_templates.read(renderer.render(given, tools, [(len(given), False)])[0])
    spans: list[tuple[int, int]] = []
    for start, end in text.learnt:
      if spans and spans[-1][1] == start:
        spans[-1] = spans[-1][0], end  # a turn in several blocks
      elif end > start:
        spans.append((start, end))
    return text, spans[-1:] if learn == "last" else spans

  asked = [n for n, message in enumerate(given) if message["role"] == "assistant"]
  asked = asked[-1:] if learn == "last" else asked
  # The last message is the assistant's, so that the whole is among them.
  renderings = [x for n in asked for x in ((n, True), (n + 1, False))]
  found = dict(zip(renderings, renderer.render(given, tools, renderings), strict=True))
  whole = found[len(given), False]
  text = chat_templates.read(whole)
  spans = []
  for n in asked:
    before, turn = found[n, True], found[n + 1, False]
    if not turn.startswith(before):
      raise _not_a_beginning(n, before, turn, "before the answer, with a generation prompt")
    end = _end(turn, len(before), renderer.template.special)
    if not whole.startswith(turn[:end]):
      raise _not_a_beginning(n, turn[:end], whole, "as the last turn")
    spans.append((text.unmarked(len(before)), text.unmarked(end)))
  return text, spans


def _end(text: str, start: int, special: Sequence[str]) -> int:
  """Where a turn ends that begins at `start` and lasts to the end of a text, or sooner.

  It ends with the first of the special tokens at the end of the text.
  """
  end, found = len(text), len(text)
  while True:
    end = start + len(text[start:end].rstrip())
    token = next((x for x in special if text.endswith(x, start, end)), None)
    if token is None:
      return found
    found, end = end, end - len(token)


def _not_a_beginning(message: int, expected: str, text: str, how: str) -> TemplateError:
  pairs = zip(expected, text, strict=False)
  at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(text)))
  ours, theirs = (chat_templates.read_plainly(x[at : at + _BEGINNING]) for x in (expected, text))
  return TemplateError(
    f"writes message {message} or what is before it in one way {how} ({ours!r}), and in another "
    f"where more follows ({theirs!r}), so that it is not known what the assistant writes; use a "
    "template with {% generation %}, or task.learn 'last' where earlier turns alone change"
  )


def _check_special(conversation: Conversation, special: Sequence[str]) -> None:
  """Raises ValueError where a special token would be made of texts that hold none.

  Names of fields are not told from a template's own text; parts of a message may join.
  """
  pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")

  def names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
      yield from value
    if isinstance(value, dict | list):
      for each in value.values() if isinstance(value, dict) else value:
        yield from names(each)

  for name in names(list(conversation)):
    if pattern.search(name):
      raise ValueError(f"the name of a field, {shown(name)}, holds a special token; rename it")
  for n, message in enumerate(conversation.messages):
    content = message.get("content")
    if isinstance(content, list):
      texts = [part["text"] for part in content]
      if pattern.findall("".join(texts)) != [x for text in texts for x in pattern.findall(text)]:
        raise ValueError(f"message {n}: its parts join to a special token; make one part of them")


def _check_written(conversation: Conversation, text: str) -> None:
  """Raises ValueError where a template leaves out a question, an answer, a tool or a call.

  Of a message the end is looked for: a template may leave out the thoughts before an answer.
  """
  remedy = "use a template that writes it, or leave the record out"
  for n, message in enumerate(conversation.messages):
    if message["role"] in ("user", "assistant") and "tool_calls" not in message:
      content = message["content"]
      content = content if isinstance(content, str) else content[-1]["text"]
      if content.strip()[-_ENDING:] not in text:
        shortly = shown(content, _BEGINNING)
        raise TemplateError(f"leaves out the text of message {n}, {shortly}; {remedy}")
  calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
  for what, given in (("the tool", conversation.tools or ()), ("the call of", calls)):
    for each in given:
      inner = each["function"] if isinstance(each.get("function"), dict) else each
      name = inner.get("name")
      if isinstance(name, str) and name not in text:
        raise TemplateError(f"leaves out {what} {shown(name)}; {remedy}")


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
  """An example of `max_length` tokens, which has more."""
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
  """A record by its number, and by its beginning: it may stand elsewhere in its file."""
  given = record.get("messages")
  for message in given if isinstance(given, list) else ():
    if isinstance(message, dict) and message.get("content"):
      return f"record {number}, which has {shown(message['content'], _BEGINNING)}"
  return f"record {number}"
