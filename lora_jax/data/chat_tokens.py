"""Conversations as tokens: which tokens the loss covers, and the prompt for an answer.

This is the output of SmolLM2's template. The loss covers the underlined tokens:

  <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>⏎
                                                     ‾‾‾‾‾‾‾‾‾‾‾‾‾‾‾‾

**Which tokens the loss covers.** A template may mark them by `{% generation %}` blocks. The loss
then covers every token with a character in a block, as in `transformers`'
`return_assistant_tokens_mask`.

Without marks, prefixes of the conversation are rendered. The turn of message i is the text that
messages[:i + 1] add to messages[:i] with a generation prompt, which must be a prefix. A turn ends
with its end-of-turn token, the first of the special tokens at its end. Line breaks and an EOS after
that token are not covered.

**Templates that change earlier turns.** Some templates change earlier turns when later ones follow,
for example to drop earlier reasoning. Each turn is learned in a rendering where it and everything
before it read as if the turn were the last, since the model sees this text when it writes the turn.
The rendering of the whole conversation covers the last turn, and earlier ones that it does not
change. The latest remaining turn is the last one of the next rendering, and so on. One conversation
then becomes several sequences of tokens, and each turn is learned in one of them. With Qwen 3's
template there is one sequence per turn.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lora_jax.checks import shown
from lora_jax.data import chat_templates
from lora_jax.data.chat_templates import Renderer, TemplateError, Text
from lora_jax.data.messages import Conversation, Message
from lora_jax.io.tokenizer import Tokenizer

_BEGINNING = 60  # characters of a conversation in an error
_ENDING = 20  # characters of a message that the rendered text must contain


class Tokens(NamedTuple):
  """A conversation as tokens.

  text: the output of the template.
  ids: its tokens, without any added prefix.
  turns: the token indices of each turn that the loss covers.
  messages: the number of messages of the conversation that are included, from the first.
  shared: whether the first token of a turn begins before it.
  """

  text: str
  ids: list[int]
  turns: list[list[int]]
  messages: int
  shared: bool

  @property
  def mask(self) -> list[int]:
    """1 for each token that is learned, as in `transformers`."""
    learnt = set(itertools.chain.from_iterable(self.turns))
    return [int(n in learnt) for n in range(len(self.ids))]


def tokenise(
  conversation: Conversation, renderer: Renderer, tokenizer: Tokenizer, learn: str
) -> list[Tokens]:
  """Returns the tokens of a conversation, and those that the loss covers; see the module.

  The result has several items if the template changes earlier turns, ordered by their last turns.

  Args:
    conversation: from `lora_jax.data.messages.check`.
    renderer: of its template.
    tokenizer: of the model.
    learn: "all" turns of the assistant, or only the "last".

  Raises:
    ValueError: for a conversation that the template rejects, and if it marks nothing.
  """
  special = renderer.template.special
  _check_special(conversation, special)
  with renderer.named():
    return [
      _tokens(conversation.messages[:count], conversation.tools, text, spans, tokenizer)
      for count, text, spans in _renderings(conversation, renderer, learn)
    ]


def ask(conversation: Conversation, renderer: Renderer, tokenizer: Tokenizer) -> list[int]:
  """Returns the prompt tokens for the assistant's answer to a conversation.

  Args:
    conversation: from `lora_jax.data.messages.check_asked`.
    renderer, tokenizer: as in `tokenise`.

  Raises:
    ValueError: for a conversation that the template rejects.
  """
  given, tools = conversation
  _check_special(conversation, renderer.template.special)
  with renderer.named():
    [text] = renderer.render(given, tools, [(len(given), True)])
    text = chat_templates.read(text)
    _check_written(given, tools, text.text)
    ids, _ = tokenizer.encode_pieces(text.pieces)
    if not ids:
      raise TemplateError("writes nothing of a conversation; use another template")
  return ids


def stop_ids(renderer: Renderer, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the tokens that end an answer: the template's end of a turn, and the model's own.

  Raises:
    ValueError: as `end_of_turn` does.
  """
  end = end_of_turn(renderer)
  own = () if end is None else (tokenizer.special_tokens[end],)
  return tuple(dict.fromkeys((*own, *tokenizer.stop_ids)))


def _tokens(
  given: Sequence[Message],
  tools: Sequence[Any] | None,
  text: Text,
  spans: Sequence[tuple[int, int]],
  tokenizer: Tokenizer,
) -> Tokens:
  """The tokens of a rendering, and the tokens in given spans of its text."""
  _check_written(given, tools, text.text)
  ids, offsets = tokenizer.encode_pieces(text.pieces)
  turns = [
    [n for n, (first, last) in enumerate(offsets) if first < end and last > start]
    for start, end in spans
  ]
  turns = [turn for turn in turns if turn]
  if not any(n for turn in turns for n in turn):  # before the first token is nothing
    raise TemplateError(
      "marks nothing as the assistant's, so nothing is learned; use another template"
    )
  begins = [offsets[turn[0]][0] for turn in turns]
  shared = any(first < start for first, (start, _) in zip(begins, spans, strict=False))
  return Tokens(text.text, ids, turns, len(given), shared)


def end_of_turn(renderer: Renderer) -> str | None:
  """Returns the special token that ends the assistant's turns, or None.

  It is the first special token at the end of a short conversation.

  Raises:
    ValueError: for a template that rejects a short conversation.
  """
  asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  with renderer.named():
    (text,) = renderer.render(asked, None, [(2, False)])
    text = chat_templates.read(text).text
  end = _end(text, text.rfind("b") + 1, renderer.template.special)
  return next((x for x in renderer.template.special if text.endswith(x, 0, end)), None)


def _renderings(
  conversation: Conversation, renderer: Renderer, learn: str
) -> list[tuple[int, Text, list[tuple[int, int]]]]:
  """The renderings in which turns are learned: the number of messages of each, its text, and the
  spans of these turns in it."""
  given, tools = conversation
  if renderer.marked:
    text = chat_templates.read(renderer.render(given, tools, [(len(given), False)])[0])
    spans: list[tuple[int, int]] = []
    for start, end in text.learnt:
      if spans and spans[-1][1] == start:
        spans[-1] = spans[-1][0], end  # a turn in several blocks
      elif end > start:
        spans.append((start, end))
    return [(len(given), text, spans[-1:] if learn == "last" else spans)]

  # The last message is the assistant's, so the whole conversation is among them.
  left = [n for n, message in enumerate(given) if message["role"] == "assistant"]
  left = left[-1:] if learn == "last" else left
  asked = [x for n in left for x in ((n, True), (n + 1, False))]
  texts = dict(zip(asked, renderer.render(given, tools, asked), strict=True))
  found = []
  while left:
    whole = texts[left[-1] + 1, False]
    text, spans, others = chat_templates.read(whole), [], []
    for n in left:
      before, turn = texts[n, True], texts[n + 1, False]
      if not turn.startswith(before):
        raise _not_a_beginning(n, before, turn)
      end = _end(turn, len(before), renderer.template.special)
      if whole.startswith(turn[:end]):
        spans.append((text.unmarked(len(before)), text.unmarked(end)))
      else:
        others.append(n)
    found.append((left[-1] + 1, text, spans))
    left = others
  return found[::-1]


def _end(text: str, start: int, special: Sequence[str]) -> int:
  """Returns the end of a turn that begins at `start`.

  It ends with the first of the special tokens at the end of the text.
  """
  end, found = len(text), len(text)
  while True:
    end = start + len(text[start:end].rstrip())
    token = next((x for x in special if text.endswith(x, start, end)), None)
    if token is None:
      return found
    found, end = end, end - len(token)


def _not_a_beginning(message: int, before: str, turn: str) -> TemplateError:
  pairs = zip(before, turn, strict=False)
  at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(turn)))
  ours, theirs = (chat_templates.read_plainly(x[at : at + _BEGINNING]) for x in (before, turn))
  return TemplateError(
    f"writes what is before message {message} in one way with a generation prompt ({ours!r}), and "
    f"in another with the answer ({theirs!r}), so that it is not known what the assistant writes; "
    "use a template with {% generation %}"
  )


def _check_special(conversation: Conversation, special: Sequence[str]) -> None:
  """Raises ValueError if texts without a special token would render as one.

  The template's own text cannot be distinguished from names of fields; parts of a message may join.
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


def _check_written(given: Sequence[Message], tools: Sequence[Any] | None, text: str) -> None:
  """Raises ValueError if a template omits a question, an answer, a tool or a call.

  Only the end of each message must occur: a template may omit the reasoning before an answer.
  """
  remedy = "use a template that writes it, or leave the record out"
  for n, message in enumerate(given):
    if message["role"] in ("user", "assistant") and "tool_calls" not in message:
      content = message["content"]
      content = content if isinstance(content, str) else content[-1]["text"]
      if content.strip()[-_ENDING:] not in text:
        shortly = shown(content, _BEGINNING)
        raise TemplateError(f"leaves out the text of message {n}, {shortly}; {remedy}")
  calls = [call for message in given for call in message.get("tool_calls", ())]
  for what, each_of in (("the tool", tools or ()), ("the call of", calls)):
    for each in each_of:
      inner = each["function"] if isinstance(each.get("function"), dict) else each
      name = inner.get("name")
      if isinstance(name, str) and name not in text:
        raise TemplateError(f"leaves out {what} {shown(name)}; {remedy}")
