"""The progress bar: loss, tokens a second and the time left.

with Progress(start=0, total=100) as progress:
  progress.update(loss=0.71, tokens_per_second=812.0)

train:  42%|█████▍       | 42/100 [01:13<01:41, loss 0.412, 812 tokens/s]
"""

import sys
from typing import Any

from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
  """A bar on the standard error, one update a step; a context manager.

  Args:
    start: the steps done before, in an earlier process.
    total: the steps of the whole run.
    disable: show nothing, as in all but one of several processes.
  """

  def __init__(self, *, start: int, total: int, disable: bool = False):
    # In a log file every refresh is one more piece of text, so there it is rarely refreshed.
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    self._bar = tqdm(
      initial=start,
      total=total,
      desc="train",
      bar_format=_FORMAT,
      mininterval=seconds,
      disable=disable,
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._bar.close()

  def update(self, *, loss: float, tokens_per_second: float) -> None:
    """Moves the bar by one step."""
    self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
    self._bar.update()
