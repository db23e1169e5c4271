r"""Prompts and completions: a language model learns to complete a text.

data.prompt = "Review: {text}\nSentiment:"
data.completion = " {label}"
data.choices = (" positive", " negative")      # for the accuracy; () for none

Its fields are in the config's `data`. The loss covers only the completion.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from lora_jax.data import examples, records, references, templates
from lora_jax.data.examples import Example
from lora_jax.tasks.writing import Text, Writing

# Values of fields that the configs of earlier runs lack.
_BEFORE_THE_FIELD: dict[str, Any] = {"special_tokens": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion(Writing):
  """See the module; its other fields are those of `Texts`. Long prompts lose their beginning.

  prompt, completion: templates, see `lora_jax.data.templates`.
  choices: the completions that the model chooses among; () for free text.
  append_eos: whether EOS ends a completion and is learned.
  special_tokens: whether special tokens in a column are parsed as tokens.
  """

  FIELDS: ClassVar[tuple[str, ...]] = ()

  prompt: str
  completion: str
  choices: tuple[str, ...]
  append_eos: bool
  special_tokens: bool

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    del task
    names = [field.name for field in dataclasses.fields(cls)]
    fields: dict[str, Any] = {name: data[name] for name in names if name in data}
    fields |= {"choices": tuple(data["choices"]), "buckets": tuple(data["buckets"])}
    return cls(**_BEFORE_THE_FIELD | fields, loss_chunk=loss_chunk)

  # ---- records and examples

  def read(self, rows: Sequence[records.Record]) -> tuple[list[records.Record], str]:
    for name, template in self._templates().items():
      what = f"{name} template {template!r:.200}"
      records.check_values(rows, templates.fields(template), what)
    return list(rows), ""

  def check(self, rows: Sequence[records.Record]) -> None:
    for name, template in self._templates().items():
      templates.check(template, rows, name)

  def _templates(self) -> dict[str, str]:
    return {"prompt": self.prompt, "completion": self.completion}

  def examples(self, rows: Sequence[records.Record]) -> list[Example]:
    return examples.encode(
      rows,
      self.tokenizer,
      prompt=self.prompt,
      completion=self.completion,
      max_length=self.max_length,
      append_eos=self.append_eos,
      special_tokens=self.special_tokens,
    )

  def choice_ids(self) -> list[int]:
    """Returns the first tokens of the choices after the prompt."""
    return examples.choice_ids(
      self.tokenizer,
      self.choices,
      prompt=templates.ending(self.prompt) or "\n",
      special_tokens=self.special_tokens,
    )

  # ---- texts for the prompts of a split, and their score

  def prompts(
    self, rows: Sequence[records.Record], encoded: Sequence[Example], limit: int | None
  ) -> list[Text]:
    """Returns the distinct prompts of a split, in order: `prompt`, `references` and `tokens`.

    The tokens are truncated as in training.
    """
    known = references.by_prompt(rows, self.prompt, self.completion)
    found: dict[str, Text] = {}
    for record, example in zip(rows, encoded, strict=True):
      text = templates.fill(self.prompt, record)
      tokens = example.tokens[: example.prompt_length]
      found.setdefault(text, {"prompt": text, "references": known[text], "tokens": tokens})
    return list(found.values())[:limit]

  def longest_choice(self) -> int | None:
    """Returns the number of tokens of the longest choice; None if there are no choices."""
    encode = self.tokenizer.encode
    lengths = [len(encode(x, add_special_tokens=False)) for x in self.choices]
    return max(lengths, default=None)
