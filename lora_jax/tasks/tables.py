"""Reads files of records as specified by a config's `data`, for tasks on text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lora_jax.data import detokenise, labels, records
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.tokenizer import Tokenizer

# The format of a file by its name.
_BY_NAME = "auto"

# Values of fields of the data section that the configs of earlier runs lack.
_BEFORE_THE_FIELD = {"encoding": "utf-8-sig", "quoted": None}


def read(path: str | Path, data: Mapping[str, Any]) -> list[records.Record]:
  """Returns the records of one file, read with a config section's `format`, `columns`, `encoding`
  and `quoted`. Raises as `lora_jax.data.records.read` does."""
  return records.read(
    path,
    format=None if data["format"] == _BY_NAME else data["format"],
    columns=data["columns"] or None,
    quoted=_setting(data, "quoted"),
    encoding=_setting(data, "encoding"),
  )


def derive(rows: Sequence[records.Record], data: Mapping[str, Any]) -> list[records.Record]:
  """Returns the records with the columns derived by `detokenise` and `sign_of`; raises as these
  do."""
  rows = detokenise.detokenise_columns(rows, data["detokenise"])
  if data["sign_of"]:
    rows = labels.sign_label(rows, data["sign_of"], neutral=data["neutral"])
  return rows


class OfTables:
  """The base of tasks whose records are rows of tables and whose examples are texts."""

  UNIT: ClassVar[str] = "token"

  model: Pretrained | None
  """The model without its weights; None until `of_model`."""

  @property
  def known_model(self) -> Pretrained:
    """The model, once `of_model` has set it."""
    assert self.model is not None, "of_model gives the task its model"
    return self.model

  @property
  def tokenizer(self) -> Tokenizer:
    """The model's tokenizer; `of_model` refuses a model without one."""
    assert self.known_model.tokenizer is not None
    return self.known_model.tokenizer

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[records.Record]:
    del held_out
    return read(path, data)

  def derive(self, rows: Sequence[records.Record], data: Mapping[str, Any]) -> list[records.Record]:
    return derive(rows, data)

  def mark(self, example: Any) -> None:
    """Returns None: a text is no picture."""

  def draw(self, encoded: Sequence[Any], samples: Sequence[Mapping[str, str]]) -> None:
    """Returns None, since texts have no pictures."""


def _setting(data: Mapping[str, Any], name: str) -> Any:
  return data[name] if name in data else _BEFORE_THE_FIELD[name]
