"""Texts from rows of frames: greedy, by beam search, and what a text needs."""

import itertools

import numpy as np
import pytest

from lora_jax.tasks import ctc_decoding


def test_repeats_are_one_and_blanks_are_left_out():
  assert ctc_decoding.collapse([0, 3, 3, 0, 3, 5, 5, 0], blank=0) == [3, 3, 5]
  assert ctc_decoding.collapse([2, 2], blank=2) == []


def test_equal_neighbors_need_a_blank_between_them():
  assert ctc_decoding.frames_needed([]) == 0
  assert ctc_decoding.frames_needed([1, 2, 1]) == 3
  assert ctc_decoding.frames_needed([1, 1, 1]) == 5


def likeliest(log_p_SK, blank):
  """The most likely text, by all of the paths."""
  frames, classes = log_p_SK.shape
  sums = {}
  for path in itertools.product(range(classes), repeat=frames):
    text = tuple(ctc_decoding.collapse(path, blank))
    log_p = sum(log_p_SK[s, k] for s, k in enumerate(path))
    sums[text] = np.logaddexp(sums.get(text, -np.inf), log_p)
  return list(max(sums, key=sums.get))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("blank", [0, 2])
def test_a_wide_search_finds_the_most_likely_text_of_all(seed, blank):
  logits = 1.5 * np.random.default_rng(seed).normal(size=(5, 3))
  log_p_SK = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
  assert ctc_decoding.beam_search(log_p_SK, 500, blank) == likeliest(log_p_SK, blank)


def test_a_search_finds_what_the_greedy_text_misses():
  """Two paths of the same text are likelier together than the best path."""
  p_SK = np.array([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]])
  assert ctc_decoding.collapse(p_SK.argmax(axis=1), 0) == []
  assert ctc_decoding.beam_search(np.log(p_SK), 10, 0) == [1]
  assert ctc_decoding.beam_search(np.log(p_SK), 1, 0) in ([], [1])


def test_frames_that_are_surely_blank_change_nothing():
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(6, 4))
  log_p_SK = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
  sure = np.full((3, 4), -np.inf)
  sure[:, 0] = 0
  padded = np.concatenate([log_p_SK, sure])
  assert ctc_decoding.beam_search(padded, 20, 0) == ctc_decoding.beam_search(log_p_SK, 20, 0)
