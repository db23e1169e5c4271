"""Rules for the fields of a config, which `experiments.config_checks` applies.

rule = sequence(whole(1), empty=False)
rule.holds((3, 4))                       # True
rule.words                               # for the message of an error
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_jax import checks

_TINY, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MOST = 2**31 - 1  # steps, rows and tokens are counted in int32


class Rule(NamedTuple):
  """The allowed values of a field: a description, and a test of a value."""

  words: str
  holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def whole(least: int, most: int = _MOST) -> Rule:
  """A whole number from `least` to `most`."""

  def holds(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

  return Rule(f"{least} or more, a whole number of at most {most}", holds)


def real(least: float, most: float = _LARGEST) -> Rule:
  """A finite number from `least` to `most`."""
  words = f"{least:g} or more" if most == _LARGEST else f"from {least:g} to {most:g}"
  return Rule(f"{words}, and finite", lambda value: _is_number(value) and least <= value <= most)


def either(*values: str) -> Rule:
  """One of a few texts."""
  words = f"one of {', '.join(values)}"
  return Rule(words, lambda value: isinstance(value, str) and value in values)


def sequence(each: Rule, *, empty: bool = True) -> Rule:
  """A tuple or a list of values of one kind."""
  return Rule(
    f"a tuple, each of it {each.words}" + ("" if empty else ", with at least one"),
    lambda value: (
      isinstance(value, tuple | list) and (empty or len(value) > 0) and all(map(each.holds, value))
    ),
  )


def optional(rule: Rule) -> Rule:
  """A value that the rule allows, or None."""
  return Rule(f"{rule.words}; or None", lambda value: value is None or rule.holds(value))


def or_auto(rule: Rule) -> Rule:
  """A value that the rule allows, or "auto"."""
  return Rule(f"{rule.words}; or auto", lambda value: value == "auto" or rule.holds(value))


SEED = whole(0, checks.MAX_SEED)
COUNT = whole(1)
ANY_COUNT = whole(0)
FLAG = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str))
NAME = Rule(
  "a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip())
)
SHARE = real(0.0, 1.0)
POSITIVE = Rule(
  "above 0 and finite, as float32 has it",
  lambda value: _is_number(value) and _TINY <= value <= _LARGEST,
)
LIMIT = Rule("above 0", lambda value: POSITIVE.holds(value) or value == math.inf)
DECAY = Rule(
  "0 or more and below 1, as float32 has it",
  lambda value: _is_number(value) and 0 <= value < 1 and np.float32(value) < 1,
)
SIZE = real(-_LARGEST)
PATTERNS = sequence(NAME, empty=False)
SOURCES = Rule(
  "an address that is not empty, or a tuple of them",
  lambda value: NAME.holds(value) or PATTERNS.holds(value),
)
