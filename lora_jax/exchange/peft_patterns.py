r"""The patterns of `rank_pattern` and `alpha_pattern`: untrusted regular expressions from a file.

    patterns = compiled({"q_proj": 4, r"layers\.1\.mlp\..*": 2})
    first_match(patterns, "model.layers.1.mlp.up_proj", default=8)     # 2

PEFT matches a pattern against the end of a module's name, after a dot, and takes the first match.
Some regular expressions take exponential time, and files are untrusted. So only names with a few
simple wildcards are accepted, whose worst case is fast.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

Patterns = list[tuple[re.Pattern, Any]]

_MAX_LENGTH, _MAX_WAYS, _MAX_WILD, _MAX_PATTERNS = 1000, 6400, 32, 10_000
_REPEAT = 40  # a repetition costs as much as so many alternatives
_ITEM = r"(?:\\[.\-dw]|\[[\w-]+\]|[\w.-])"  # a character, or a class of characters
_WORD = r"(?:\\[.\-]|[\w.-])*"
_SIMPLE = re.compile(rf"\^?(?:{_ITEM}[*+?]?|\({_WORD}(?:\|{_WORD})*\))*\$?", re.ASCII)
_GROUP = re.compile(r"\([^)]*\)")


def compiled(patterns: Mapping[str, Any]) -> Patterns:
  """Returns the patterns with their values, in order.

  Raises:
    ValueError: for an invalid regular expression, one that may be slow, and too many patterns.
  """
  if len(patterns) > _MAX_PATTERNS:
    raise ValueError(f"there are {len(patterns)} patterns; at most {_MAX_PATTERNS} are read")
  wild = sum(_ways(pattern) > 1 for pattern in patterns)
  if wild > _MAX_WILD:
    raise ValueError(f"{wild} patterns have wildcards; at most {_MAX_WILD} are read")
  return [(_compile(pattern), value) for pattern, value in patterns.items()]


def first_match(patterns: Patterns, module: str, default: Any) -> Any:
  """Returns the value of the first pattern that matches the end of the name, or the default."""
  starts = [0, *(n + 1 for n, c in enumerate(module) if c == ".")]
  for pattern, value in patterns:
    if any(pattern.fullmatch(module, start) for start in starts):
      return value
  return default


def _compile(pattern: str) -> re.Pattern:
  short = len(pattern) <= _MAX_LENGTH and _ways(pattern) <= _MAX_WAYS
  if short and _SIMPLE.fullmatch(pattern):
    try:
      return re.compile(pattern)
    except re.error:  # a range that runs backwards
      pass
  raise ValueError(
    f"the pattern {pattern[:80]!r} is not read: a regular expression out of a file may run for "
    "ever, so only names, '.', '\\d', classes, a few alternatives and two '*' or '+' are; write "
    "the whole names of the modules"
  )


def _ways(pattern: str) -> int:
  """About how many ways there are to match a pattern, each of which may have to be tried."""
  repeats, options = sum(map(pattern.count, "*+")), pattern.count("?")
  alternatives = [group.count("|") + 1 for group in _GROUP.findall(pattern)]
  return _REPEAT ** min(repeats, 9) * 2 ** min(options, 99) * math.prod(alternatives)
