r"""Text templates with `{column}` fields: how a record becomes a prompt or a completion.

  prompt = "Review: {text}\nSentiment:"
  completion = " {label}"
  fill(prompt, {"text": "A joy.", "label": "positive"})     # "Review: A joy.\nSentiment:"

A field is a column's name and nothing more, so a column may be called `a.b` or `#1 String`;
literal braces are doubled, `{{` and `}}`.
"""

import string
from collections.abc import Sequence

from lora_jax.data.records import Record, require


def fields(template: str) -> tuple[str, ...]:
  """Returns the columns that a template names, in order of appearance.

  Raises:
    ValueError: an unbalanced brace, an empty field, or a conversion or format (`{x!r}`, `{x:3}`).
  """
  return tuple(field for _, field in _parse(template) if field is not None)


def check(template: str, records: Sequence[Record], name: str) -> None:
  """Checks that every record can fill the template.

  Args:
    template: text with `{column}` fields.
    records: as `lora_jax.data.records.read` returns them.
    name: what the template is, for the error's first words, e.g. "prompt".

  Raises:
    ValueError: a malformed template, no records, or a column that a record lacks.
    TypeError: a column that holds neither text nor a number.
  """
  columns = fields(template)
  require(records, columns, f"{name} template {template!r}")
  for number, record in enumerate(records):
    for column in columns:
      if not isinstance(record[column], (str, int, float)):
        raise TypeError(
          f"{name} template {template!r}: column {column!r} of record {number} holds a "
          f"{type(record[column]).__name__}, not text or a number; make it a string first"
        )


def fill(template: str, record: Record) -> str:
  """Returns the template with each field replaced by the record's value of that name."""
  return "".join(
    literal + ("" if field is None else str(record[field])) for literal, field in _parse(template)
  )


def _parse(template: str) -> list[tuple[str, str | None]]:
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f"template {template!r}: {error}; write a literal brace twice") from error
  for _, field, spec, conversion in parts:
    if field is not None and (not field or spec or conversion):
      raise ValueError(
        f"template {template!r}: a field is {{column}}, a name without conversion or format; "
        "write a literal brace twice"
      )
  return [(literal, field) for literal, field, _, _ in parts]
