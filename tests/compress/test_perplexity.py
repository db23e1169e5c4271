"""Perplexity against the formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.compress import make_windows, perplexity

TABLE = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)


def bigram(variables, tokens_BT):
  """A model whose logits depend on the last token alone."""
  return variables["params"][tokens_BT]


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_it_is_the_exponential_of_the_mean_loss_whatever_the_batches_are(batch_size):
  windows = np.random.default_rng(1).integers(0, 7, size=(5, 6)).astype(np.int32)
  logits = TABLE.astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  expected = np.exp(-np.mean([log_p[w[n], w[n + 1]] for w in windows for n in range(5)]))
  found = perplexity(bigram, jnp.asarray(TABLE), windows, batch_size=batch_size)
  assert found == pytest.approx(expected, rel=1e-5)


def test_a_text_is_cut_into_whole_windows():
  windows = make_windows("abcdefgh", lambda text: [ord(c) for c in text], length=3)
  np.testing.assert_array_equal(windows, [[97, 98, 99], [100, 101, 102]])
  assert windows.dtype == np.int32


@pytest.mark.parametrize(
  ("length", "words"), [(1, "none to predict"), (9, "8 tokens and a window 9")]
)
def test_windows_that_cannot_be_made_are_refused(length, words):
  with pytest.raises(ValueError, match=words):
    make_windows("abcdefgh", lambda text: [ord(c) for c in text], length=length)


def test_no_window_is_an_error():
  with pytest.raises(ValueError, match="there is no window"):
    perplexity(bigram, TABLE, np.zeros((0, 4), np.int32))
