"""Marks the words in which a transcript differs from its reference, as Markdown.

marked("a small latte", "a tall latte please")     # "a ~~small~~ **tall** latte **please**"
"""

import difflib
import re

_MARKUP = re.compile(r"([\\`*_~|<>\[\]#&])")


def plain(text: str) -> str:
  """Returns a text on one line, with what Markdown would read as markup escaped."""
  return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def marked(wanted: str, text: str) -> str:
  """Returns the text with its wrong words in bold, and missing ones of `wanted` struck through."""
  wanted_words, words = wanted.split(), text.split()
  found = []
  match = difflib.SequenceMatcher(a=wanted_words, b=words, autojunk=False)
  for kind, start, end, first, last in match.get_opcodes():
    if kind == "equal":
      found += [plain(word) for word in words[first:last]]
      continue
    found += [f"~~{plain(word)}~~" for word in wanted_words[start:end]]
    found += [f"**{plain(word)}**" for word in words[first:last]]
  return " ".join(found)
