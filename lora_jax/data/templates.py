r"""Text templates with `{column}` fields, for prompts and completions from records.

  prompt = "Review: {text}\nSentiment:"
  completion = " {label}"
  fill(prompt, {"text": "A joy.", "label": "positive"})     # "Review: A joy.\nSentiment:"

A field is just the name of a column, so names like `a.b` or `#1 String` work. Literal braces are
doubled, `{{` and `}}`.
"""

import string
from collections.abc import Sequence

from lora_jax.data.records import Record, check_values, require


def fields(template: str) -> tuple[str, ...]:
  """Returns the columns of a template, in order of appearance.

  Raises:
    ValueError: for an unbalanced brace, an empty field, or a conversion or format (`{x!r}`,
      `{x:3}`).
  """
  return tuple(field for _, field in _parse(template) if field is not None)


def check(template: str, records: Sequence[Record], name: str) -> None:
  """Checks that every record can fill the template.

  Args:
    template: text with `{column}` fields.
    records: from `lora_jax.data.records.read`.
    name: names the template at the start of an error, e.g. "prompt".

  Raises:
    ValueError: for a malformed template, no records, a column that a record lacks, and as
      `lora_jax.data.records.check_values` does.
  """
  columns = fields(template)
  wanted_by = f"{name} template {template!r:.200}"
  require(records, columns, wanted_by)
  check_values(records, columns, wanted_by)


def fill(template: str, record: Record) -> str:
  """Returns the template with each field replaced by the record's value of that name."""
  return "".join(text for text, _ in pieces(template, record))


def pieces(template: str, record: Record) -> list[tuple[str, bool]]:
  """Returns the parts of the filled template, each with True if it is the template's own text."""
  found = []
  for literal, field in _parse(template):
    found.append((literal, True))
    if field is not None:
      found.append((str(record[field]), False))
  return found


def ending(template: str) -> str:
  """Returns the text that follows the last field of a template."""
  texts = [literal for literal, field in _parse(template) if field is None]
  return texts[-1] if texts else ""


def _parse(template: str) -> list[tuple[str, str | None]]:
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f"template {template!r:.200}: {error}; write a literal brace twice") from error
  for _, field, spec, conversion in parts:
    if field is not None and (not field or spec or conversion):
      raise ValueError(
        f"template {template!r:.200}: a field is {{column}}, a name without conversion or format; "
        "write a literal brace twice"
      )
  return [(literal, field) for literal, field, _, _ in parts]
