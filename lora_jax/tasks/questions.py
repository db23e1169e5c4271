"""Inputs for predictions, from a file or a text, and the answers in order."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from lora_jax.data import records, templates, text_files
from lora_jax.train.step import Batch

Answer = dict[str, Any]
"""As JSON has it."""

T = TypeVar("T")


def records_of(given: str, wanted: Sequence[str]) -> list[records.Record]:
  """Returns the records of a file, or one record with the given text.

  A JSON, CSV, TSV or Parquet file has the columns of the templates. In a .txt file each line is a
  text.

  Args:
    given: the path of a file, or a text.
    wanted: the templates to fill.

  Raises:
    ValueError: for a file without the columns, and for a text if several columns are needed.
  """
  columns = list(dict.fromkeys(field for x in wanted for field in templates.fields(x)))
  path = pathlib.Path(given)
  try:
    is_file = path.is_file()
  except OSError:  # a text that is too long for a path
    is_file = False
  if is_file and path.suffix != ".txt":
    rows = records.read(path)
    try:
      for template in wanted:
        templates.check(template, rows, "--input")
    except ValueError as error:
      raise ValueError(f"{given}: {error}") from None
    return rows
  if len(columns) != 1:
    raise ValueError(
      f"--input: a text has one column, and the task asks for {', '.join(columns)}; give a file "
      "with these, as JSONL or CSV"
    )
  if not is_file:
    return [{columns[0]: given}]
  with text_files.lines(path, records.UTF_8, newline=None) as (lines, _):
    found = [{columns[0]: line.rstrip("\n")} for line in lines if line.strip()]
  if not found:
    raise ValueError(f"{given}: has no line with a text")
  return found


def answers(
  step: Callable[[Batch], Any],
  batches: Iterable[Batch],
  answer: Callable[[np.ndarray], T],
) -> list[T]:
  """Returns an answer for each example, ordered by the `index` of the batches' rows.

  Args:
    step: maps a batch to an output for each row.
    batches: of one pass over the examples.
    answer: maps a row's output to its answer.
  """
  found = {}
  for batch in batches:
    for index, output in zip(batch["index"].tolist(), np.asarray(step(batch)), strict=True):
      if index >= 0:
        found[index] = answer(output)
  return [found[index] for index in sorted(found)]
