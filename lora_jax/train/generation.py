"""Generated texts for the prompts of a data set.

    generate_step = make_generate_step(
        lora_jax.adapt(model.apply), found.new_cache,
        max_tokens=80, beams=4, penalty=decode.power(1.0), eos_id=tokenizer.stop_ids)
    batches = prompt_batches(prompts, batch_size=16, buckets=(32, 64), pad_id=tokenizer.pad_id)
    found = generate(generate_step, weights, batches, tokenizer.stop_ids)
    texts = [tokenizer.decode(tokens, after=prompt) for prompt, tokens in zip(prompts, found)]

The letters are those of `lora_jax.models.decode`.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.data.batches import group
from lora_jax.models import decode

PyTree = Any


class Prompts(NamedTuple):
  """A batch of prompts.

  Attributes:
    tokens_BT: int32, padded on the right.
    lengths_B: int32, the length of each prompt.
    index_B: the index of each prompt; -1 for a row of padding.
  """

  tokens_BT: np.ndarray
  lengths_B: np.ndarray
  index_B: np.ndarray


def prompt_batches(
  prompts: Sequence[Sequence[int]], batch_size: int, buckets: Sequence[int], pad_id: int
) -> list[Prompts]:
  """Returns the prompts in batches of a few shapes, from the shortest to the longest.

  Args:
    prompts: token ids, at least one each.
    batch_size: B. The last batch is filled with copies of its first prompt; they end with the
      others, so they cost nothing.
    buckets: the possible lengths T, ascending; each compiles once.
    pad_id: any token of the vocabulary.

  Raises:
    ValueError: if there is no prompt, one without a token, or one longer than the last bucket.
  """
  tokens, lengths = decode.pad_prompts(prompts, pad_id)
  if lengths.max() > buckets[-1]:
    raise ValueError(
      f"prompt {lengths.argmax()} has {lengths.max()} tokens, more than the last bucket, "
      f"{buckets[-1]}; add a bucket"
    )
  missing = max(buckets[-1] - tokens.shape[1], 0)
  tokens = np.pad(tokens, ((0, 0), (0, missing)), constant_values=pad_id)
  found = []
  for rows in group(lengths, np.arange(len(prompts)), batch_size, buckets):
    filled = np.full(batch_size, rows.indices[0])
    filled[: len(rows.indices)] = rows.indices
    index = np.where(np.arange(batch_size) < len(rows.indices), filled, -1)
    found.append(Prompts(tokens[filled, : rows.length], lengths[filled], index))
  return found


def make_generate_step(
  apply: Callable,
  new_cache: Callable[[int, int], PyTree],
  *,
  max_tokens: int,
  beams: int,
  penalty: decode.Penalty,
  eos_id: decode.EosId,
) -> Callable:
  """Makes the jitted step `(weights, prompts_BT, lengths_B) -> tokens_BS` of one batch.

  Args:
    apply: the adapted `model.apply`.
    new_cache: `(batch size, slots) -> empty cache`, e.g. `Pretrained.new_cache`.
    max_tokens: the largest number of tokens of a text, S.
    beams: 1 for greedy decoding; more for the best text of a beam search. The search stops when
      none of its running texts would be better at its present length.
    penalty: the length penalty of a beam search.
    eos_id: the token that ends a text, several such tokens, or None.
  """

  @jax.jit
  def step(weights: PyTree, prompts_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    batch_size, length = prompts_BT.shape
    common = {
      "steps": max_tokens,
      "eos_id": eos_id,
      "cache": new_cache(batch_size, length + max_tokens),
    }
    if beams == 1:
      return decode.decode(
        apply,
        weights,
        prompts_BT,
        lengths_B,
        choose=decode.greedy,
        key=jax.random.key(0),
        **common,
      )
    found = decode.beam_search(
      apply, weights, prompts_BT, lengths_B, beams=beams, penalty=penalty, exact=False, **common
    )
    return found.tokens_BKS[:, 0]

  return step


def generate(
  generate_step: Callable, weights: PyTree, batches: Iterable[Prompts], eos_id: decode.EosId
) -> list[list[int]]:
  """Returns the tokens of each prompt's text, in the prompts' order, without the end token.

  Args:
    generate_step: as `make_generate_step` returns it.
    weights: the model's weights; merged ones save the adapters' thin products.
    batches: as `prompt_batches` returns them.
    eos_id: the token that ends a text, several such tokens, or None.
  """
  found: dict[int, list[int]] = {}
  for batch in batches:
    tokens_BS = generate_step(weights, batch.tokens_BT, batch.lengths_B)
    for index, tokens in zip(batch.index_B.tolist(), np.asarray(tokens_BS).tolist(), strict=True):
      if index >= 0:
        found[index] = until_end(tokens, eos_id)
  return [found[index] for index in range(len(found))]


def until_end(tokens: Sequence[int], eos_id: decode.EosId) -> list[int]:
  """Returns the tokens before the first that ends a text."""
  ends = decode.end_ids(eos_id)
  return list(itertools.takewhile(lambda token: token not in ends, tokens))
