"""Renders chat templates with jinja2, in a separate process.

`lora_jax.data.chat_templates` starts it. It reads lines of JSON from stdin and answers each with
one line. Templates are untrusted: one may loop forever or allocate too much memory, so this process
limits both. The first line sets up the template:

    {"template": "...", "variables": {...}, "date": "2026-01-01", "marks": "...", "seconds": 10,
     "bytes": 1073741824, "characters": 67108864}
    {"marked": true}                        # whether it has a generation block

Each further line is a conversation, with the prefixes of it to render:

    {"messages": [...], "tools": null, "renderings": [[2, true], [3, false]]}
    {"texts": ["...", "..."]}               # of 2 messages and a generation prompt, of 3 messages

Templates have the same environment as in `transformers` (`transformers.utils.chat_template_utils`).
This module imports nothing of this package, so that the process starts quickly.
"""

import datetime
import json
import resource
import signal
import sys
import traceback
from typing import Any, ClassVar

import jinja2
import jinja2.ext
from jinja2 import nodes, sandbox

_SHOWN = 300  # characters of an error


class RaisedError(jinja2.TemplateError):
  """Raised by a template's `raise_exception`."""


class TooLongError(Exception):
  """A rendered text over the limit."""


class Environment(sandbox.ImmutableSandboxedEnvironment):
  """The environment of a template that may mark the generated text.

  marked: whether the template has a generation block.
  opening, closing: the characters around such a block.
  """

  marked: bool
  opening: str
  closing: str


class GenerationMarks(jinja2.ext.Extension):
  """The block `{% generation %}`, which puts its content between two marks."""

  tags: ClassVar = {"generation"}
  environment: "Environment"

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    self.environment.marked = True
    return nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

  def _between_marks(self, caller):
    return self.environment.opening + caller() + self.environment.closing


class Namespace(jinja2.utils.Namespace):
  """Jinja's namespace, without access to attributes of Python objects."""

  def __init__(*args: Any, **kwargs: Any):
    self, args = args[0], args[1:]
    values = dict(*args, **kwargs)
    for name in values:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name, value):
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name):
  if str(name).startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def make_environment(date: datetime.datetime, marks: str) -> Environment:
  """Returns the environment of templates.

  Args:
    date: the date of `strftime_now`.
    marks: the two characters around a generation block.
  """
  environment = Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, jinja2.ext.loopcontrols]
  )
  environment.extend(marked=False, opening=marks[0], closing=marks[1])

  def raise_exception(message):
    raise RaisedError(str(message))

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter writes "<" as "\u003c".
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment.filters["tojson"] = tojson
  environment.globals |= {
    "raise_exception": raise_exception,
    "strftime_now": date.strftime,
    "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    "namespace": Namespace,
  }
  return environment


class Renderer:
  """A compiled template."""

  def __init__(self, setup: dict):
    date = datetime.datetime.strptime(setup["date"], "%Y-%m-%d")
    environment = make_environment(date, setup["marks"])
    self._template = environment.from_string(setup["template"])
    self._variables, self._most = setup["variables"], setup["characters"]
    self.marked = environment.marked

  def render(self, conversation: dict) -> list[str]:
    """Returns the text of each rendering."""
    texts, length = [], 0
    for count, prompt in conversation["renderings"]:
      pieces = self._template.generate(
        **self._variables,
        messages=conversation["messages"][:count],
        tools=conversation["tools"],
        documents=None,
        add_generation_prompt=prompt,
      )
      kept = []
      for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > self._most:
          raise TooLongError(f"writes more than {self._most:,} characters")
      texts.append("".join(kept))
    return texts


def _explain(error: BaseException) -> str:
  """Describes an error, with the template's line."""
  frames = traceback.walk_tb(error.__traceback__)
  lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
  if isinstance(error, jinja2.TemplateSyntaxError):
    lines = [error.lineno]
  where = f" (its line {lines[-1]})" if lines else ""
  text = str(error)[:_SHOWN]
  match error:
    case RaisedError():
      return f"raises {text!r}{where}"
    case jinja2.exceptions.SecurityError():
      return f"reaches outside its sandbox{where}: {text}"
    case jinja2.TemplateSyntaxError():
      return f"is no Jinja template{where}: {text}"
    case TooLongError():
      return text
    case MemoryError():
      return f"asks for more memory than a template may have{where}"
    case RecursionError():
      return f"calls itself without an end{where}"
  return f"fails{where}: {type(error).__name__}: {text}"


def main() -> None:
  renderer = None
  # Read as bytes, since the locale may have another encoding.
  for line in sys.stdin.buffer:
    request = json.loads(line)
    if renderer is None:
      size, seconds = request["bytes"], request["seconds"]
      resource.setrlimit(resource.RLIMIT_AS, (size, size))
    # The limit is on CPU time, so a busy machine does not trigger it. The signal has no handler, so
    # it ends the process even within one long operation.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
      if renderer is None:
        renderer = Renderer(request)
        answer = {"marked": renderer.marked}
      else:
        answer = {"texts": renderer.render(request)}
      text = json.dumps(answer)
    except Exception as error:
      text = json.dumps({"error": _explain(error)})
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main()
