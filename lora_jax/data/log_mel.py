"""Log-mel features of speech, as Whisper takes them.

    mels_TM = features(samples, mels=80, window=16_000 * 8)       # 8 s: 800 frames of 10 ms

Radford et al. 2022, section 2.2: a Hann window of 25 ms every 10 ms, mel bands up to 8 kHz on
Slaney's scale, decimal logarithms that are clipped at 8 below the clip's largest, and (x + 4) / 4.
The features are those of `transformers.WhisperFeatureExtractor`. Those of a shorter window are the
first frames of those of 30 s.
"""

import functools

import numpy as np

RATE = 16_000
"""Samples a second."""

HOP = 160
"""Samples from one frame to the next."""

_SIZE = 400  # samples of a frame
_WHOLE = 30 * RATE  # the window that Whisper was trained with
_LINEAR_MEL, _HZ_PER_MEL, _LOG_STEP = 15.0, 200.0 / 3, np.log(6.4) / 27


def features(samples: np.ndarray, mels: int, window: int) -> np.ndarray:
  """Returns the features of a clip, [window / HOP, mels] in float32.

  Args:
    samples: float, from -1 to 1, at `RATE`; followed by silence up to the window.
    mels: the number of bands.
    window: samples, a multiple of `HOP`; at most 30 s.

  Raises:
    ValueError: for a clip that is longer than the window, and for another window.
  """
  if window % HOP or not 0 < window <= _WHOLE:
    raise ValueError(
      f"a window of {window:,} samples is no multiple of {HOP} up to {_WHOLE:,}, which are 30 s"
    )
  if len(samples) > window:
    raise ValueError(
      f"a clip of {len(samples) / RATE:.2f} s does not fit a window of {window / RATE:g} s"
    )
  # A window of 30 s ends with the clip mirrored, as in transformers; a shorter one with silence.
  padded = np.zeros(min(window + _SIZE // 2, _WHOLE))
  padded[: len(samples)] = samples
  padded = np.pad(padded, (_SIZE // 2, _SIZE // 2 - (len(padded) - window)), mode="reflect")
  frames = np.lib.stride_tricks.sliding_window_view(padded, _SIZE)[::HOP][: window // HOP]
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_SIZE) / _SIZE)
  power = np.abs(np.fft.rfft(frames * hann)) ** 2
  logarithm = np.log10(np.maximum(power @ mel_bands(mels), 1e-10))
  logarithm = np.maximum(logarithm, logarithm.max() - 8)
  return ((logarithm + 4) / 4).astype(np.float32)


@functools.cache
def mel_bands(mels: int) -> np.ndarray:
  """The weight of each frequency of a frame in each band, [201, mels].

  Triangles of area 1, evenly spaced on Slaney's mel scale from 0 to 8 kHz (Slaney 1998, "Auditory
  Toolbox", as `librosa.filters.mel` has it by default).
  """
  highest = _LINEAR_MEL + np.log(RATE / 2 / (_LINEAR_MEL * _HZ_PER_MEL)) / _LOG_STEP
  mel = np.linspace(0, highest, mels + 2)
  hertz = np.where(
    mel < _LINEAR_MEL,
    _HZ_PER_MEL * mel,
    _LINEAR_MEL * _HZ_PER_MEL * np.exp(_LOG_STEP * (mel - _LINEAR_MEL)),
  )
  frequencies = np.linspace(0, RATE / 2, _SIZE // 2 + 1)[:, None]
  left, center, right = hertz[:-2], hertz[1:-1], hertz[2:]
  up, down = (frequencies - left) / (center - left), (right - frequencies) / (right - center)
  return np.maximum(0, np.minimum(up, down)) * 2 / (right - left)
