"""Decoding: tokens from a language model, with a KV cache or without, greedily or by sampling.

    tokens_BS = decode(
        model.apply, params, prompts_BT, lengths_B, steps=32, choose=greedy, key=jax.random.key(0),
        eos_id=2, cache=llama.init_cache(config, batch_size, max_length=96))

B prompts, T their longest length, S new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Choose = Callable[[jax.Array, jax.Array], jax.Array]  # (key, logits_BV) -> tokens_B


def greedy(key: jax.Array, logits_BV: jax.Array) -> jax.Array:
  """The token with the highest logit; the key is not used."""
  del key
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def nucleus(temperature: float, top_p: float) -> Choose:
  """Samples from the smallest set of tokens whose probability reaches `top_p`.

  Args:
    temperature: divides the logits; above 0.
    top_p: in (0, 1]; 1 samples from all tokens.

  Raises:
    ValueError: when one of them is out of its range.

  Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
  """
  if not temperature > 0:
    raise ValueError(f"temperature is {temperature}; it must be positive (choose greedy for 0)")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")

  def choose(key: jax.Array, logits_BV: jax.Array) -> jax.Array:
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is kept when those before it have not reached top_p yet, so the first one always is.
    kept_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV < top_p
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)

  return choose


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of different length as (tokens_BT padded on the right, lengths_B).

  Raises:
    ValueError: when there is no prompt, or one without a token.
  """
  if not prompts or not all(prompts):
    raise ValueError("every prompt needs at least one token to go on from")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.full((len(prompts), lengths.max()), pad_id, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return tokens, lengths


def decode(
  apply: Callable,
  params: PyTree,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  steps: int,
  choose: Choose,
  key: jax.Array,
  eos_id: int | None,
  cache: PyTree | None,
) -> jax.Array:
  """Returns the tokens that follow the prompts, (B, steps) int32; jit it with `steps` closed over.

  A row that has ended is filled up with `eos_id`; when all have, the rest is not computed.

  Args:
    apply: `model.apply` of a `llama.Llama`, adapted or not.
    params: its parameters.
    prompts_BT: token ids, padded on the right with anything.
    lengths_B: the length of each prompt, at least 1.
    steps: how many tokens to make, S.
    choose: `greedy`, or what `nucleus` returns, or `(key, logits_BV) -> tokens_B` of your own.
    key: a random key; step i uses `fold_in(key, i)`.
    eos_id: the token that ends a text, or None to make `steps` tokens in any case.
    cache: an empty cache with T + S slots or more; None computes the whole text anew at each step,
      which gives the same tokens and is slow.
  """
  batch, length = prompts_BT.shape
  text_BU = jnp.pad(prompts_BT, ((0, 0), (0, steps)))
  rows_B = jnp.arange(batch)

  def logits_at(tokens, positions_BT, at_B, cache):
    at_B1 = at_B[:, None]
    if cache is None:
      return apply({"params": params}, tokens, at_BC=at_B1)[:, 0], None
    logits, cache = apply(
      {"params": params}, tokens, positions_BT=positions_BT, at_BC=at_B1, cache=cache
    )
    return logits[:, 0], cache

  def going(state):
    step, *_, ended_B = state
    return (step < steps) & ~jnp.all(ended_B)

  def one_token(state):
    step, text_BU, logits_BV, cache, ended_B = state
    token_B = choose(jax.random.fold_in(key, step), logits_BV)
    if eos_id is not None:
      token_B = jnp.where(ended_B, eos_id, token_B)
      ended_B = ended_B | (token_B == eos_id)
    position_B = lengths_B + step
    text_BU = text_BU.at[rows_B, position_B].set(token_B)
    if cache is None:
      logits_BV, _ = logits_at(text_BU, None, position_B, None)
    else:
      at_B = jnp.zeros_like(position_B)
      logits_BV, cache = logits_at(token_B[:, None], position_B[:, None], at_B, cache)
    return step + 1, text_BU, logits_BV, cache, ended_B

  first = prompts_BT if cache is not None else text_BU
  positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
  logits_BV, cache = logits_at(first, positions_BT, lengths_B - 1, cache)
  ended_B = jnp.zeros(batch, bool)
  made, text_BU, *_ = jax.lax.while_loop(going, one_token, (0, text_BU, logits_BV, cache, ended_B))

  new_BS = lengths_B[:, None] + jnp.arange(steps)
  tokens_BS = jnp.take_along_axis(text_BU, new_BS, axis=1)
  if eos_id is None:
    return tokens_BS
  return jnp.where(jnp.arange(steps) < made, tokens_BS, eos_id)
