r"""The patterns of `rank_pattern` and `alpha_pattern`: regular expressions that come with a file.

    patterns = compiled({"q_proj": 4, r"layers\.1\.mlp\..*": 2})
    first_match(patterns, "model.layers.1.mlp.up_proj", default=8)     # 2

PEFT holds a pattern against the end of a module's name, from a dot on, and takes the first that
fits. Some regular expressions take exponential time, and these were written by whoever made the
file. So only names with a few simple wildcards are accepted, whose worst case is short.
"""

import re
from collections.abc import Mapping
from typing import Any

Patterns = list[tuple[re.Pattern, Any]]

_MAX_LENGTH, _MAX_REPEATS, _MAX_CHOICES, _MAX_WILD = 1000, 2, 8, 100
_ITEM = r"(?:\\[.\-dw]|\[[\w-]+\]|[\w.-])"  # a character, or a class of characters
_WORD = r"(?:\\[.\-]|[\w.-])*"
_SIMPLE = re.compile(rf"\^?(?:{_ITEM}[*+?]?|\({_WORD}(?:\|{_WORD})*\))*\$?", re.ASCII)


def compiled(patterns: Mapping[str, Any]) -> Patterns:
  """The patterns with their values, in their order.

  Raises:
    ValueError: for a pattern that is no regular expression, or one that may take long.
  """
  wild = sum(_choices(pattern) > 0 for pattern in patterns)
  if wild > _MAX_WILD:
    raise ValueError(f"{wild} patterns have wildcards; at most {_MAX_WILD} are read")
  return [(_compile(pattern), value) for pattern, value in patterns.items()]


def first_match(patterns: Patterns, module: str, default: Any) -> Any:
  """The value of the first pattern that ends the module's name, or the default."""
  for pattern, value in patterns:
    if pattern.fullmatch(module):
      return value
  return default


def _compile(pattern: str) -> re.Pattern:
  repeats = sum(map(pattern.count, "*+"))
  short = len(pattern) <= _MAX_LENGTH and repeats <= _MAX_REPEATS
  if short and _choices(pattern) <= _MAX_CHOICES and _SIMPLE.fullmatch(pattern):
    try:
      return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error:  # a range that runs backwards
      pass
  raise ValueError(
    f"the pattern {pattern[:80]!r} is not read: a regular expression out of a file may run for "
    "ever, so only names, '.', '\\d', classes, a few alternatives and two '*' or '+' are; write "
    "the whole names of the modules"
  )


def _choices(pattern: str) -> int:
  """How many times the pattern leaves a choice; what matching costs grows with the power of it."""
  return sum(map(pattern.count, "*+?|"))
