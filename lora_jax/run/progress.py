"""The progress of a run on standard error: steps done, time left, current work.

with Progress(start=0, total=100) as progress:
  progress.say("compiling for 16 × 48 tokens")
  progress.update(loss=0.71, tokens_per_second=812.0)

train:  42%|█████▍       | 42/100 [01:13<01:41, loss 0.412, 812 tokens/s]
"""

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

Item = TypeVar("Item")


class Progress:
  """A progress bar on standard error, one update per step; a context manager.

  Args:
    start: the steps done before, in an earlier process.
    total: the steps of the whole run.
    unit: the unit in which a batch is counted, in the singular.
    disable: True to show nothing, as in all but one of several processes.
  """

  def __init__(self, *, start: int, total: int, unit: str = "token", disable: bool = False):
    self._unit = unit
    self._bar = _bar("train", initial=start, total=total, disable=disable)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._bar.close()

  def update(self, *, loss: float, tokens_per_second: float) -> None:
    """Moves the bar by one step."""
    speed = f"{tokens_per_second:,.0f} {self._unit}s/s"
    self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
    self._bar.update()

  def say(self, what: str) -> None:
    """Shows the current work until the next update."""
    self._bar.set_postfix_str(what)


def watched(
  items: Collection[Item],
  what: str,
  *,
  compiled: set | None = None,
  shape_of: Callable[[Item], tuple[int, ...]] | None = None,
  unit: str = "token",
  leave: bool = True,
  disable: bool = False,
) -> Iterator[Item]:
  """Yields items, with a bar that moves when the next one is requested.

  Args:
    items: batches, or the parts of a model.
    what: the label of the bar.
    compiled: for batches, the shapes that were compiled. For a new shape the bar says that it is
      being compiled, and the shape is added.
    shape_of: the rows and the tokens of a row of a batch; needed with `compiled`.
    unit: the name of these tokens, in the singular.
    leave: True to keep the bar when it is full.
    disable: True to show nothing.
  """
  with _bar(what, total=len(items), leave=leave, disable=disable) as bar:
    for item in items:
      if compiled is not None and shape_of is not None:
        shape = shape_of(item)
        new = shape not in compiled
        bar.set_postfix_str(compiling(shape, unit) if new else "", refresh=new)
        compiled.add(shape)
      yield item
      bar.update()


def compiling(shape: Sequence[int], unit: str = "token") -> str:
  """The message for batches of a new shape, (rows, length) or (rows,)."""
  return f"compiling for {' × '.join(map(str, shape))} {unit}s"


@contextlib.contextmanager
def stage(what: str, *, disable: bool = False) -> Iterator[None]:
  """Announces work without measurable parts, and then the time that it took."""
  if disable:
    yield
    return
  print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
  started = time.perf_counter()
  try:
    yield
  finally:
    print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr)


def _bar(what: str, **options: Any) -> tqdm:
  # In a log file every refresh is another piece of text, so refreshes are rare there.
  seconds = 0.2 if sys.stderr.isatty() else 10.0
  return tqdm(desc=what, bar_format=_FORMAT, mininterval=seconds, **options)
