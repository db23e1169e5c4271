"""Views of leaves inside a traced function: leaves with their axes moved or sliced.

`axes.trace_axes` follows them. A value may consist of several leaves (concatenated kernels, a sum
of two), so it carries a view of each.
"""

import dataclasses
import enum
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple


class Source(enum.IntEnum):
  """The origin of a value: the greatest of the origins that it is computed from."""

  PARAMETERS = 0
  CONSTANTS = 1  # arrays that the function closes over: masks, or inputs
  INPUTS = 2


@dataclasses.dataclass(frozen=True)
class View:
  """A leaf with some of its axes moved, joined or sliced away.

  Attributes:
    path: the leaf.
    axes: the leaf's axes behind each axis of the value: usually one, none for a new axis, several
      for joined axes.
    stacks: the leaf's axes that a scan or an index has sliced away.
    times: how many copies of the whole leaf the value holds: the sliced fraction, times the number
      of copies, times the steps of the enclosing loops.
  """

  path: str
  axes: tuple[tuple[int, ...], ...]
  stacks: tuple[int, ...] = ()
  times: Fraction = Fraction(1)

  @classmethod
  def whole(cls, path: str, ndim: int) -> "View":
    return cls(path, tuple((n,) for n in range(ndim)))

  def repeated(self, times: Fraction | int) -> "View":
    return dataclasses.replace(self, times=self.times * times)

  def pick(self, order: Iterable[int]) -> "View":
    return dataclasses.replace(self, axes=tuple(self.axes[n] for n in order))

  def without(self, gone: Sequence[int]) -> "View":
    """The view of one slice, in which the removed axes become stacks."""
    kept = self.pick(n for n in range(len(self.axes)) if n not in gone)
    stacks = (*self.stacks, *(axis for n in gone for axis in self.axes[n]))
    return dataclasses.replace(kept, stacks=tuple(dict.fromkeys(stacks)))

  def inserted(self, position: int, axes: tuple[int, ...] = ()) -> "View":
    """The view with one more axis, a new one or one that was sliced away before."""
    stacks = tuple(n for n in self.stacks if n not in axes)
    every = (*self.axes[:position], axes, *self.axes[position:])
    return dataclasses.replace(self, axes=every, stacks=stacks)

  def broadcast(self, before: Sequence[int], after: Sequence[int], places: Sequence[int]) -> "View":
    """Axis n of `before` becomes axis places[n] of `after`; one of size one that grows is new."""
    behind = {
      place: axes
      for size, place, axes in zip(before, places, self.axes, strict=True)
      if size != 1 or after[place] == 1
    }
    axes = tuple(behind.get(n, ()) for n in range(len(after)))
    return dataclasses.replace(self, axes=axes).repeated(_fraction(after, before))

  def cut(self, before: Sequence[int], after: Sequence[int]) -> "View":
    """A slice of the view. An axis with one remaining index was indexed, so it may be a stack."""
    one = (n for n, size in enumerate(after) if size == 1 < before[n])
    stacks = dict.fromkeys((*self.stacks, *(axis for n in one for axis in self.axes[n])))
    return dataclasses.replace(self, stacks=tuple(stacks)).repeated(_fraction(after, before))

  def reshaped(self, before: Sequence[int], after: Sequence[int]) -> "View":
    """The view after a reshape; axes split or joined together share the leaf's axes behind them."""
    starts, new_starts = (
      list(itertools.accumulate(x, operator.mul, initial=1)) for x in (before, after)
    )
    common = set(starts) & set(new_starts)

    def group(start: int) -> int:
      return sum(boundary <= start for boundary in common)

    def behind(start: int) -> tuple[int, ...]:
      old = zip(starts, before, self.axes, strict=False)
      found = (n for s, size, axes in old if size > 1 and group(s) == group(start) for n in axes)
      return tuple(dict.fromkeys(found))

    new = zip(new_starts, after, strict=False)
    axes = tuple(behind(start) if size > 1 else () for start, size in new)
    return dataclasses.replace(self, axes=axes)

  @property
  def arrangement(self) -> tuple:
    """All fields but `times`."""
    return self.path, self.axes, self.stacks


@dataclasses.dataclass(frozen=True)
class Value:
  """The known facts about a value: the leaves that it is a view of, and its origin."""

  views: tuple[View, ...] = ()
  source: Source = Source.PARAMETERS

  def map(self, f: Callable[[View], View]) -> "Value":
    return dataclasses.replace(self, views=tuple(map(f, self.views))) if self.views else self

  def repeated(self, times: Fraction | int) -> "Value":
    return self.map(lambda view: view.repeated(times))


PLAIN = {source: Value((), source) for source in Source}
"""Values that are no view of a leaf."""


def either(values: Iterable[Value]) -> Value:
  """The value of an operation that yields one of the values, or all in the same places (a sum)."""
  views, source = {}, Source.PARAMETERS
  for value in values:
    source = max(source, value.source)
    for view in value.views:
      views.setdefault(view.arrangement, view)
  return Value(tuple(views.values()), source)


def together(values: Iterable[Value]) -> Value:
  """The value that holds all of the values, each in its own place (a concatenation)."""
  views, source = {}, Source.PARAMETERS
  for value in values:
    source = max(source, value.source)
    for view in value.views:
      times = sum(x.times for x in (view, views.get(view.arrangement)) if x)
      views[view.arrangement] = dataclasses.replace(view, times=times)
  return Value(tuple(views.values()), source)


def _fraction(a: Sequence[int], b: Sequence[int]) -> Fraction:
  return Fraction(math.prod(a), math.prod(b) or 1)


class Use(NamedTuple):
  """One use of a leaf: the primitive, the roles of axes, the other operand's origin, the number of
  rows, and the number of groups of outputs with separate inputs."""

  primitive: str
  roles: dict[int, str]
  source: Source
  rows: Fraction
  groups: int = 1


class Notes:
  """The uses that were seen of each leaf."""

  def __init__(self):
    self.uses: dict[str, list[Use]] = {}
    self.not_followed: dict[str, list[str]] = {}
    self.joined: dict[str, list[str]] = {}

  def use(
    self,
    value: Value,
    primitive: str,
    inputs: Sequence[int],
    stacks: Sequence[int],
    rows: int,
    source: Source,
    groups: int = 1,
  ) -> None:
    """Notes a use of the leaves behind a value; a leaf that is not contracted is only joined.

    inputs, stacks: axes of the value.
    rows: the number of rows that the value multiplies.
    source: the origin of the other operand.
    groups: the number of groups of outputs with separate inputs.
    """
    for view in value.views:
      roles = dict.fromkeys(view.stacks, "s")
      roles |= {axis: "o" for behind in view.axes for axis in behind}
      roles |= {axis: "i" for n in inputs for axis in view.axes[n]}
      roles |= {axis: "s" for n in stacks for axis in view.axes[n]}
      if "i" not in roles.values():
        self.join([Value((view,))], primitive)
        continue
      use = Use(primitive, roles, source, rows * view.times, groups)
      self.uses.setdefault(view.path, []).append(use)

  def stop(self, values: Iterable[Value], primitive: str) -> None:
    """Notes that the leaves behind the values are not followed any further."""
    for view in (view for value in values for view in value.views):
      self.not_followed.setdefault(view.path, []).append(primitive)

  def join(self, values: Iterable[Value], primitive: str) -> None:
    """Notes that the leaves behind the values have become activations."""
    for view in (view for value in values for view in value.views):
      self.joined.setdefault(view.path, []).append(primitive)

  def extend(self, other: "Notes") -> None:
    for mine, others in zip(vars(self).values(), vars(other).values(), strict=True):
      for path, found in others.items():
        mine.setdefault(path, []).extend(found)
