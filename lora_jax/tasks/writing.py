"""The base of tasks whose answers are texts, generated token by token until an end token."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Self

from lora_jax.data.batches import Watch
from lora_jax.data.examples import Example
from lora_jax.io.pretrained import Pretrained
from lora_jax.models import decode
from lora_jax.tasks.texts import Texts, check_generation
from lora_jax.train import generation

PyTree = Any
Text = dict[str, Any]


class ChatFormat(NamedTuple):
  """The format of conversations with a model, for `lora_jax.data.chat_templates`.

  template: the name of one of the model's templates, or a file; None for the default.
  date: the date for templates that print it, or None.
  """

  template: str | None = None
  date: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Texts):
  """A task whose examples have a prompt and a completion that the model generates."""

  def of_model(self, found: Pretrained) -> Self:
    if found.family.init_cache is None:
      raise ValueError(
        f"this task writes texts, and {found.source} is a {found.config.family!r}, which writes "
        "none; use a task that reads: classification, regression, embedding or images"
      )
    return super().of_model(found)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """The tokens that end a text."""
    return self.tokenizer.stop_ids

  @property
  def chat_format(self) -> ChatFormat:
    """The format of conversations with the model."""
    return ChatFormat()

  def decode_prompt(self, tokens: Sequence[int]) -> str:
    """Returns a prompt as text."""
    return self.tokenizer.decode(tokens)

  # ---- what people are shown

  def given(self, encoded: Sequence[Example]) -> list[dict[str, str]]:
    tokenizer = self.tokenizer
    return [
      {
        "prompt": self.decode_prompt(example.tokens[: example.prompt_length]),
        "wanted": tokenizer.decode(
          generation.until_end(example.completion, self.stop_ids),
          after=example.tokens[: example.prompt_length],
        ),
      }
      for example in encoded
    ]

  def make_show(
    self, apply: Callable, encoded: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """Returns `weights -> the greedy completion of each example's prompt`.

    Completions are no longer than the longest target, nor than the model's positions allow.
    """
    tokenizer, config = self.tokenizer, self.known_model.config
    prompts = [example.tokens[: example.prompt_length] for example in encoded]
    longest = max(len(example.completion) for example in encoded)
    generate_step = generation.make_generate_step(
      apply,
      self._new_cache,
      max_tokens=min(longest, config.max_length + 1 - max(map(len, prompts))),
      beams=1,
      penalty=decode.power(1.0),
      eos_id=self.stop_ids,
    )
    [batch] = generation.prompt_batches(
      prompts,
      batch_size=-(-len(prompts) // share) * share,
      buckets=(max(map(len, prompts)),),
      pad_id=tokenizer.pad_id,
    )

    def show(weights: PyTree) -> list[str]:
      found = generation.generate(
        lambda *inputs: put(generate_step(*inputs)), weights, [batch], self.stop_ids
      )
      return [
        tokenizer.decode(tokens, after=prompt)
        for prompt, tokens in zip(prompts, found, strict=True)
      ]

    return show

  def asked(self, *unused: Any) -> NoReturn:
    raise ValueError("this task writes texts; use experiments.generate")

  def predict(self, *unused: Any, **how: Any) -> NoReturn:
    raise ValueError("this task writes texts; use experiments.generate")

  # ---- texts for the prompts of a split

  def check_room(self, asked: Sequence[Text], max_tokens: int) -> None:
    """Raises ValueError if prompts and completions exceed the model's positions."""
    check_generation([each["tokens"] for each in asked], max_tokens, self.known_model.config)

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
    watch: Watch = iter,
  ) -> list[Text]:
    """Returns `prompt`, `text` and `references` of each prompt.

    apply: the adapted model.
    asked: the result of the task's `prompts`.
    max_tokens, beams: as in `lora_jax.train.generation`.
    length_penalty: the exponent of the length in the divisor of a beam search.
    watch: wraps the iterator of batches, e.g. with a progress bar.

    Raises ValueError if the texts exceed the model's positions.
    """
    tokenizer, tokens = self.tokenizer, [each["tokens"] for each in asked]
    self.check_room(asked, max_tokens)
    generate_step = generation.make_generate_step(
      apply,
      self._new_cache,
      max_tokens=max_tokens,
      beams=beams,
      penalty=decode.power(length_penalty),
      eos_id=self.stop_ids,
    )
    data = generation.prompt_batches(
      tokens, batch_size, buckets=self.buckets, pad_id=tokenizer.pad_id
    )
    found = generation.generate(generate_step, weights, watch(data), self.stop_ids)
    return [
      {
        "prompt": each["prompt"],
        "text": tokenizer.decode(written, after=each["tokens"]).strip(),
        "references": each["references"],
      }
      for each, written in zip(asked, found, strict=True)
    ]

  def _new_cache(self, rows: int, slots: int) -> PyTree:
    """Returns a cache for texts that pass `check_generation`.

    Beyond the model's positions there are only padding and the last token of a text, which is not
    fed to the model.
    """
    return self.known_model.new_cache(rows, min(slots, self.known_model.config.max_length))
