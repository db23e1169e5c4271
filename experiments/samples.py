"""A few held-out examples with what the model makes of them, before training and after, for people.

chosen = choose(held_out, 4)
answer = make_answer(apply, pretrained, chosen, mesh)
samples = describe(chosen, tokenizer)     # [{"prompt": ..., "wanted": ...}, ...]
add(samples, "before", answer(weights))   # [{"prompt": ..., "wanted": ..., "before": ...}, ...]
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.data.examples import Example
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import decode, llama
from lora_jax.train import generation

PyTree = Any
Sample = dict[str, str]


def choose(examples: Sequence[Example], count: int) -> list[Example]:
  """So many of the examples, evenly spread over them; all, where there are no more."""
  count = min(count, len(examples))
  return [examples[n * len(examples) // count] for n in range(count)]


def describe(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Sample]:
  """The prompt of each example, as the model sees it, and the completion that is wanted."""
  return [
    {
      "prompt": tokenizer.decode(example.tokens[: example.prompt_length]),
      "wanted": tokenizer.decode(_without_end(example.targets, tokenizer.eos_id)),
    }
    for example in examples
  ]


def add(samples: Sequence[Sample], when: str, texts: Sequence[str]) -> None:
  """Adds a text to each sample."""
  for sample, text in zip(samples, texts, strict=True):
    sample[when] = text


def make_answer(
  apply: Callable, pretrained: Pretrained, examples: Sequence[Example], mesh: Mesh
) -> Callable[[PyTree], list[str]]:
  """Makes `weights -> the text that the model greedily writes after each example's prompt`.

  A text has at most as many tokens as the longest completion that is wanted. Of several processes
  all must call it.

  Args:
    apply: the adapted `model.apply`.
    pretrained: its configuration and tokenizer.
    examples: one or more.
    mesh: where the weights lie.
  """
  tokenizer, config = pretrained.tokenizer, pretrained.config
  prompts = [example.tokens[: example.prompt_length] for example in examples]
  generate_step = generation.make_generate_step(
    apply,
    functools.partial(llama.init_cache, config, dtype=config.dtype),
    max_tokens=max(len(example.targets) for example in examples),
    beams=1,
    penalty=decode.power(1.0),
    eos_id=tokenizer.eos_id,
  )
  [batch] = generation.prompt_batches(
    prompts,
    batch_size=-(-len(prompts) // mesh.size) * mesh.size,  # the rows are shared out
    buckets=(max(map(len, prompts)),),
    pad_id=tokenizer.pad_id,
  )

  def answer(weights: PyTree) -> list[str]:
    found = generation.generate(
      lambda *inputs: sharding.gather(generate_step(*inputs)), weights, [batch], tokenizer.eos_id
    )
    return [tokenizer.decode(tokens) for tokens in found]

  return answer


def _without_end(tokens: Sequence[int], eos_id: int | None) -> Sequence[int]:
  return tokens[:-1] if tokens and tokens[-1] == eos_id else tokens
