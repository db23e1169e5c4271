"""Audio files of every kind that is read, and what is refused by its name."""

import io

import numpy as np
import pytest

from lora_jax.data import audio

soundfile = pytest.importorskip("soundfile", reason="soundfile writes the files of these tests")

RATE = 16_000


def tone(seconds=1.0, rate=RATE, hertz=440.0):
  at = np.arange(round(seconds * rate)) / rate
  return (0.5 * np.sin(2 * np.pi * hertz * at)).astype(np.float32)


def written(format="WAV", subtype=None, samples=None, rate=RATE):
  target = io.BytesIO()
  samples = tone(rate=rate) if samples is None else samples
  soundfile.write(target, samples, rate, format=format, subtype=subtype)
  return target.getvalue()


@pytest.mark.parametrize(
  ("format", "subtype", "atol"),
  [
    ("WAV", "PCM_16", 1e-4), ("WAV", "PCM_24", 1e-6), ("WAV", "FLOAT", 0), ("FLAC", "PCM_16", 1e-4),
    ("OGG", "VORBIS", 0.1), ("OGG", "OPUS", 0.2), ("RF64", "PCM_16", 1e-4),
  ],
)  # fmt: skip
def test_formats_are_read_as_they_were_written(tmp_path, format, subtype, atol):
  (tmp_path / "clip").write_bytes(written(format, subtype))
  found = audio.read(tmp_path / "clip", most=30)
  assert found.dtype == np.float32 and found.shape == (RATE,)
  middle = slice(2000, -2000)  # lossy codecs fade in
  np.testing.assert_allclose(found[middle], tone()[middle], atol=atol)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_other_rates_are_resampled(rate):
  found = audio.decode(written("WAV", "FLOAT", rate=rate), most=30)
  assert len(found) == RATE
  np.testing.assert_allclose(found[500:-500], tone()[500:-500], atol=5e-3)


def test_channels_become_their_mean():
  one, other = tone(), tone(hertz=1000.0)
  found = audio.decode(written("WAV", "FLOAT", samples=np.stack([one, other], axis=1)), most=30)
  np.testing.assert_allclose(found, (one + other) / 2, atol=1e-7)


def zero_hertz():
  content = bytearray(written())
  content[24:28] = bytes(4)
  return bytes(content)


def with_nan():
  samples = tone()
  samples[7] = np.nan
  return written("WAV", "FLOAT", samples=samples)


REFUSED = {
  "empty": (lambda: b"", "is empty"),
  "no audio": (lambda: b"hello" * 100, "is no audio that can be read"),
  "cut": (lambda: written()[:-1001], "it was cut, save it again"),
  "cut FLAC": (lambda: written("FLAC")[:-1001], "is no audio that can be read"),
  "cut OGG": (lambda: written("OGG", "VORBIS")[:-1001], "save it again"),
  "no samples": (lambda: written(samples=tone(0)), "holds no samples"),
  "silent": (lambda: written(samples=0 * tone()), "is silent; take it out"),
  "0 Hz": (zero_hertz, "has a rate of 0 Hz"),
  "1 kHz": (lambda: written(rate=1_000), "has a rate of 1,000 Hz"),
  "9 channels": (lambda: written(samples=np.tile(tone()[:, None], (1, 9))), "has 9 channels"),
  "short": (lambda: written(samples=tone(0.05)), r"lasts 0\.050 s; clips of 0\.1 s or more"),
  "long": (lambda: written(samples=tone(5.5)), r"lasts 5\.50 s, over the limit of 5 s; cut it"),
  "NaN": (with_nan, "holds values that are not finite"),
  "AIFF": (lambda: written("AIFF"), "is AIFF, which is not read; save it as WAV, FLAC or OGG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_its_reason(tmp_path, name):
  make, words = REFUSED[name]
  path = tmp_path / "the clip.wav"
  path.write_bytes(make())
  with pytest.raises(ValueError, match=rf"the clip\.wav: .*{words}|the clip\.wav: {words}"):
    audio.read(path, most=5)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError):
    audio.read(tmp_path / "none.wav", most=5)
  with pytest.raises(ValueError, match="is a folder and not a regular file"):
    audio.read(tmp_path, most=5)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
def test_damaged_bytes_are_refused_or_read_as_samples(format):
  whole = written(format, samples=tone(0.5))
  for n in range(60):
    rng = np.random.default_rng([n, len(format)])
    content = bytearray(whole)
    for at in rng.integers(0, 100 if n % 2 else len(whole), 3):
      content[at] = rng.integers(256)
    try:
      found = audio.decode(bytes(content), most=5)
    except ValueError:
      continue
    assert np.isfinite(found).all() and 0.1 * RATE * 0.9 <= len(found) <= 5 * RATE * 1.1
