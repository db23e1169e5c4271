"""Detokenizes English text that was published tokenized.

  `detokenise("It 's near Café Sicilia , £ 20 - 25 , family - friendly .")`
  # "It's near Café Sicilia, £20-25, family-friendly."

A language model trained on tokenized text would write tokenized text. A score against original
references, such as BLEU, would then count every comma, price and hyphen as an error.

The 4,672 development references of the E2E challenge (Novikova et al. 2017) are published in both
forms: 3.7 % are the same in both, and 97.9 % after this function. Most of the others are unevenly
spaced in the original.
"""

import re
from collections.abc import Sequence

from lora_jax.data.records import Record, require

# (pattern, replacement), applied in order to text with single spaces.
_RULES = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"(?<!\S)' ([^']+) '(?!\S)", r"'\1'"),  # ' The Mill ' -> 'The Mill'
    (r" (?=(?:n't|'(?:s|t|re|ll|ve|d|m))\b)", ""),  # it 's -> it's
    (r" (?=[,.;:!?])", ""),  # here . -> here.
    (r"(?<=£) ", ""),  # £ 20 -> £20
    (r"(?<=\S) - (?=\S)", "-"),  # 20 - 25 -> 20-25
    (r"(?<=\d-) (?=£?\d)", ""),  # £20- £25 -> £20-£25
  )
)


def detokenise(text: str) -> str:
  """Returns the text without the spaces of a tokenizer, and with runs of spaces collapsed.

  It removes the spaces before , . ; : ! ? and English contractions, after £, around a hyphen, and
  inside a pair of single quotes. Text that was never tokenized is unchanged, unless it has such
  spaces.
  """
  text = " ".join(text.split())
  for pattern, replacement in _RULES:
    text = pattern.sub(replacement, text)
  return text


def detokenise_columns(records: Sequence[Record], columns: Sequence[str]) -> list[Record]:
  """Returns the records with some of their columns detokenized.

  Args:
    records: from `lora_jax.data.records.read`; they are not modified.
    columns: text columns, which every record must have.

  Raises:
    ValueError: no records, a missing column, or one that holds no text.
  """
  require(records, columns, "detokenise")
  for number, record in enumerate(records):
    for column in columns:
      if not isinstance(record[column], str):
        raise ValueError(
          f"`detokenise`: column {column!r} of record {number} holds a "
          f"{type(record[column]).__name__}, not text"
        )
  return [record | {column: detokenise(record[column]) for column in columns} for record in records]
