"""Decoding: tokens from a language model, greedily, by sampling or by beam search.

    tokens_BS = decode(
        model.apply, params, prompts_BT, lengths_B, steps=32, choose=greedy, key=jax.random.key(0),
        eos_id=2, cache=llama.init_cache(config, batch_size, max_length=96))

    tokens_BKS, scores_BK = beam_search(
        model.apply, params, prompts_BT, lengths_B, steps=32, beams=4, penalty=power(1.0),
        eos_id=2, cache=llama.init_cache(config, batch_size, max_length=96), exact=True)

Each works with a KV cache, or slowly without one. `lora_jax.models.streaming` yields the tokens of
`decode` one by one.

B prompts, T their longest length, S new tokens, V vocabulary, U = T + S. In beam search K beams per
prompt, C candidates for their next token (2 K, and K more for each further token that ends a text),
and R = B K rows that the model sees.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Choose = Callable[[jax.Array, jax.Array], jax.Array]  # (key, logits_BV) -> tokens_B
EosId = int | Sequence[int] | None
"""The token that ends a text, or several of which each does, or None."""
Penalty = Callable[[jax.Array | int], jax.Array]  # length -> divisor of a log-probability


def greedy(key: jax.Array, logits_BV: jax.Array) -> jax.Array:
  """Returns the token with the highest logit; the key is not used."""
  del key
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def nucleus(temperature: float, top_p: float) -> Choose:
  """Returns a sampler from the smallest set of tokens whose probability reaches `top_p`.

  Args:
    temperature: divides the logits; above 0.
    top_p: in (0, 1]; 1 samples from all tokens.

  Raises:
    ValueError: if one of them is out of range.

  Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
  """
  if not 0 < temperature < math.inf:
    raise ValueError(
      f"temperature is {temperature}; it must be positive and finite (choose greedy for 0)"
    )
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")

  def choose(key: jax.Array, logits_BV: jax.Array) -> jax.Array:
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is kept if those before it do not reach top_p, so the first one is always kept.
    kept_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV < top_p
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)

  return choose


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts of different lengths as (tokens_BT padded on the right, lengths_B).

  Raises:
    ValueError: if there is no prompt, or an empty one.
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
  eos_id: EosId,
  cache: PyTree | None,
) -> jax.Array:
  """Returns the tokens that follow the prompts, (B, steps) int32; jit it with `steps` closed over.

  A row that has ended is padded with `eos_id`, the first one if there are several. Decoding stops
  when all rows have ended.

  Args:
    apply: `model.apply` of a `llama.Llama`, adapted or not.
    params: its parameters.
    prompts_BT: token ids, padded on the right with anything.
    lengths_B: the length of each prompt, at least 1.
    steps: the number of new tokens, S.
    choose: `greedy`, the result of `nucleus`, or your own `(key, logits_BV) -> tokens_B`.
    key: a random key; step i uses `fold_in(key, i)`.
    eos_id: the token or tokens that end a text, or None to always decode `steps` tokens.
    cache: an empty cache with at least T + S slots; None recomputes the whole text at each step,
      which gives the same tokens and is slow.
  """
  ends = end_ids(eos_id)
  batch = len(prompts_BT)
  text_BU = jnp.pad(prompts_BT, ((0, 0), (0, steps)))
  rows_B = jnp.arange(batch)

  def going(state):
    step, *_, ended_B = state
    return (step < steps) & ~jnp.all(ended_B)

  def one_token(state):
    step, text_BU, logits_BV, cache, ended_B = state
    token_B = choose(jax.random.fold_in(key, step), logits_BV)
    if ends:
      token_B = jnp.where(ended_B, ends[0], token_B)
      ended_B = ended_B | jnp.isin(token_B, np.array(ends))
    position_B = lengths_B + step
    text_BU = text_BU.at[rows_B, position_B].set(token_B)
    if cache is None:
      logits_BV = _logits_of_text(apply, params, text_BU, position_B)
    else:
      logits_BV, cache = _logits_after(apply, params, token_B, position_B, cache)
    return step + 1, text_BU, logits_BV, cache, ended_B

  logits_BV, cache = _read_prompts(apply, params, prompts_BT, lengths_B, cache)
  ended_B = jnp.zeros(batch, bool)
  made, text_BU, *_ = jax.lax.while_loop(going, one_token, (0, text_BU, logits_BV, cache, ended_B))

  new_BS = lengths_B[:, None] + jnp.arange(steps)
  tokens_BS = jnp.take_along_axis(text_BU, new_BS, axis=1)
  if not ends:
    return tokens_BS
  return jnp.where(jnp.arange(steps) < made, tokens_BS, ends[0])


def end_ids(eos_id: EosId) -> tuple[int, ...]:
  """The tokens that end a text, as a tuple."""
  return () if eos_id is None else tuple(np.atleast_1d(np.asarray(eos_id, int)).tolist())


def power(alpha: float) -> Penalty:
  """The length penalty `length ** alpha`; `transformers` divides by it, as did Jean et al. 2015.

  Args:
    alpha: 0 compares sums of log-probabilities, 1 their means; larger values favor longer texts.
  """
  return lambda length: jnp.asarray(length, jnp.float32) ** alpha


def gnmt(alpha: float) -> Penalty:
  """The length penalty `((5 + length) / 6) ** alpha`.

  Args:
    alpha: 0 compares sums of log-probabilities; larger values favor longer texts. The paper uses
      0.6 to 0.7.

  Source: Wu et al. 2016, "Google's Neural Machine Translation System", equation 14.
  """
  return lambda length: ((5 + jnp.asarray(length, jnp.float32)) / 6) ** alpha


class Beams(NamedTuple):
  """The texts found by beam search for each prompt, the best first.

  Attributes:
    tokens_BKS: int32; a text that has ended is padded with EOS.
    scores_BK: float32, `log p(text | prompt) / penalty(length)`, with the EOS included in both;
      -inf if there are fewer than K texts.
  """

  tokens_BKS: jax.Array
  scores_BK: jax.Array


def beam_search(
  apply: Callable,
  params: PyTree,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  steps: int,
  beams: int,
  penalty: Penalty,
  eos_id: EosId,
  cache: PyTree | None,
  exact: bool,
) -> Beams:
  """Searches for the most likely texts after the prompts; jit it with all but arrays closed over.

  Each step extends the K running texts of a prompt by every token and keeps the K most likely ones
  that do not end. A text that ends, by EOS or by its length S, is finished if it is among the K
  most likely. The K finished texts with the highest scores are returned. With K = V^S the search
  is exhaustive.

  Args:
    apply, params, prompts_BT, lengths_B: as in `decode`.
    steps: the most tokens of a text, S.
    beams: K.
    penalty: `power`, `gnmt`, or your own monotonic function.
    eos_id: the token or tokens that end a text, or None if every text has S tokens.
    cache: an empty cache of B rows with at least T + S slots. Its leaves are (..., B, S, K, H), as
      those of `llama.init_cache`. None recomputes the whole text at each step.
    exact: the stopping rule of a prompt. True: stop when no continuation of a running text can
      enter the K best (`early_stopping="never"` in `transformers`). False: stop when no running
      text would enter them at its present length (`early_stopping=False` there, its default). This
      stops earlier and rarely changes the result.

  Raises:
    ValueError: for less than one beam.
  """
  if beams < 1:
    raise ValueError(f"beams is {beams}; there must be at least 1")
  ends = end_ids(eos_id)
  candidates = (1 + max(1, len(ends))) * beams
  batch = len(prompts_BT)
  parent_of_row = jnp.repeat(jnp.arange(batch), beams)
  length_R = lengths_B[parent_of_row]

  def text_RU(new_BKS):
    """Prompts with the tokens after them, for a model without a cache."""
    text = jnp.pad(prompts_BT, ((0, 0), (0, steps)))[parent_of_row]
    at_RS = length_R[:, None] + jnp.arange(steps)
    return text.at[jnp.arange(len(text))[:, None], at_RS].set(new_BKS.reshape(-1, steps))

  def going(state):
    step, *_, open_B = state
    return (step < steps) & jnp.any(open_B)

  def one_token(state):
    step, new_BKS, sum_BK, logits_RV, cache, found, open_B = state

    log_p_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32))
    sum_BKV = sum_BK[..., None] + log_p_RV.reshape(batch, beams, -1)
    vocab_size = sum_BKV.shape[-1]
    # At least K of the candidates do not end: each beam has at most one for each end token.
    sum_BC, at_BC = jax.lax.top_k(sum_BKV.reshape(batch, -1), candidates)
    parent_BC, token_BC = at_BC // vocab_size, at_BC % vocab_size
    new_BCS = _take_beams(new_BKS, parent_BC).at[..., step].set(token_BC)
    ends_BC = jnp.broadcast_to(step + 1 == steps, token_BC.shape)
    if ends:
      ends_BC |= jnp.isin(token_BC, np.array(ends))

    may_enter_BC = ends_BC & (jnp.arange(candidates) < beams) & open_B[:, None]
    score_BC = jnp.where(may_enter_BC, sum_BC / penalty(step + 1), -jnp.inf)
    found = _best(found, Beams(new_BCS, score_BC))

    sum_BK, kept_BK = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, sum_BC), beams)
    new_BKS = _take_beams(new_BCS, kept_BK)
    # A sum of log-probabilities only falls, so the best score of a text is at its present length
    # or at the longest one.
    best_B = sum_BK[:, 0] / penalty(step + 1)
    if exact:
      best_B = jnp.maximum(best_B, sum_BK[:, 0] / penalty(steps))
    open_B = open_B & (best_B > found.scores_BK[:, -1])

    position_R = length_R + step
    if cache is None:
      logits_RV = _logits_of_text(apply, params, text_RU(new_BKS), position_R)
    else:
      parent_BK = jnp.take_along_axis(parent_BC, kept_BK, axis=1)
      rows_R = (jnp.arange(batch)[:, None] * beams + parent_BK).reshape(-1)
      token_R = new_BKS[..., step].reshape(-1)
      logits_RV, cache = _logits_after(
        apply, params, token_R, position_R, _take_rows(cache, rows_R)
      )
    return step + 1, new_BKS, sum_BK, logits_RV, cache, found, open_B

  logits_BV, cache = _read_prompts(apply, params, prompts_BT, lengths_B, cache)
  new_BKS = jnp.full((batch, beams, steps), ends[0] if ends else 0, jnp.int32)
  # All beams start equal, so all but one are masked before the first step.
  sum_BK = jnp.full((batch, beams), -jnp.inf).at[:, 0].set(0.0)
  found = Beams(new_BKS, jnp.full((batch, beams), -jnp.inf))
  state = (
    *(0, new_BKS, sum_BK, logits_BV[parent_of_row], _take_rows(cache, parent_of_row), found),
    jnp.ones(batch, bool),
  )
  *_, found, _ = jax.lax.while_loop(going, one_token, state)
  return found


def read(
  apply: Callable,
  params: PyTree,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  start_B: jax.Array,
  cache: PyTree,
) -> tuple[jax.Array, PyTree]:
  """Returns the logits after more tokens of each row, (B, V), and the cache with these tokens.

  Args:
    apply, params: as in `decode`.
    tokens_BT: token ids, padded on the right with anything.
    lengths_B: the number of tokens of each row, at least 1.
    start_B: the position of the first token of each row.
    cache: of all tokens before them. Its entries at later positions are ignored.
  """
  logits_B1V, cache = apply(
    {"params": params},
    tokens_BT,
    positions_BT=start_B[:, None] + jnp.arange(tokens_BT.shape[1]),
    at_BC=lengths_B[:, None] - 1,
    cache=cache,
  )
  return logits_B1V[:, 0], cache


def _read_prompts(apply, params, prompts_BT, lengths_B, cache):
  """Returns the logits after each prompt, and the cache of the prompts."""
  if cache is None:
    return _logits_of_text(apply, params, prompts_BT, lengths_B - 1), None
  return read(apply, params, prompts_BT, lengths_B, jnp.zeros_like(lengths_B), cache)


def _logits_of_text(apply, params, text_BU, at_B):
  return apply({"params": params}, text_BU, at_BC=at_B[:, None])[:, 0]


def _logits_after(apply, params, token_B, position_B, cache):
  """Returns the logits after one more token of each row, and the cache with that token."""
  return read(apply, params, token_B[:, None], jnp.ones_like(position_B), position_B, cache)


def _best(*found: Beams) -> Beams:
  """Returns the best of several, as many as the first holds."""
  tokens = jnp.concatenate([beams.tokens_BKS for beams in found], axis=1)
  scores = jnp.concatenate([beams.scores_BK for beams in found], axis=1)
  scores_BK, kept_BK = jax.lax.top_k(scores, found[0].scores_BK.shape[1])
  return Beams(_take_beams(tokens, kept_BK), scores_BK)


def _take_beams(x_BKS: jax.Array, index_BC: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BKS, index_BC[..., None], axis=1)


def _take_rows(cache: PyTree, rows: jax.Array) -> PyTree:
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=-4), cache)
