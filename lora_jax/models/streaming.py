"""Generates texts token by token and continues them, as in a conversation.

    streamer = Streamer(model.apply, found.new_cache, choose=decode.greedy, positions=8192)
    for token in streamer.write(params, prompt, steps=256, stop_ids=(2,), key=jax.random.key(0)):
      ...

The tokens are those of `lora_jax.models.decode.decode`. The cache is reused for the common prefix
of one text and the next. Few programs are compiled: tokens are read in chunks of a few lengths, and
the cache has a few sizes.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.models import decode

PyTree = Any

_CHUNKS = (1, 64, 512)  # tokens read at a time
_LEAST_SLOTS = 1024  # of a cache, unless the model has fewer positions


class Streamer:
  """Generates one text at a time with a model, and keeps the cache of the previous one.

  positions: the most tokens of a prompt and its continuation together.
  """

  def __init__(
    self,
    apply: Callable,
    new_cache: Callable[[int, int], PyTree],
    *,
    choose: decode.Choose,
    positions: int,
  ):
    """Does not compile anything yet.

    Args:
      apply: `model.apply`, adapted or not.
      new_cache: `(rows, slots) -> empty cache`, such as `Pretrained.new_cache`.
      choose: as in `decode.decode`.
      positions: the most tokens of a prompt and its continuation; at most the model's.
    """
    self.positions = positions
    self._new_cache = new_cache
    self._weights: PyTree = None
    self._ids: list[int] = []  # tokens in the cache
    self._cache: PyTree = None
    self._slots = 0

    def advance(weights, tokens_1T, length_1, start_1, cache, key, step):
      logits_1V, cache = decode.read(apply, weights, tokens_1T, length_1, start_1, cache)
      return choose(jax.random.fold_in(key, step), logits_1V), cache

    self._advance = jax.jit(advance, donate_argnames="cache")

  def room(self, prompt: Sequence[int]) -> int:
    """How many tokens may follow a prompt; the last one is not fed to the model."""
    return max(self.positions - len(prompt) + 1, 0)

  def write(
    self,
    weights: PyTree,
    prompt: Sequence[int],
    *,
    steps: int,
    stop_ids: Collection[int],
    key: jax.Array,
  ) -> Iterator[int]:
    """Yields the tokens that follow a prompt, without the end token.

    Args:
      weights: the model's. If they differ from the previous call's, the cache is discarded.
      prompt: token ids, at least one.
      steps: the most tokens to generate, at least 1.
      stop_ids: the tokens that end a text.
      key: a random key; step i uses `fold_in(key, i)`.

    Raises:
      ValueError: for an empty prompt, and one that leaves no room for this many steps.
    """
    if not prompt:
      raise ValueError("every prompt needs at least one token to go on from")
    if not 1 <= steps <= self.room(prompt):
      raise ValueError(
        f"{steps} tokens after a prompt of {len(prompt)} do not fit into {self.positions} "
        f"positions; use 1 to {self.room(prompt)}"
      )
    rest = self._unread(weights, prompt, len(prompt) + steps - 1)
    while len(rest) > 1:
      # All of these have logits, but only the last ones are used.
      size = max(x for x in _CHUNKS[1:] if x <= max(len(rest), _CHUNKS[1]))
      token = self._read(rest[:size], size, key, 0)
      rest = rest[size:]
    if rest:
      token = self._read(rest, 1, key, 0)
    for step in range(1, steps + 1):
      if token in stop_ids:
        return
      yield token
      if step < steps:
        token = self._read([token], 1, key, step)

  def _unread(self, weights: PyTree, prompt: Sequence[int], length: int) -> list[int]:
    """Returns the part of a prompt that is not in the cache, and makes room for `length` tokens."""
    if self._cache is None or weights is not self._weights or length > self._slots:
      self._ids = []
    # The last token is always read, for its logits.
    pairs = zip(self._ids, prompt[:-1], strict=False)
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    self._ids, self._weights = self._ids[:same], weights
    if self._cache is None or length > self._slots:
      self._cache = None  # frees it before the new one is allocated
      self._slots = min(max(_LEAST_SLOTS, 1 << (length - 1).bit_length()), self.positions)
      self._cache = self._new_cache(1, self._slots)
    return list(prompt[same:])

  def _read(self, tokens: Sequence[int], size: int, key: jax.Array, step: int) -> int:
    """Reads tokens, padded to a size, and returns the chosen next token."""
    tokens_1T = np.zeros((1, size), np.int32)
    tokens_1T[0, : len(tokens)] = tokens
    cache, self._cache = self._cache, None  # it is donated, and lost if this fails
    length_1, start_1 = np.array([len(tokens)], np.int32), np.array([len(self._ids)], np.int32)
    token_1, cache = self._advance(
      self._weights, tokens_1T, length_1, start_1, cache, key, np.int32(step)
    )
    token = int(token_1[0])
    self._ids += tokens
    self._cache = cache
    return token
