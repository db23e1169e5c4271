"""Scores of texts against references, by `sacrebleu`.

    bleu(texts, references)
    # {"bleu": 65.2, "texts": 547, "signature": "nrefs:var|case:mixed|eff:no|tok:13a|..."}

The package `sacrebleu` comes with the extra `eval`; without it, the import of this module raises
ModuleNotFoundError.
"""

import itertools
from collections.abc import Sequence
from typing import Any

try:
  import sacrebleu
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    f'BLEU and chrF are computed by sacrebleu: pip install "lora_jax[eval]" ({error})'
  ) from None


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
  """Returns the corpus BLEU of texts against all of their references, by `sacrebleu`'s defaults.

  Args:
    texts: one for each prompt.
    references: one list for each text; they may differ in length.

  Returns:
    `bleu` (0 to 100), `texts` (their number) and `signature`, which describes the computation.

  Raises:
    ValueError: if there is no text, a text without a reference, or not one list for each text.

  Source: Papineni et al. 2002; Post 2018, "A Call for Clarity in Reporting BLEU Scores".
  """
  score, signature = _corpus_score(sacrebleu.BLEU(), texts, references)
  return {"bleu": score, "texts": len(texts), "signature": signature}


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
  """Returns the corpus chrF of texts, the F-score of character n-grams, by `sacrebleu`'s defaults.

  It distinguishes short sentences and highly inflected languages where BLEU is coarse.

  Args, Raises: those of `bleu`.

  Returns:
    `chrf` (0 to 100) and `chrf_signature`, which describes the computation.

  Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
  """
  score, signature = _corpus_score(sacrebleu.CHRF(), texts, references)
  return {"chrf": score, "chrf_signature": signature}


def _corpus_score(
  metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, str]:
  if not texts or len(texts) != len(references) or not all(references):
    raise ValueError(
      f"{len(texts)} texts and {len(references)} lists of references; a score needs texts, and at "
      "least one reference for each of them"
    )
  # One stream for the first references, one for the second ...; None where a text has no more.
  streams = [list(stream) for stream in itertools.zip_longest(*references)]
  score = metric.corpus_score(list(texts), streams).score
  return score, str(metric.get_signature())
