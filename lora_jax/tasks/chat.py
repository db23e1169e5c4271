"""Conversations: a language model learns the assistant's turns, as its chat template writes them.

task.name = "chat"
task.learn = "all"           # all turns of the assistant, or only the "last"
task.template = None         # the model's own; or the name of another of its own, or a .jinja file
task.date = "2026-01-01"     # for templates that print the date

A table has `messages`, or another layout of `lora_jax.data.conversations`. The loss covers the
tokens of the assistant's turns, including the end of each turn; see `lora_jax.data.chat_tokens`. In
generation and in samples, the model writes the last turn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from lora_jax.checks import shown
from lora_jax.data import chat, chat_templates, chat_tokens, conversations, records
from lora_jax.data.examples import Example
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks.writing import ChatFormat, Text, Writing
from lora_jax.train import generation

_COUNTS = ("conversations", "examples", "cut", "left_out", "longest", "learnt", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Writing):
  """See the module; its other fields are those of `Texts`.

  conversation: the layout of the table, an argument of `lora_jax.data.conversations.read`.
  learn, template, date, too_long: arguments of `lora_jax.data.chat.encode`.
  ends: the tokens that end a turn; () until `of_model`.
  """

  FIELDS: ClassVar[tuple[str, ...]] = ("learn", "template", "date")

  conversation: str
  learn: str
  template: str | None
  date: str
  too_long: str
  ends: tuple[int, ...] = ()

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    chat_templates.check_date("task.date", task["date"])
    if task["template"] is not None and chat_templates.is_file(task["template"]):
      chat_templates.read_file(task["template"])
    return cls(
      conversation=data["conversation"],
      learn=task["learn"],
      template=task["template"],
      date=task["date"],
      too_long=data["too_long"],
      max_length=data["max_length"],
      buckets=tuple(data["buckets"]),
      packed_length=data["packed_length"],
      loss_chunk=loss_chunk,
    )

  # ---- records and examples

  def read(self, rows: Sequence[records.Record]) -> tuple[list[records.Record], str]:
    return conversations.read(rows, self.conversation)

  def check(self, rows: Sequence[records.Record]) -> None:
    """Does nothing, since `read` checks each conversation."""

  def of_model(self, found: Pretrained) -> Self:
    bound = super().of_model(found)
    template = chat_templates.find(bound.tokenizer, self.template)
    with chat_templates.Renderer(template, date=self.date) as renderer:
      ends = chat_tokens.stop_ids(renderer, bound.tokenizer)
    return dataclasses.replace(bound, ends=ends)

  def examples(self, rows: Sequence[records.Record]) -> list[Example]:
    return chat.encode(
      rows,
      self.tokenizer,
      self.template,
      date=self.date,
      learn=self.learn,
      max_length=self.max_length,
      too_long=self.too_long,
    )

  def choice_ids(self) -> list[int]:
    return []

  def describe(self, **encoded: Sequence[Example]) -> dict[str, Any]:
    return {
      "max_length": self.max_length,
      "positions": self.known_model.config.max_length,
      "splits": {
        name: {
          "conversations": sum(not example.continues for example in each),
          "examples": len(each),
          "cut": sum(example.cut > 0 for example in each),
          "left_out": sum(example.left_out for example in each),
          "longest": max(len(example.inputs) for example in each),
          "learnt": sum(len(example.targets) for example in each),
          "tokens": sum(len(example.tokens) for example in each),
        }
        for name, each in encoded.items()
      },
    }

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    splits = described.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(x, dict) for x in splits.values()):
      raise ValueError(f"data splits is {shown(splits)}")
    counts = {f"data {name}": described.get(name) for name in ("max_length", "positions")}
    for split in splits.values():
      for name, count in (counts | {f"data {x}": split.get(x) for x in _COUNTS}).items():
        if type(count) is not int:
          raise ValueError(f"{name} is {shown(count)}")
    return [
      f"{name}: {_words_of(split)}, {split['cut']:,} of them cut to max_length "
      f"{described['max_length']:,}; {split['left_out']:,} longer ones left out; "
      f"{split['learnt']:,} of {split['tokens']:,} tokens learned; the longest input has "
      f"{split['longest']:,} tokens, the model {described['positions']:,} positions"
      for name, split in splits.items()
    ]

  # ---- the last turn as a text

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return self.ends

  def decode_prompt(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=False)

  def prompts(
    self, rows: Sequence[records.Record], encoded: Sequence[Example], limit: int | None
  ) -> list[Text]:
    """Returns the distinct conversations before the last turn, in order: `prompt`, `references`
    (the last turns) and `tokens`."""
    del rows  # some are not examples
    found: dict[tuple[int, ...], Text] = {}
    for example in encoded:
      tokens = example.tokens[: example.prompt_length]
      wanted = generation.until_end(example.completion, self.stop_ids)
      new = {"prompt": self.decode_prompt(tokens), "references": [], "tokens": tokens}
      answer = self.tokenizer.decode(wanted, after=tokens).strip()
      found.setdefault(tokens, new)["references"].append(answer)
    return list(found.values())[:limit]

  def longest_choice(self) -> None:
    """Returns None, since answers are free."""

  @property
  def chat_format(self) -> ChatFormat:
    return ChatFormat(self.template, self.date)


def _words_of(split: Mapping[str, int]) -> str:
  """Describes the number of conversations and of examples."""
  if split["conversations"] == split["examples"]:
    return f"{split['examples']:,} conversations"
  return (
    f"{split['conversations']:,} conversations in {split['examples']:,} examples, for the template "
    "changes earlier turns"
  )
