"""Reads audio files as samples at 16 kHz: WAV, FLAC and OGG (Vorbis, Opus).

    samples = read("clip.flac", most=30.0)       # float32 [samples], from -1 to 1

The contents are converted as follows:

    several channels              their mean
    other rates                   resampled by a polyphase filter (scipy.signal.resample_poly)
    integers                      divided by the largest of their width
    floats beyond -1 to 1         kept as they are
    under 4 kHz or over 192 kHz, 0 Hz too       refused
    more than 8 channels          refused
    under 0.1 s, or over `most`   refused, before a sample is decoded
    silent                        refused: no two samples differ by more than two steps of 16 bits
    truncated, damaged            refused, and so are values that are not finite

Files are untrusted. An error names the file.
"""

import io
import math
from pathlib import Path

import numpy as np

from lora_jax.data.log_mel import RATE
from lora_jax.io import files

ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus")
"""How the names of audio files end, in small letters."""

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")
LEAST = 0.1
"""Seconds of the shortest clip."""

_RATES = (4_000, 192_000)
_MAX_CHANNELS = 8
_MAX_BYTES = 1 << 30
_SILENCE = 2 / 32768
_UNKNOWN_SIZE = (1 << 32) - 1  # of a WAV file that was written to a pipe


def read(path: str | Path, most: float) -> np.ndarray:
  """Returns the samples of a file at 16 kHz.

  Args:
    path: of the file.
    most: the longest clip that is read, in seconds.

  Raises:
    FileNotFoundError, PermissionError: as `files.open_regular` does.
    ModuleNotFoundError: without the package `soundfile`.
    ValueError: with the reason, for a file that is refused; see the module.
  """
  content = files.read_bytes(path, _MAX_BYTES)
  try:
    return decode(content, most)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{path}: is read by the package soundfile, which is not installed: pip install "
      f'"lora_jax[speech]" ({error})'
    ) from None
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def decode(content: bytes, most: float) -> np.ndarray:
  """Returns the samples of a file's content; see `read`."""
  import soundfile  # of the extra `speech`

  if not content:
    raise ValueError("is empty")
  _check_riff(content)
  try:
    with soundfile.SoundFile(io.BytesIO(content)) as file:
      rate, frames = file.samplerate, file.frames
      _check(file.format, rate, file.channels, frames, most)
      samples = file.read(frames, dtype="float32", always_2d=True)
  except _Refused:
    raise
  except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
    raise ValueError(f"is no audio that can be read ({str(error)[:200]}); save it again") from None
  if len(samples) != frames:
    raise ValueError(
      f"ends after {len(samples):,} of {frames:,} samples; it was cut, save it again"
    )
  return _at_rate(samples.mean(axis=1), rate)


class _Refused(ValueError):
  """A file that is refused here rather than by the library."""


def _check_riff(content: bytes) -> None:
  """Checks what the library takes as it comes: a WAV file that was cut, or has no rate."""
  if content[:4] != b"RIFF":
    return
  size = int.from_bytes(content[4:8], "little")
  if size != _UNKNOWN_SIZE and size + 8 > len(content):
    raise ValueError(
      f"ends after {len(content):,} of {size + 8:,} bytes; it was cut, save it again"
    )
  if content[12:16] == b"fmt " and content[24:28] == bytes(4):
    raise ValueError(f"has a rate of 0 Hz; read are {_RATES[0]:,} to {_RATES[1]:,} Hz")


def _check(format: str, rate: int, channels: int, frames: int, most: float) -> None:
  if format not in FORMATS:
    raise _Refused(f"is {format}, which is not read; save it as WAV, FLAC or OGG")
  if not _RATES[0] <= rate <= _RATES[1]:
    raise _Refused(f"has a rate of {rate:,} Hz; read are {_RATES[0]:,} to {_RATES[1]:,} Hz")
  if not 1 <= channels <= _MAX_CHANNELS:
    raise _Refused(f"has {channels} channels; read are 1 to {_MAX_CHANNELS}")
  if not 0 < frames < 1 << 40:  # an OGG file without its last page
    raise _Refused("holds no samples, or no end; it was cut, save it again")
  seconds = frames / rate
  if seconds < LEAST:
    raise _Refused(f"lasts {seconds:.3f} s; clips of {LEAST} s or more are read")
  if seconds > most:
    raise _Refused(f"lasts {seconds:.2f} s, over the limit of {most:g} s; cut it into clips")


def _at_rate(samples: np.ndarray, rate: int) -> np.ndarray:
  """Checks the values of a clip and resamples it."""
  if not np.isfinite(samples).all():
    raise ValueError("holds values that are not finite; save it again")
  if np.ptp(samples) <= _SILENCE:
    raise ValueError("is silent; take it out")
  if rate != RATE:
    import scipy.signal  # the import takes most of a second

    divisor = math.gcd(rate, RATE)
    samples = scipy.signal.resample_poly(samples, RATE // divisor, rate // divisor)
  return np.ascontiguousarray(samples, np.float32)
