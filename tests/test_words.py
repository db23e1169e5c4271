"""The words of docstrings, comments, messages and pages: a list of what to write instead.

Code does not count: no identifiers, no strings without a space, no `code` in backticks, no fenced
blocks. A word that is right in one place is reworded there too, or its pattern is made narrower.
"""

import ast
import io
import json
import pathlib
import re
import tokenize
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results.md")
FOLDERS = ("lora_jax", "benchmarks", "experiments", "configs", "docs", "notebooks")

# The start of a sentence, a paragraph, a heading or an item.
START = r"(?:\A\s*|[.!?:]\s+|\n\s*\n\s*|\n[#-]+ )"

# What to look for, and what to write instead. A space matches any white space.
WORDS = (
  (r"\w*(?:quant|normal|initial|factor|material|optim|token|random|minim|maxim|serial|penal|summar"
   r"|organ|util|recogn|stabil|general|special|regular)is(?:e|ed|es|er|ers|ing|ations?)\b",
   "US spelling, -ize"),
  (r"\b(?:learnt|\w*neighbour\w*|behaviours?|colours?|favour\w*|honour\w*|centred|labelled|modelling)\b",
   "US spelling: learned, neighbor, behavior, color, centered, labeled"),
  (r"\bbeside\b", "alongside, with, next to, in addition to"),
  (r"\bbesides\b", "in addition"),
  (r"\b(?:is|are|be|being|was|were|been|never|ever|gets) formed\b", "materialized, computed"),
  (r"\bforming\b", "materializing, computing"),
  (r"\b(?:to|that|which|it|adapt|would|and) forms? (?:a|all|an|any|every|it|no|one|the|them)\b",
   "materialize, compute"),
  (r"(?<!exit\s)(?<!\()\bcodes\b(?!:)", "quantized values"),
  (r"\bdecoded (?:first|for one|where)\b|\bdecodes? (?:a|its|the) (?:array|block|code|weight)s?\b",
   "dequantize"),
  (r"\bnumber by number\b", "elementwise"),
  (r"\b(?:its|kernels?'?s?|leaf's|leaves'|arrays?'?s?|matrix's|outputs?'?s?|weights'?) numbers\b",
   "parameters, values"),
  (r"\b(?:bits?|byte) a number\b", "per value"),
  (r"\bnumbers that (?:train|are trained)\b|\bhow many numbers\b", "the number of parameters"),
  (r"\b(?:a|this|the|its) share\b|\bshare of\b", "fraction"),
  (r"\bshar(?:e|es|ed|ing) out\b", "sharded, divided, allocated"),
  (r"\bshall\b", "must, should, will"),
  (r"\bwhich is to say\b", "that is"),
  (r"\bin the place of\b", "in place of, instead of"),
  (r"\b[wW]hatever\b|\b[wW]hoever\b|\bwhichever\b", "for any, of any, regardless of"),
  (START + r"What\b(?![^.!?]*\?)", "start with the subject"),
  (START + r"Of (?:which|an?|the|all|each|it|one|several|some|these|those|two|what)\b",
   "start with the subject"),
  (r"\bwhat ·+ (?:found|gave|gives|made|makes|returned|returns|wrote|writes)\b", "the result of"),
  (r"\bmeets? (?:an?|its|no|one|the) (?:group|kernel|matrix|row|Weight)s?\b", "multiplies, has"),
  (r"\b(?<!there\s)(?:is|are) none\b|\bin vain\b|\bor else\b", "is not one, otherwise"),
  (r"\bfill(?:s|ed)? up\b", "pad"),
  (r"\bwithout a word\b", "silently"),
  (r"\bstands? for (?:an|the|this) array\b", "represents"),
  (r"\bheld against\b", "compared with, checked against"),
  (r"\bwill do\b", "suffices"),
  (r"\banew\b", "again, afresh"),
  (r"\bas ever\b", "as usual"),
  (r"\bmade up for\b", "compensated"),
  (r"\b(?:hereby|hitherto|thereby|therein|thereof|wherein|whereby|lest|albeit)\b", "plain words"),
)  # fmt: skip


def prose(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The texts of a file, each with the number of its first line."""
  text = path.read_text()
  if path.suffix == ".py":
    yield from comments(text)
    yield from strings(text)
  elif path.suffix == ".ipynb":
    for cell in json.loads(text)["cells"]:
      if cell["cell_type"] == "markdown":
        yield line_of(text, cell["source"]), without_code("".join(cell["source"]))
  else:
    yield 1, without_code(text)


def comments(text: str) -> Iterator[tuple[int, str]]:
  """The comments; those of following lines are one text."""
  block: list[str] = []
  last = (0, 0)
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type != tokenize.COMMENT:
      continue
    line, column = token.start
    if block and (line, column) != (last[0] + 1, last[1]):
      yield last[0] - len(block) + 1, without_code("\n".join(block))
      block = []
    block.append(token.string.lstrip("#:"))
    last = line, column
  if block:
    yield last[0] - len(block) + 1, without_code("\n".join(block))


def strings(text: str) -> Iterator[tuple[int, str]]:
  """The strings with a space in them, including docstrings; f-strings without their values."""
  within = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.JoinedStr):
      within |= {id(value) for value in node.values}
      values = [x.value if isinstance(x, ast.Constant) else "_" for x in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
      values = [node.value]
    else:
      continue
    if " " in (value := "".join(values)):
      yield node.lineno, without_code(value)


def line_of(text: str, source: list[str]) -> int:
  """The line of a notebook's file that a cell's source begins at."""
  return text[: text.index(json.dumps(source[0], ensure_ascii=False))].count("\n") + 1


def without_code(text: str) -> str:
  """The text with dots in place of fenced blocks and of code in backticks; the lines stay."""

  def dots(match: re.Match) -> str:
    return re.sub(r"\S", "·", match[0])

  return re.sub(r"`[^`]+`", dots, re.sub(r"^```.*?^```", dots, text, flags=re.M | re.S))


def faults(name: str, texts: Iterator[tuple[int, str]]) -> list[str]:
  """`file:line: word: write this instead`, for every word of the list."""
  return [
    f"{name}:{line + text[: found.end()].count(chr(10))}: "
    f"{' '.join(found[0].split())!r}: write {remedy}"
    for line, text in texts
    for pattern, remedy in WORDS
    for found in re.finditer(pattern.replace(" ", r"\s+"), text)
  ]


def files() -> dict[str, pathlib.Path]:
  found = [ROOT / page for page in PAGES]
  for folder in FOLDERS:
    found += [x for x in sorted((ROOT / folder).rglob("*")) if x.suffix in {".py", ".md", ".ipynb"}]
  return {path.relative_to(ROOT).as_posix(): path for path in found}


def test_words_that_are_read_twice_are_not_used():
  paths = files()
  assert len(paths) > 300
  found = [fault for name, path in paths.items() for fault in faults(name, prose(path))]
  assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ('"""Sums.\n\nWhat is left\nis zero.\n"""\n', ["x:3: '. What': write start with the subject"]),
    ("x = 1  # kept in\n\n# the place\n", []),
    ("# kept in\n# the place of x\n", ["x:2: 'in the place of': write in place of, instead of"]),
    ('beside = {"shall": "`codes` of a row"}\n', []),
    ('raise ValueError(\n  f"{x} is optimised"\n)', ["x:2: 'optimised': write US spelling, -ize"]),
    ('print("What is it?")\n', []),
  ],
)
def test_a_word_is_found_in_prose_and_not_in_code(source, expected, tmp_path):
  path = tmp_path / "x.py"
  path.write_text(source)
  assert faults("x", prose(path)) == expected
