"""Scores of transcripts: word and character error rates, and phrases found in them.

normalize = NORMALIZERS["english"]()
wer(["a small latte"], ["a tall latte"])                 # 1/3
has_phrase("small latte", "a small latte please")        # True
"""

import functools
from collections.abc import Callable, Mapping, Sequence

Normalize = Callable[[str], str]


def _english() -> Normalize:
  from whisper_normalizer.english import EnglishTextNormalizer  # of the extra `speech`

  return EnglishTextNormalizer()


def _basic() -> Normalize:
  from whisper_normalizer.basic import BasicTextNormalizer

  return BasicTextNormalizer()


def _words() -> Normalize:
  return lambda text: " ".join(text.split())


NORMALIZERS: Mapping[str, Callable[[], Normalize]] = {
  name: functools.cache(make)
  for name, make in {"english": _english, "basic": _basic, "none": _words}.items()
}
"""The changes of texts before they are compared. english and basic are Whisper's own (Radford et
al. 2022, appendix C): case, punctuation and fillers are taken out, and English numbers and
spellings are made alike. none: white space alone."""


def error_rates(references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
  """Returns `wer` and `cer`: edits of words and of characters over those of the references.

  Args:
    references: normalized, none of them empty.
    texts: normalized, one for each reference.
  """
  import jiwer  # of the extra `speech`

  return {
    "wer": float(jiwer.wer(list(references), list(texts))),
    "cer": float(jiwer.cer(list(references), list(texts))),
  }


def has_phrase(phrase: str, text: str) -> bool:
  """Whether the words of a phrase stand in a text, one after another."""
  return f" {phrase} " in f" {text} "
