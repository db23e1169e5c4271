r"""Prompts and their completions: a language model learns to write what follows a text.

data.prompt = "Review: {text}\nSentiment:"
data.completion = " {label}"
data.choices = (" positive", " negative")      # for the accuracy; () for none

Its fields stand in the config's `data`. The loss is taken on the completion alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from lora_jax.data import examples, records, references, templates
from lora_jax.data.examples import Example
from lora_jax.models import decode
from lora_jax.tasks.texts import Texts, check_generation
from lora_jax.train import generation

PyTree = Any
Text = dict[str, Any]

# What the configs of earlier runs, which lack a field, meant without it.
_BEFORE_THE_FIELD = {"special_tokens": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion(Texts):
  """See the module; its other fields are those of `Texts`. A longer prompt loses its beginning.

  prompt, completion: templates, see `lora_jax.data.templates`.
  choices: the texts that a model chooses among, as completions; () for none.
  append_eos: whether EOS ends a completion and is learnt.
  special_tokens: whether special tokens that are written out in a column are tokens.
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
    fields = {name: data[name] for name in names if name in data}
    fields |= {"choices": tuple(data["choices"]), "buckets": tuple(data["buckets"])}
    return cls(**_BEFORE_THE_FIELD | fields, loss_chunk=loss_chunk)

  # ---- records and examples

  def check_values(self, rows: Sequence[records.Record]) -> None:
    for name, template in self._templates().items():
      what = f"{name} template {template!r:.200}"
      records.check_values(rows, templates.fields(template), what)

  def check(self, rows: Sequence[records.Record]) -> None:
    for name, template in self._templates().items():
      templates.check(template, rows, name)

  def _templates(self) -> dict[str, str]:
    return {"prompt": self.prompt, "completion": self.completion}

  def examples(self, rows: Sequence[records.Record]) -> list[Example]:
    return examples.encode(
      rows,
      self.model.tokenizer,
      prompt=self.prompt,
      completion=self.completion,
      max_length=self.max_length,
      append_eos=self.append_eos,
      special_tokens=self.special_tokens,
    )

  def choice_ids(self) -> list[int]:
    """The first tokens of the choices, as they are at the end of the prompt."""
    return examples.choice_ids(
      self.model.tokenizer,
      self.choices,
      prompt=templates.ending(self.prompt) or "\n",
      special_tokens=self.special_tokens,
    )

  # ---- what people are shown

  def given(self, encoded: Sequence[Example]) -> list[dict[str, str]]:
    tokenizer = self.model.tokenizer
    return [
      {
        "prompt": tokenizer.decode(example.tokens[: example.prompt_length]),
        "wanted": tokenizer.decode(
          generation.until_end(example.targets, tokenizer.stop_ids),
          after=example.tokens[: example.prompt_length],
        ),
      }
      for example in encoded
    ]

  def make_show(
    self, apply: Callable, encoded: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """What the model greedily writes after each example's prompt.

    A text has at most as many tokens as the longest completion that is wanted, and as the model has
    positions for.
    """
    tokenizer, config = self.model.tokenizer, self.model.config
    prompts = [example.tokens[: example.prompt_length] for example in encoded]
    longest = max(len(example.targets) for example in encoded)
    generate_step = generation.make_generate_step(
      apply,
      self._new_cache,
      max_tokens=min(longest, config.max_length + 1 - max(map(len, prompts))),
      beams=1,
      penalty=decode.power(1.0),
      eos_id=tokenizer.stop_ids,
    )
    [batch] = generation.prompt_batches(
      prompts,
      batch_size=-(-len(prompts) // share) * share,
      buckets=(max(map(len, prompts)),),
      pad_id=tokenizer.pad_id,
    )

    def show(weights: PyTree) -> list[str]:
      found = generation.generate(
        lambda *inputs: put(generate_step(*inputs)), weights, [batch], tokenizer.stop_ids
      )
      return [
        tokenizer.decode(tokens, after=prompt)
        for prompt, tokens in zip(prompts, found, strict=True)
      ]

    return show

  # ---- texts for the prompts of a split, and their score

  def prompts(
    self, rows: Sequence[records.Record], encoded: Sequence[Example], limit: int | None
  ) -> list[Text]:
    """The different prompts of a split, in their order: `prompt`, `references` and `tokens`.

    The tokens are cut as they were for training.
    """
    known = references.by_prompt(rows, self.prompt, self.completion)
    found: dict[str, Text] = {}
    for record, example in zip(rows, encoded, strict=True):
      text = templates.fill(self.prompt, record)
      tokens = example.tokens[: example.prompt_length]
      found.setdefault(text, {"prompt": text, "references": known[text], "tokens": tokens})
    return list(found.values())[:limit]

  def write(
    self,
    apply: Callable,
    weights: PyTree,
    asked: Sequence[Text],
    *,
    batch_size: int,
    max_tokens: int,
    beams: int,
    length_penalty: float,
    watch: Callable[[Sequence], Any] = iter,
  ) -> list[Text]:
    """`prompt`, `text` and `references` of each prompt.

    apply: the adapted model.
    asked: as `prompts` returns them.
    max_tokens, beams: as in `lora_jax.train.generation`.
    length_penalty: the power of the length by which a beam search divides.
    watch: goes over the batches.

    Raises ValueError where the model has not the positions for it.
    """
    tokenizer, tokens = self.model.tokenizer, [each["tokens"] for each in asked]
    check_generation(tokens, max_tokens, self.model.config)
    generate_step = generation.make_generate_step(
      apply,
      self._new_cache,
      max_tokens=max_tokens,
      beams=beams,
      penalty=decode.power(length_penalty),
      eos_id=tokenizer.stop_ids,
    )
    data = generation.prompt_batches(
      tokens, batch_size, buckets=self.buckets, pad_id=tokenizer.pad_id
    )
    found = generation.generate(generate_step, weights, watch(data), tokenizer.stop_ids)
    return [
      {
        "prompt": each["prompt"],
        "text": tokenizer.decode(written, after=each["tokens"]).strip(),
        "references": each["references"],
      }
      for each, written in zip(asked, found, strict=True)
    ]

  def _new_cache(self, rows: int, slots: int) -> PyTree:
    """A cache for texts that `check_generation` lets through.

    Beyond the model's positions there is only padding, and the last token of a text, after which
    nothing is made.
    """
    return self.model.new_cache(rows, min(slots, self.model.config.max_length))

  def longest_choice(self) -> int | None:
    """The tokens of the longest choice; None where there are none."""
    encode = self.model.tokenizer.encode
    lengths = [len(encode(x, add_special_tokens=False)) for x in self.choices]
    return max(lengths, default=None)
