"""Samples of mean 0 and variance 1, as wav2vec2 takes them.

samples_T = features(samples, window=16_000 * 8)
"""

import numpy as np


def features(samples: np.ndarray, window: int) -> np.ndarray:
  """Returns the standardized samples of a clip, [window] in float32, then zeros up to the window.

  These are the values of `transformers.Wav2Vec2FeatureExtractor` with `do_normalize`.

  Raises:
    ValueError: for a clip that is longer than the window.
  """
  if len(samples) > window:
    raise ValueError(f"a clip of {len(samples):,} samples does not fit a window of {window:,}")
  found = np.zeros(window, np.float32)
  found[: len(samples)] = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
  return found
