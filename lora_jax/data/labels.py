"""Derives a class label from a number, such as a sentiment from a mean rating.

{"rating": "-1.3", "text": ...}  ->  {"rating": "-1.3", "text": ..., "label": "negative"}
"""

import math
from collections.abc import Sequence
from typing import Any

from lora_jax.data.records import Record, require


def sign_label(
  records: Sequence[Record],
  column: str,
  neutral: float = 0.5,
  above: str = "positive",
  below: str = "negative",
  into: str = "label",
) -> list[Record]:
  """Returns the records with a clear sign, each with a label for it.

  rating >= neutral -> above, rating <= -neutral -> below; those between, and 0, are dropped.

  Args:
    records: from `lora_jax.data.records.read`; they are not modified.
    column: the column with the rating, a number or its text.
    neutral: half the width of the zone without a label, in the rating's unit, at least 0.
    above: the label of a positive rating.
    below: the label of a negative rating.
    into: the name of the new column.

  Raises:
    ValueError: for a negative `neutral`, a missing column, a rating that is not a finite number, an
      existing column `into`, or no record left.
  """
  if not neutral >= 0:
    raise ValueError(f"neutral is {neutral}; it must be 0 or more")
  require(records, [column], "sign_label")
  labelled = []
  for number, record in enumerate(records):
    if into in record:
      raise ValueError(f"record {number} already has a column {into!r}; choose another for into=")
    rating = _number(record[column], f"record {number}, column {column!r}")
    if rating != 0 and abs(rating) >= neutral:
      labelled.append(record | {into: above if rating > 0 else below})
  if not labelled:
    raise ValueError(
      f"none of the {len(records)} ratings in {column!r} has a size of {neutral} or more"
    )
  return labelled


def _number(value: Any, where: str) -> float:
  try:
    number = float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"{where}: {value!r:.80} is not a finite number")
  return number
