"""Sequences of spoken words, joined from clips of single words, with silences between them.

    records = joined("recordings.tar.gz", counts=(3, 7), per_speaker=100, seed=0, most=6.0)
    records[0]     # {"samples": …, "text": "three one four", "speaker": "lucas", "name": …}

The clips are WAV files in a tar archive or a folder, named `{word}_{speaker}_{number}.wav`; digits
are spelled as words. A sequence has one speaker. Which words, clips and silences it has depends on
the seed, the speaker and the sequence's number alone.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.data import audio
from lora_jax.data.log_mel import RATE

Record = dict[str, Any]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAME = re.compile(r"(?P<word>[a-z]+|[0-9])_(?P<speaker>[a-z]+)_(?P<number>[0-9]{1,6})\.wav")
_PAUSES = (0.05, 0.3)  # seconds between words
_LONGEST_WORD = 10.0  # seconds
_MAX_MEMBERS, _MAX_BYTES, _MAX_TOTAL = 1 << 17, 1 << 24, 1 << 32
_OF_SEQUENCES = 5  # a stream of random bits of its own


def joined(
  path: str | Path, counts: Sequence[int], per_speaker: int, seed: int, most: float
) -> list[Record]:
  """Returns so many sequences of each speaker, in the order of the speakers' names.

  Args:
    path: of a tar archive, compressed or not, or a folder.
    counts: the least and the most words of a sequence; each number is as likely.
    per_speaker: sequences of each speaker.
    seed: an integer of 0 or more.
    most: seconds of the longest sequence; words that would exceed it are left out at its end.

  Raises:
    ValueError: for a damaged archive, a file of another name, a clip that is refused (as
      `audio.decode` does), and a first word that is longer than a sequence may be.
  """
  clips: dict[str, list[tuple[str, np.ndarray]]] = {}
  for name, content in sorted(_files(Path(path))):
    match = _NAME.fullmatch(name)
    if not match:
      raise ValueError(
        f"{path}: {shown(name)} is not named as word_speaker_number.wav; take it out"
      )
    word = DIGITS[int(match["word"])] if match["word"].isdigit() else match["word"]
    try:
      samples = audio.decode(content, _LONGEST_WORD)
    except ValueError as error:
      raise ValueError(f"{path}: {name}: {error}") from None
    clips.setdefault(match["speaker"], []).append((word, samples))
  if not clips:
    raise ValueError(f"{path}: holds no clips")
  return [
    _sequence(speaker, own, number, counts, seed, round(most * RATE))
    for speaker, own in sorted(clips.items())
    for number in range(per_speaker)
  ]


def _sequence(
  speaker: str,
  clips: Sequence[tuple[str, np.ndarray]],
  number: int,
  counts: Sequence[int],
  seed: int,
  most: int,
) -> Record:
  bits = iter(_bits(seed, _OF_SEQUENCES, number, *speaker.encode()))
  count = counts[0] + next(bits) % (counts[1] - counts[0] + 1)
  words, parts, length = [], [], 0
  name = f"{speaker}-{number}"
  for _ in range(count):
    word, samples = clips[next(bits) % len(clips)]
    span = _PAUSES[1] - _PAUSES[0]
    pause = round((_PAUSES[0] + span * (next(bits) % 1000) / 1000) * RATE)
    if length + pause + len(samples) > most:
      if not words:
        raise ValueError(
          f"{name}: its first word lasts {len(samples) / RATE:.2f} s, over the limit of "
          f"{most / RATE:g} s"
        )
      break
    words.append(word)
    parts += [np.zeros(pause, np.float32), samples]
    length += pause + len(samples)
  return {
    "samples": np.concatenate(parts),
    "text": " ".join(words),
    "speaker": speaker,
    "name": name,
  }


def _bits(*seeds: int) -> list[int]:
  """Random integers that the seeds determine, on any machine and with any version of numpy."""
  raw = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(64)
  return [int(each) for each in raw >> np.uint64(11)]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
  """The names, without their folders, and contents of the WAV files of an archive or a folder."""
  if path.is_dir():
    for file in path.iterdir():
      if file.suffix.lower() == ".wav":
        yield file.name, file.read_bytes()
    return
  try:
    yield from _members(path)
  except (tarfile.TarError, EOFError, OSError) as error:
    raise ValueError(f"{path}: is no whole tar archive ({str(error)[:200]})") from None


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
  total = 0
  with tarfile.open(path, "r|*") as packed:
    for count, info in enumerate(packed):
      total += info.size
      if count >= _MAX_MEMBERS or info.size > _MAX_BYTES or total > _MAX_TOTAL:
        raise ValueError(f"{path}: is larger than archives of clips that are read")
      name = info.name.rpartition("/")[2]
      if info.isreg() and name.endswith(".wav"):
        file = packed.extractfile(info)
        assert file is not None  # it is only for what is no regular file
        yield name, file.read(_MAX_BYTES)
