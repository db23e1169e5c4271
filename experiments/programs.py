"""How every main program ends: by its own end, or with one line and an exit code that is known.

    programs.run(main)       # instead of absl's app.run(main)

code  when
0     it came to its end; or Ctrl-C or SIGTERM stopped one that goes on by the same command
1     it was refused, or failed: the last line on the standard error says why
130   Ctrl-C or SIGTERM stopped another one, whose work is lost

A signal outside of the training loop, which saves first, is heard at the next step of Python. Where
none comes for `PATIENCE` seconds, as while XLA compiles, the process ends all the same. A process
that is stopped skips the interpreter's own end, where threads of XLA that are still at work crash.
Outputs are written completely or not at all, see `lora_jax.io.outputs`.
"""

import contextlib
import functools
import gc
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags

from experiments import compilation_cache
from lora_jax.train import loop

PATIENCE = 5.0
STOPPED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OWN = [
  pathlib.Path(__file__).parents[1] / room
  for room in ("lora_jax", "experiments", "configs", "benchmarks")
]

_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Print where an error came from, also when its message says all."
)
_CACHE = flags.DEFINE_bool(
  "compilation_cache",
  True,
  "Keep compiled programs for the next start, in a folder of the user's.",
)


def run(
  main: Callable, *, resumes: bool = False, several: Callable[[], bool] = lambda: False
) -> None:
  """Runs a program's `main(argv)` as `absl.app.run` does, which ends the process.

  Args:
    main: of the program.
    resumes: whether the same command goes on where it was stopped.
    several: tells, once flags are read, whether this is to be one of several processes, which do
      without the cache of compiled programs.
  """
  line, code = "stopped before its end; the same command starts over", STOPPED
  if resumes:
    line, code = str(loop.StoppedAtOnce()), 0
  _hear(line, code)
  _hear_again()
  try:
    with loop.interruptible():
      app.run(functools.partial(_started, main, several))
  except loop.StoppedAtOnce:
    pass
  except loop.Interrupted as stopped:
    print(stopped)  # asked for, and saved
    line, code = "", 0
  except (ArithmeticError, OSError, TypeError, ValueError) as error:
    line, code = _describe(error), 1
  finally:
    # All is done, or all that is left is to say why not.
    for number in _SIGNALS:
      signal.signal(number, signal.SIG_IGN)
  gc.collect()  # with the error go its frames, and the progress bars in them
  _leave(line, code)


def _started(main: Callable, several: Callable[[], bool], argv: list[str]) -> None:
  """A program's main, with JAX's cache of what it compiles."""
  if _CACHE.value and not several():
    compilation_cache.begin()
  main(argv)


def _hear(line: str, code: int) -> None:
  """Has the process left when a signal is not heeded in time."""
  # Python's handlers wait for its next step; here the system's own writes at once.
  told, tells = socket.socketpair()
  tells.setblocking(False)
  signal.set_wakeup_fd(tells.detach(), warn_on_full_buffer=False)

  def watch() -> None:
    while number := told.recv(1):
      if _stops(number[0]):
        time.sleep(PATIENCE)
        if _stops(number[0]):
          _leave(line, code)

  threading.Thread(target=watch, daemon=True, name="watch for signals").start()


def _hear_again() -> None:
  """Raises a signal's KeyboardInterrupt again where Python drops it.

  In a callback of the garbage collector or a `__del__`, Python reports an exception and goes on.
  """
  report = sys.unraisablehook

  def hook(dropped: Any) -> None:
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
      report(dropped)
      return
    heeded = [x for x in _SIGNALS if signal.getsignal(x) is not signal.SIG_IGN]
    if heeded:  # later, when the main thread has left the callback
      again = threading.Timer(0.05, os.kill, (os.getpid(), heeded[0]))
      again.daemon = True
      again.start()

  sys.unraisablehook = hook


def _stops(number: int) -> bool:
  """Whether a signal is to stop the process: it is neither in `fit`, which saves first, nor past
  its end."""
  return number in _SIGNALS and signal.getsignal(number) == signal.default_int_handler


def _describe(error: Exception) -> str:
  """The error's own words where they were written for people; else where it came from, too."""
  last = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
  own = isinstance(error, OSError) or any(last.is_relative_to(room) for room in _OWN)
  if own and not _TRACEBACK.value:
    return f"{type(error).__name__}: {error}"
  return "".join(traceback.format_exception(error)).rstrip()


def _leave(line: str, code: int) -> NoReturn:
  with contextlib.suppress(OSError, ValueError):  # closed, or full
    sys.stdout.flush()
  with contextlib.suppress(OSError, ValueError):
    sys.stderr.flush()
    _say_last(f"{line}\n" if line else "")
  if jax.distributed.is_initialized():
    sys.exit(code)  # whose end tells the other processes
  os._exit(code)


def _say_last(text: str) -> None:
  """Writes the last words on the standard error; what other threads say from now on is lost."""
  error = sys.stderr.fileno()
  ours = os.dup(error)
  os.dup2(os.open(os.devnull, os.O_WRONLY), error)
  # In one call, for a thread's line that is under way could come between two.
  os.write(ours, text.encode(sys.stderr.encoding, "backslashreplace"))
