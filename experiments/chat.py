r"""Chats in the terminal with a model, or with a run's model and its adapter.

    python -m experiments.chat --workdir=runs/mine
    python -m experiments.chat --source=hf://HuggingFaceTB/SmolLM2-135M-Instruct \
        --system="Be brief."
    printf 'Hello!\n/base\nHello!\n' | python -m experiments.chat --workdir=runs/mine

The answer is streamed. Ctrl-C stops it, and the partial answer stays in the conversation. A line
that begins with / is a command:

    /base     switch the adapter off, and on again
    /reset    forget the conversation
    /help     list the commands
    /exit     leave; so does the end of the input, or Ctrl-C twice

Lines from a pipe or a file are turns of the user, one per line, and the output is the same as in a
terminal. A line that begins with a space is always a turn.

The model's chat template writes the conversation. The adapter is kept apart from the model, so that
/base needs no second copy of the weights.
"""

import contextlib
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import lora_jax
from experiments import programs, speakers
from lora_jax import checks
from lora_jax.data import messages
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.text_stream import TextStream
from lora_jax.models import decode
from lora_jax.models.streaming import Streamer
from lora_jax.tasks import texts

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder: its model with its adapter.")
_SOURCE = flags.DEFINE_string("source", None, "Or a pretrained model alone, by its address.")
_SYSTEM = flags.DEFINE_string("system", None, "A system message that begins the conversation.")
_TEMPLATE = flags.DEFINE_string(
  "template", None, "A chat template's name or file; by default the run's, or the model's own."
)
_DATE = flags.DEFINE_string(
  "date", None, "The day that templates are told, as 2026-01-31; by default the run's, or today."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 512, "The most tokens of an answer.", 1)
_POSITIONS = flags.DEFINE_integer(
  "positions", None, "The most tokens of a conversation; by default as many as the model takes.", 1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", 0.0)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Samples from this fraction of the probability.", 0.0, 1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "The seed of sampling.", 0, checks.MAX_SEED)
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download what the run's config.json names, where it is not on this machine."
)

PyTree = Any
COMMANDS = {
  "/base": "hear the model without its adapter, and with it again",
  "/reset": "forget the conversation",
  "/help": "list the commands",
  "/exit": "leave",
}
_TURN = "> "  # before a turn of the user


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if (_WORKDIR.value is None) == (_SOURCE.value is None):
    raise app.UsageError("give either --workdir or --source")
  if _SOURCE.value and _FETCH.value:
    raise app.UsageError("--fetch is for a --workdir; a --source is fetched as it stands")
  if _TEMPERATURE.value == 0 and _TOP_P.value != 1:
    raise app.UsageError("--top_p has no meaning at --temperature=0; give a temperature")
  logging.set_verbosity(logging.WARNING)
  choose = decode.greedy
  if _TEMPERATURE.value:
    choose = decode.nucleus(_TEMPERATURE.value, _TOP_P.value)

  if _SOURCE.value:
    speaker = speakers.of_source(_SOURCE.value)
  else:
    speaker = speakers.of_run(_WORKDIR.value, fetch=_FETCH.value)
  with speaker.prompts(_TEMPLATE.value, _DATE.value) as prompts:
    # Before the weights are loaded: a template may take no system message, say.
    system = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
    prompts.ask(messages.check_asked({"messages": [*system, {"role": "user", "content": "Hi"}]}))
    streamer = make_streamer(speaker.shapes, choose, _POSITIONS.value)
    found, adapted = speaker.load()
    talk = Talk(prompts, streamer, found, adapted, system)
    print(f"({speaker.name}; /help lists the commands)", flush=True)
    converse(talk)


def make_streamer(shapes: Pretrained, choose: decode.Choose, positions: int | None) -> Streamer:
  """The streamer of a model's answers; of the model only shapes are needed.

  Raises:
    ValueError: for more positions than the model has, or than its cache can have.
  """
  config = shapes.config
  if positions:
    texts.check_positions(config, positions, f"--positions={positions}", config.max_length)
  positions = positions or config.max_length
  apply = lora_jax.adapt(shapes.family.make_model(config).apply)

  def read(params):
    tokens = jnp.zeros((1, 1), jnp.int32)
    cache = shapes.new_cache(1, positions)
    return apply({"params": params}, tokens, positions_BT=tokens, cache=cache)

  try:
    jax.eval_shape(read, shapes.params)
  except ValueError as error:
    raise ValueError(f"--positions={positions}: {error}") from None
  return Streamer(apply, shapes.new_cache, choose=choose, positions=positions)


class Talk:
  """A conversation under way.

  messages: what was said.
  is_base: whether the model is heard without its adapter.
  """

  def __init__(
    self,
    prompts: speakers.Prompts,
    streamer: Streamer,
    found: Pretrained,
    adapted: PyTree | None,
    system: list[messages.Message],
  ):
    self._prompts, self._streamer, self._found = prompts, streamer, found
    self._adapted, self._system = adapted, system
    self._turns = 0
    self.is_base = adapted is None
    self.messages = list(system)

  def command(self, line: str) -> str:
    """Does what a command says, other than to leave; returns what there is to say of it."""
    if line == "/reset":
      self.messages = list(self._system)
      return "(the conversation starts over)"
    if line == "/help":
      return "\n".join(f"{name:8} {what}" for name, what in COMMANDS.items())
    if line != "/base":
      return f"({checks.shown(line, 60)} is no command; begin with a space to say it)"
    if self._adapted is None:
      return "(there is no adapter: --source names a model alone)"
    self.is_base = not self.is_base
    return "(the base, without the adapter)" if self.is_base else "(with the adapter)"

  def answer(self, text: str, is_stopped: Callable[[], bool]) -> Iterator[str]:
    """Yields the answer to a turn of the user, piece by piece, and what there is to say of it.

    A turn that gets no answer is taken back.

    text: of the turn.
    is_stopped: whether to stop; asked after each token.
    """
    asked = [*self.messages, {"role": "user", "content": text}]
    try:
      prompt = self._prompts.ask(messages.check_asked({"messages": asked}))
    except ValueError as error:
      yield f"({error}; the turn is taken back)"
      return
    room = self._streamer.room(prompt)
    full = f"the conversation is full, {self._streamer.positions:,} tokens; /reset starts over"
    if not room:
      yield f"({full}; the turn is taken back)"
      return
    steps = min(room, _MAX_TOKENS.value)
    weights = self._found.params if self.is_base else self._adapted
    key = jax.random.fold_in(jax.random.key(_SEED.value), self._turns)
    self._turns += 1
    stream = TextStream(self._found.tokenizer, after=prompt)
    tokens = self._streamer.write(
      weights, prompt, steps=steps, stop_ids=self._prompts.stop_ids, key=key
    )
    said, note = "", ""
    for count, token in enumerate(tokens, start=1):
      piece = stream.add(token)
      said += piece
      yield piece
      if is_stopped():
        note = "stopped"
        break
      if count == steps:
        note = full if steps == room else f"cut at --max_tokens={steps}"
    rest = stream.end()
    said += rest
    yield rest
    if said.strip():
      self.messages = [*asked, {"role": "assistant", "content": said}]
    else:
      note = f"{note or 'no answer'}; the turn is taken back"
    yield f"{' ' if said else ''}({note})" if note else ""


def converse(talk: Talk) -> None:
  """Reads turns and commands from the standard input until its end, and prints the answers."""
  is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
  if is_terminal:
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401, by which input() has a history
  with hear_interrupts() as interrupts:
    while True:
      try:
        with interrupts.ending_a_line():
          line = input(_TURN) if is_terminal else sys.stdin.readline()
      except EOFError:
        print()
        return
      except _Interrupt:
        if interrupts.in_a_row > 1:
          print()
          return
        print("\n(Ctrl-C again leaves, as does /exit)")
        continue
      if not is_terminal and not line:
        return
      interrupts.in_a_row = 0
      line = line.rstrip()
      if not line:
        continue
      if not is_terminal:
        print(f"{_TURN}{line}")
      if line == "/exit":
        return
      if line.startswith("/"):
        print(talk.command(line), flush=True)
        continue
      for piece in talk.answer(line.strip(), lambda: interrupts.in_a_row > 0):
        print(printable(piece), end="", flush=True)
      print(flush=True)


class _Interrupt(Exception):
  """Ctrl-C at the prompt; another signal raises KeyboardInterrupt."""


class _Interrupts:
  """in_a_row: how often Ctrl-C came since the last line."""

  def __init__(self):
    self.in_a_row = 0
    self._ends_a_line = False

  def hear(self, *unused: Any) -> None:
    self.in_a_row += 1
    if self._ends_a_line:
      raise _Interrupt

  @contextlib.contextmanager
  def ending_a_line(self) -> Iterator[None]:
    """Within, Ctrl-C raises `_Interrupt`. Elsewhere it is counted."""
    self._ends_a_line = True
    try:
      yield
    finally:
      self._ends_a_line = False


@contextlib.contextmanager
def hear_interrupts() -> Iterator[_Interrupts]:
  """Handles Ctrl-C, which would end the program."""
  interrupts = _Interrupts()
  before = signal.signal(signal.SIGINT, interrupts.hear)
  try:
    yield interrupts
  finally:
    signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
  """A text without characters that would steer a terminal."""
  return "".join(x if x in "\n\t" or unicodedata.category(x) != "Cc" else "\ufffd" for x in text)


if __name__ == "__main__":
  programs.run(main)
