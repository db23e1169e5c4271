"""What a run is at, on the standard error: how far it is, how long it takes, what it waits for.

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

from lora_jax.train.step import shape_of as shape_of_tokens

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

Item = TypeVar("Item")


class Progress:
  """A bar on the standard error, one update a step; a context manager.

  Args:
    start: the steps done before, in an earlier process.
    total: the steps of the whole run.
    unit: what a batch is counted in, in the singular.
    disable: show nothing, as in all but one of several processes.
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
    """Shows what is being done, until the next update."""
    self._bar.set_postfix_str(what)


def watched(
  items: Collection[Item],
  what: str,
  *,
  compiled: set | None = None,
  shape_of: Callable[[Item], tuple[int, ...]] = shape_of_tokens,
  unit: str = "token",
  leave: bool = True,
  disable: bool = False,
) -> Iterator[Item]:
  """Yields items, with a bar that moves when the next one is asked for.

  Args:
    items: batches, or the parts of a model.
    what: stands before the bar.
    compiled: of batches, the shapes that have been met: of others the bar says that they are being
      compiled, and they are added.
    shape_of: the rows and the tokens of a row of a batch.
    unit: what these are, in the singular.
    leave: whether the bar stays when it is full.
    disable: show nothing.
  """
  with _bar(what, total=len(items), leave=leave, disable=disable) as bar:
    for item in items:
      if compiled is not None:
        shape = shape_of(item)
        new = shape not in compiled
        bar.set_postfix_str(compiling(shape, unit) if new else "", refresh=new)
        compiled.add(shape)
      yield item
      bar.update()


def compiling(shape: Sequence[int], unit: str = "token") -> str:
  """What is said of batches of a new shape, (rows, length) or (rows,)."""
  return f"compiling for {' × '.join(map(str, shape))} {unit}s"


@contextlib.contextmanager
def stage(what: str, *, disable: bool = False) -> Iterator[None]:
  """Tells of a work that has no measurable parts: what is begun, and how long it took."""
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
  # In a log file every refresh is one more piece of text, so there it is rarely refreshed.
  seconds = 0.2 if sys.stderr.isatty() else 10.0
  return tqdm(desc=what, bar_format=_FORMAT, mininterval=seconds, **options)
