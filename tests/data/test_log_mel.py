"""Log-mel features are those of transformers' feature extractor."""

import numpy as np
import pytest
from peers import transformers

from lora_jax.data import log_mel


def clip(seconds, seed=0):
  rng = np.random.default_rng(seed)
  at = np.arange(round(seconds * log_mel.RATE)) / log_mel.RATE
  return (0.3 * np.sin(2000 * at * (1 + at)) + 0.1 * rng.normal(size=len(at))).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.3, 3.7, 29.995, 30.0])
def test_features_of_30_seconds_are_those_of_transformers(mels, seconds):
  samples = clip(seconds)
  extract = transformers.WhisperFeatureExtractor(feature_size=mels)
  expected = extract(samples, sampling_rate=16_000, return_tensors="np").input_features[0].T
  found = log_mel.features(samples, mels, 30 * log_mel.RATE)
  assert found.shape == (3000, mels) and found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
  if seconds < 29:  # silence is clipped at 8 below the largest, which are 2 of these units
    assert np.isclose(found.max() - found.min(), 2.0, atol=1e-3)


def test_a_shorter_window_has_the_first_frames_of_the_whole_one():
  samples = clip(2.9)
  whole = log_mel.features(samples, 80, 30 * log_mel.RATE)
  for seconds in (3, 8, 29):
    found = log_mel.features(samples, 80, seconds * log_mel.RATE)
    np.testing.assert_array_equal(found, whole[: 100 * seconds])


def test_a_window_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"a clip of 3\.00 s does not fit a window of 2 s"):
    log_mel.features(clip(3), 80, 2 * log_mel.RATE)
  for window in (0, 1000, 31 * log_mel.RATE):
    with pytest.raises(ValueError, match="is no multiple of 160 up to 480,000"):
      log_mel.features(clip(0.01), 80, window)
