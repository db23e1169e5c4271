"""Checks of user settings, with clear messages: the fields of specs, formats and options.

    whole("LoRA: rank", 8, least=1)        # returns 8; 8.0, "8" and True are refused
    finite("LoRA: alpha", 16)              # returns 16; nan, "16" and True are refused

NumPy scalars are accepted and become Python numbers, so that a spec compares, hashes and is written
to JSON like any other.
"""

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

MAX_SEED = 2**32 - 1
"""The largest seed. JAX and grain use 32 bits, so a larger seed would repeat a smaller one."""


def whole(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
  """Returns a whole number.

  Args:
    name: the setting, for errors.
    value: the value to check.
    least: the smallest allowed value; None for no limit.
    most: the largest allowed value; None for no limit.

  Raises:
    TypeError: if it is not a whole number.
    ValueError: if it is below `least` or above `most`.
  """
  try:
    scalar = _scalar(value)
    if not isinstance(scalar, int):
      raise TypeError
  except TypeError:
    raise TypeError(f"{name} {shown(value)} is not a whole number; use an int") from None
  value = operator.index(scalar)
  if least is not None and value < least:
    positive = "a positive whole number" if least == 1 else f"{least} or more"
    raise ValueError(f"{name} {shown(value)} is below {least}; use {positive}")
  if most is not None and value > most:
    raise ValueError(f"{name} {shown(value)} is above {most}; use {most} or less")
  return value


def finite(
  name: str, value: Any, *, least: float | None = None, most: float | None = None
) -> int | float:
  """Returns a finite number, an int or a float like the value; errors as in `whole`."""
  try:
    value = _scalar(value)
  except TypeError:
    raise TypeError(f"{name} {shown(value)} is not a number; use an int or a float") from None
  try:
    is_finite = math.isfinite(value)
  except OverflowError:  # an int that is too large for a float
    is_finite = False
  if not is_finite:
    raise ValueError(f"{name} {shown(value)} is not finite")
  if least is not None and value < least:
    raise ValueError(f"{name} {value} is below {least}; use {least} or more")
  if most is not None and value > most:
    raise ValueError(f"{name} {value} is above {most}; use {most} or less")
  return value


def positive(name: str, value: Any) -> int | float:
  """Returns a number that is finite and above 0 in float32; errors as in `whole`."""
  value = finite(name, value, most=_FLOAT32.max.item())
  if not value >= _FLOAT32.tiny:
    raise ValueError(f"{name} {value} is not above 0 in float32; use a positive number")
  return value


def fraction(name: str, value: Any) -> float:
  """Returns a number that is in [0, 1) in float32; errors as in `whole`."""
  value = finite(name, value)
  if not 0 <= value < 1 or np.float32(value) == 1:
    raise ValueError(f"{name} {value} is not in [0, 1)")
  return float(value)


def flag(name: str, value: Any) -> bool:
  """Returns a bool; raises TypeError for anything else."""
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f"{name} {shown(value)} is neither True nor False")
  return bool(value)


def function(name: str, value: Any) -> Any:
  """Returns a function; raises TypeError for anything that cannot be called."""
  if not callable(value):
    raise TypeError(f"{name} {value!r} is not a function")
  return value


_FLOAT32 = np.finfo(np.float32)


def shown(value: Any, most: int = 300) -> str:
  """A value for a message, truncated to `most` characters."""
  if isinstance(value, int) and not -(10**40) < value < 10**40:
    return f"of {value.bit_length()} bits"  # Python may refuse to write it out
  text = repr(value)
  return text if len(text) <= most else f"{text[:most]}..."


def _scalar(value: Any) -> int | float:
  """A Python number; raises TypeError for anything else, including bools."""
  if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
    value = value.item()
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise TypeError
  return value


def rules(value: Any, kinds: Any, what: str, example: str) -> list[tuple[str, Any]]:
  """Returns ordered (pattern, value) pairs, each value an instance of `kinds`.

  Args:
    value: the value to check.
    kinds: the classes of the second element of a pair, as `isinstance` takes them.
    what: the name of the second element of a pair, for errors.
    example: an example of a list of rules, for errors.

  Raises:
    TypeError: if it is not a list of such pairs.
  """
  if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
    remedy = "; if the dict has the intended order, list(rules.items()) is such a list"
    raise TypeError(
      f"the rules are a {type(value).__name__} and not a list of (pattern, {what}) pairs, as "
      f"{example}{remedy if isinstance(value, Mapping) else ''}"
    )
  pairs = []
  for rule in value:
    if not isinstance(rule, tuple | list) or len(rule) != 2:
      raise TypeError(f"the rule {rule!r} is not a (pattern, {what}) pair, as in {example}")
    pattern, second = rule
    if not isinstance(pattern, str):
      raise TypeError(f"the pattern {pattern!r} is a {type(pattern).__name__} and not a string")
    instance(f"the pattern {pattern!r} has", second, kinds, what)
    pairs.append((pattern, second))
  return pairs


def by_path(value: Any, kinds: Any, what: str, leaves: Collection[str]) -> None:
  """Checks `{path: value}`, as `match` returns it, against a tree's paths.

  Raises:
    TypeError: if it is not a mapping, or a value is not an instance of `kinds`.
    ValueError: if the tree has no leaf at a path.
  """
  if not isinstance(value, Mapping):
    raise TypeError(
      f"a {type(value).__name__} is not a mapping {{path: {what}}}; `lora_jax.match` makes one "
      "from rules"
    )
  for path, each in value.items():
    if path not in leaves:
      raise ValueError(
        f"{path}: the tree has no such leaf; make the {what}s by `lora_jax.match` with this tree"
      )
    instance(f"{path}: has", each, kinds, what)


def instance(where: str, value: Any, kinds: Any, what: str) -> None:
  """Raises TypeError unless value is an instance of `kinds`; `where` begins the message."""
  if isinstance(value, type):
    raise TypeError(
      f"{where} the class {value.__name__} and not an instance of it; call it with its settings, "
      f"{value.__name__}(...)"
    )
  if not isinstance(value, kinds):
    raise TypeError(f"{where} {value!r}, a {type(value).__name__} and not a {what}")
