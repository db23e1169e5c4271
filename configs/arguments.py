"""Inputs of the configs: the arguments after `--config=file.py:`, and the data folder."""

import ast
import os
import pathlib
from typing import Any


def data_folder() -> pathlib.Path:
  """The folder of public data sets: the variable LORA_JAX_DATA, or ../shared/data if unset."""
  return pathlib.Path(os.environ.get("LORA_JAX_DATA", "../shared/data"))


def parse(text: str, **defaults: Any) -> dict[str, Any]:
  """Returns the defaults, updated with the given arguments.

  Args:
    text: `name=value` pairs and bare names (which are set to True), separated by commas.
    **defaults: every argument that the config accepts, with its default.

  Raises:
    ValueError: for an unknown argument, or a value whose type differs from the default's.
  """
  values = dict(defaults)
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, equals, value = part.partition("=")
    if name not in defaults:
      raise ValueError(
        f"the config has no argument {name!r}; it has {', '.join(defaults)} "
        "(fields are set by --config.field=value)"
      )
    values[name] = _typed(name, value, type(defaults[name])) if equals else True
    if not isinstance(values[name], type(defaults[name])):
      raise ValueError(f"the config's argument {name} needs a value: {name}={defaults[name]!r}")
  return values


def _typed(name: str, value: str, wanted: type) -> Any:
  if wanted is str:
    return value
  try:
    result = ast.literal_eval(value)
  except (ValueError, SyntaxError):
    result = None
  if type(result) is int and wanted is float:
    return float(result)
  if type(result) is not wanted:
    raise ValueError(f"the config's argument {name}={value} is no {wanted.__name__}")
  return result
