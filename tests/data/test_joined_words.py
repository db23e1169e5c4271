"""Sequences joined from clips of words: by the seed alone, and what is refused."""

import io
import tarfile

import numpy as np
import pytest
import speech_models

from lora_jax.data import joined_words

soundfile = pytest.importorskip("soundfile", reason="soundfile writes the files of these tests")
HOW = {"counts": (2, 4), "per_speaker": 5, "seed": 0, "most": 4.0}


def wav(word, seed):
  target = io.BytesIO()
  soundfile.write(target, speech_models.tone(word, 0.4, 8_000, seed), 8_000, format="WAV")
  return target.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("words")
  for speaker in ("ann", "ben"):
    for word in range(3):
      for number in range(2):
        (folder / f"{word}_{speaker}_{number}.wav").write_bytes(wav(word, number))
  return folder


def packed(folder, path):
  with tarfile.open(path, "w:gz") as archive:
    archive.add(folder, "recordings")
  return path


def test_sequences_have_one_speaker_and_go_by_the_seed(folder, tmp_path):
  found = joined_words.joined(folder, **HOW)
  assert [row["name"] for row in found] == [f"{x}-{n}" for x in ("ann", "ben") for n in range(5)]
  for row in found:
    words = row["text"].split()
    assert 2 <= len(words) <= 4 and {*words} <= {"zero", "one", "two"}
    # The words last 0.4 s at 16 kHz each, the pauses 0.05 to 0.3 s.
    pause = len(row["samples"]) / 16_000 - 0.4 * len(words)
    assert 0.05 * len(words) <= pause + 1e-3 and pause <= 0.3 * len(words) + 1e-3
  assert {len(row["text"].split()) for row in found} == {2, 3, 4}
  # The archive of the same files makes the same sequences.
  again = joined_words.joined(packed(folder, tmp_path / "a.tar.gz"), **HOW)
  for one, other in zip(found, again, strict=True):
    assert one["text"] == other["text"]
    np.testing.assert_array_equal(one["samples"], other["samples"])
  other = joined_words.joined(folder, **HOW | {"seed": 1})
  assert [row["text"] for row in other] != [row["text"] for row in found]
  # More of them begin with the same.
  longer = joined_words.joined(folder, **HOW | {"per_speaker": 6})
  assert longer[0]["text"] == found[0]["text"] and longer[6]["text"] == found[5]["text"]


def test_a_sequence_ends_where_it_would_be_too_long(folder):
  found = joined_words.joined(folder, **HOW | {"most": 1.5})
  assert max(len(row["samples"]) for row in found) <= 1.5 * 16_000
  with pytest.raises(ValueError, match=r"ann-0: its first word lasts 0\.40 s, over the limit"):
    joined_words.joined(folder, **HOW | {"most": 0.3})


def test_what_is_no_set_of_words_is_refused(folder, tmp_path):
  (tmp_path / "a.tar.gz").write_bytes(packed(folder, tmp_path / "b.tar.gz").read_bytes()[:500])
  with pytest.raises(ValueError, match=r"a\.tar\.gz: is no whole tar archive"):
    joined_words.joined(tmp_path / "a.tar.gz", **HOW)
  other = tmp_path / "other"
  other.mkdir()
  with pytest.raises(ValueError, match="other: holds no clips"):
    joined_words.joined(other, **HOW)
  (other / "hello.wav").write_bytes(wav(0, 0))
  with pytest.raises(ValueError, match=r"'hello\.wav' is not named as word_speaker_number"):
    joined_words.joined(other, **HOW)
  (other / "hello.wav").rename(other / "1_ann_0.wav")
  (other / "2_ann_0.wav").write_bytes(wav(0, 0)[:-100])
  with pytest.raises(ValueError, match=r"other: 2_ann_0\.wav: ends after"):
    joined_words.joined(other, **HOW)
