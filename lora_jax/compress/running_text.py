"""Perplexity of a language model on windows of running text.

    windows_NT = make_windows(" ".join(sentences), tokenizer.encode, length=256)
    calibration, held_out = windows_NT[:64], windows_NT[64:104]
    perplexity(lora_jax.adapt(model.apply), params, held_out)

The text is cut into windows that do not overlap. In each window, every token but the first is
predicted from the tokens before it in the window. The result is therefore higher than with a
sliding context, and comparable only for the same text and window length.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def make_windows(text: str, encode: Callable[[str], Sequence[int]], length: int) -> np.ndarray:
  """Returns the windows of a text, int32 [windows, length], without an incomplete last one.

  Args:
    text: running text, encoded as a whole.
    encode: maps a text to token ids.
    length: the number of tokens of a window, at least 2.

  Raises:
    ValueError: if a window has no token to predict, or if the text does not fill one.
  """
  if length < 2:
    raise ValueError(f"windows of {length} tokens have none to predict; use at least 2")
  ids = np.asarray(encode(text), np.int32)
  if len(ids) < length:
    raise ValueError(f"the text has {len(ids)} tokens and a window {length}; give more text")
  return ids[: len(ids) // length * length].reshape(-1, length)


def perplexity(
  apply: Callable, params: PyTree, windows_NT: np.ndarray, *, batch_size: int = 8
) -> float:
  """Returns exp of the mean negative log-likelihood of all tokens but the first of each window.

  Args:
    apply: `apply({"params": params}, tokens_BT) -> logits_BTV`; adapted, for params with Weights.
    params: the parameters.
    windows_NT: token ids, as `make_windows` returns them.
    batch_size: windows at a time; the last batch may be smaller, and compiles once more.

  Raises:
    ValueError: if there is no window.
  """
  if not len(windows_NT):
    raise ValueError("there is no window to compute the perplexity of")

  @jax.jit
  def loss_sum(params, tokens_BT):
    logits_BTV = apply({"params": params}, tokens_BT)[:, :-1].astype(jnp.float32)
    targets_BT1 = tokens_BT[:, 1:, None]
    found_BT1 = jnp.take_along_axis(logits_BTV, targets_BT1, axis=-1)
    return jnp.sum(jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True) - found_BT1)

  starts = range(0, len(windows_NT), batch_size)
  losses = [float(loss_sum(params, windows_NT[n : n + batch_size])) for n in starts]
  tokens = windows_NT.shape[0] * (windows_NT.shape[1] - 1)
  return math.exp(math.fsum(losses) / tokens)
