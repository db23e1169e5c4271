"""Chat templates: renders a conversation as text with a model's own Jinja template.

  template = find(tokenizer, None)                    # the model's own
  with Renderer(template, date="2026-01-01") as renderer:
    whole, before = renderer.render(messages, None, [(3, False), (2, True)])
    text = read(whole)
    text.pieces                                       # as `Tokenizer.encode_pieces` takes them

In the rendered text, `<|im_end|>` is a token if the template wrote it, and plain text if it comes
from a message. Two marks around the texts of messages distinguish them. Two more marks enclose the
output of a `{% generation %}` block.
"""

import bisect
import contextlib
import dataclasses
import datetime
import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from lora_jax.checks import shown
from lora_jax.io import files
from lora_jax.io.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Renderings = Sequence[tuple[int, bool]]
"""The beginnings of a conversation: so many messages, and whether a generation prompt follows."""

# Unicode noncharacters, which occur in no text.
_PLAIN, _PLAIN_END, _LEARNT, _LEARNT_END = "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
RESERVED = frozenset({"\ufdd0", _PLAIN, _PLAIN_END, _LEARNT, _LEARNT_END})
"""Characters that no message and no template may hold; the first is a mark of the tokenizer."""
_MARK = re.compile(f"[{_PLAIN}-{_LEARNT_END}]")
_MARKED = re.compile(f"{_PLAIN}(.*?){_PLAIN_END}")

_DEFAULT, _OF_TOOLS = "default", "tool_use"
_MAX_BYTES = 1 << 22  # of a file; the longest published templates have 20 kB
_SECONDS, _MEMORY, _CHARACTERS = 10.0, 1 << 30, 1 << 26  # limits of a conversation
_SCRIPT = Path(__file__).with_name("chat_renderer.py")


class TemplateError(ValueError):
  """An invalid template, or a conversation that the template rejects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
  """A chat template.

  name: of the template, for errors.
  source: its text.
  variables: further variables of the template: `{"bos_token": "<s>"}`.
  special: the special tokens, the longest first.
  """

  name: str
  source: str
  variables: Mapping[str, str]
  special: tuple[str, ...]


def find(tokenizer: Tokenizer, name: str | None, *, tools: bool = False) -> Template:
  """Returns a template.

  Args:
    tokenizer: the tokenizer with the templates.
    name: of one of its templates, or a file; None for the default template.
    tools: whether it is for conversations with tools. As in `transformers`, these use the template
      named "tool_use" if there is one and `name` is None.

  Raises:
    ValueError: for an unknown name, and a model without a template.
    FileNotFoundError: for a missing file.
  """
  known = tokenizer.chat_templates
  if name is None and not known:
    raise TemplateError(
      "the model has no chat template, as base models have none; name a file by task.template"
    )
  if name is None:
    name = _OF_TOOLS if tools and _OF_TOOLS in known else _DEFAULT
  if name in known:
    source, label = known[name], f"the model's chat template {name!r}"
  elif is_file(name):
    source, label = read_file(name), name
  else:
    raise TemplateError(
      f"the model has no chat template {name!r}; it has {', '.join(sorted(known)) or 'none'}. "
      "Name one of them by task.template, or a file that ends with .jinja"
    )
  if found := RESERVED.intersection(source):
    raise TemplateError(f"{label}: holds U+{ord(min(found)):04X}, which is no character")
  special = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
  return Template(
    name=label,
    source=source,
    variables=tokenizer.named_tokens,
    special=tuple(special),
  )


def is_file(name: str) -> bool:
  """Whether the name of a template is a file path."""
  return name.endswith(".jinja") or "/" in name


def read_file(path: str) -> str:
  """Returns the text of a template file.

  Raises:
    FileNotFoundError: if it is missing.
    ValueError: if it is not text, or too long.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"{path}: no such chat template")
  return files.read_text(Path(path), _MAX_BYTES)


def check_date(field: str, date: str) -> None:
  """Raises ValueError for an invalid date, with the name of its field."""
  try:
    datetime.datetime.strptime(date, "%Y-%m-%d")
  except (TypeError, ValueError):
    raise ValueError(f"{field} {shown(date)} is no day; write it as 2026-01-31") from None


class Text(NamedTuple):
  """The output of a template.

  text: without marks.
  pieces: its parts, each with whether special tokens in it are tokens.
  `learnt`: the spans of the generation blocks in it, `(start, end)` in characters.
  marks: the positions of the marks in the text with marks.
  """

  text: str
  pieces: list[tuple[str, bool]]
  learnt: list[tuple[int, int]]
  marks: list[int]

  def unmarked(self, at: int) -> int:
    """Converts a position in the text with marks to one in `text`."""
    return at - bisect.bisect_left(self.marks, at)


def read(marked: str) -> Text:
  """Parses and removes the marks of a text.

  Raises:
    ValueError: for unpaired marks, as when a template truncates a message.
  """
  pieces, learnt, marks = [], [], []
  length = position = 0
  plain, start = False, None
  for found in _MARK.finditer(marked):
    piece = marked[position : found.start()]
    pieces.append((piece, not plain))
    length, position = length + len(piece), found.end()
    marks.append(found.start())
    if found[0] == (_PLAIN_END if plain else _PLAIN):
      plain = not plain
    elif found[0] == _LEARNT and start is None:
      start = length
    elif found[0] == _LEARNT_END and start is not None:
      learnt.append((start, length))
      start = None
    else:
      raise TemplateError(
        "cuts a message within a special token's text, or has a generation block in another"
      )
  if plain or start is not None:
    raise TemplateError("cuts a message within a special token's text")
  pieces.append((marked[position:], True))
  text = "".join(piece for piece, _ in pieces)
  return Text(text, [piece for piece in pieces if piece[0]], learnt, marks)


def read_plainly(marked: str) -> str:
  """Returns a part of a text without its marks, for messages."""
  return _MARK.sub("", marked)


class Renderer:
  """A template in a separate process with limits on time and memory; a context manager.

  template: of the renderer.
  marked: whether the template marks the assistant's output by `{% generation %}`.
  """

  def __init__(
    self, template: Template, *, date: str, seconds: float = _SECONDS, memory: int = _MEMORY
  ):
    """Starts the process.

    Args:
      template: see `find`.
      date: the date for templates that print it, as 2026-01-31.
      seconds: of CPU time, for each conversation.
      memory: bytes.

    Raises:
      ValueError: for an invalid template.
      ImportError: without jinja2.
    """
    self.template, self._seconds = template, seconds
    self._special = re.compile("|".join(map(re.escape, template.special)) or r"(?!)")
    # -P: modules of this folder must not shadow Python's own.
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_SCRIPT)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
    )
    try:
      with self.named():
        answer = self._ask({
          "template": template.source, "variables": template.variables, "date": date,
          "marks": _LEARNT + _LEARNT_END, "seconds": seconds, "bytes": memory,
          "characters": _CHARACTERS,
        })  # fmt: skip
    except BaseException:
      self.close()
      raise
    self.marked: bool = answer["marked"]

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()

  def render(
    self, messages: Messages, tools: Sequence[Any] | None, renderings: Renderings
  ) -> list[str]:
    """Returns the text with marks of each rendering; see `read`.

    Args:
      messages: plain JSON, checked by `lora_jax.data.messages.check`.
      tools: likewise; None for no tools.
      renderings: the prefixes of the conversation to render, as (number of messages, whether a
        generation prompt follows).

    Raises:
      ValueError: for a template that fails, exceeds a limit, leaves its sandbox, or depends on the
        text of a special token in a message.
    """
    given = [list(messages), tools]
    marked = _map_texts(given, self._mark)
    texts = self._texts(marked[0], marked[1], renderings)
    if marked != given:
      for text, plainly in zip(texts, self._texts(list(messages), tools, renderings), strict=True):
        if re.sub(f"[{_PLAIN}{_PLAIN_END}]", "", text) != plainly:
          found = _MARKED.search(json.dumps(marked, ensure_ascii=False))
          assert found is not None
          raise TemplateError(
            "acts on the text of a special token in a message, or writes it in another way, as of "
            f"{found[1]!r}; take it out of the message"
          )
    return texts

  def _texts(self, messages: Messages, tools: Any, renderings: Renderings) -> list[str]:
    asked = {"messages": messages, "tools": tools, "renderings": renderings}
    return self._ask(asked)["texts"]

  def _mark(self, text: str) -> str:
    return self._special.sub(_PLAIN + r"\g<0>" + _PLAIN_END, text)

  def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
    assert self._process.stdin is not None and self._process.stdout is not None  # pipes
    try:
      self._process.stdin.write(json.dumps(request).encode() + b"\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = b""
    if not line.endswith(b"\n"):
      raise self._ended()
    answer = json.loads(line)
    if "error" in answer:
      raise TemplateError(answer["error"])
    return answer

  def _ended(self) -> Exception:
    try:
      import jinja2  # noqa: F401
    except ImportError:
      return ImportError("chat templates need jinja2; pip install 'jinja2>=3.1.6'")
    code = self._process.wait()
    if code == -signal.SIGPROF:
      return TemplateError(f"renders for more than {self._seconds:g} seconds, perhaps for ever")
    return TemplateError(f"ended its process (exit code {code}), as for want of memory")

  @contextlib.contextmanager
  def named(self) -> Iterator[None]:
    """Prefixes the errors of a template with its name."""
    try:
      yield
    except TemplateError as error:
      raise TemplateError(f"{self.template.name}: {error}") from None


@contextlib.contextmanager
def renderers(
  tokenizer: Tokenizer, name: str | None, date: str
) -> Iterator[Callable[[bool], Renderer]]:
  """Yields `(whether there are tools) -> Renderer`; renderers start on first use.

  Args:
    tokenizer, name: as in `find`.
    date: as in `Renderer`.
  """
  with contextlib.ExitStack() as stack:

    @functools.cache
    def renderer(tools: bool) -> Renderer:
      return stack.enter_context(Renderer(find(tokenizer, name, tools=tools), date=date))

    yield renderer


def _map_texts(value: Any, function: Any) -> Any:
  """Applies a function to each string value of JSON, but not to the names of fields."""
  if isinstance(value, str):
    return function(value)
  if isinstance(value, Mapping):
    return {name: _map_texts(x, function) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [_map_texts(x, function) for x in value]
  return value
