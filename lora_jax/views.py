"""Leaves on their way through a function: values that are leaves with their axes moved or cut.

`axes.trace_axes` follows them. A value may be made of several leaves (concatenated kernels, a sum
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
  """What a value is computed from: the last of these that takes part."""

  PARAMETERS = 0
  CONSTANTS = 1  # arrays that the function closes over: masks, or inputs
  INPUTS = 2


@dataclasses.dataclass(frozen=True)
class View:
  """A leaf with some of its axes moved, joined or sliced away.

  Attributes:
    path: the leaf.
    axes: the leaf's axes behind each axis of the value: one as a rule, none for a new axis, several
      for axes that were joined.
    stacks: the leaf's axes that a scan or an index has sliced away.
    times: how often the whole leaf is in the value: the fraction of it that was sliced, times the
      copies that were made, times the steps of the loops around it.
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
    """The view of one slice: the axes that are gone are stacks."""
    kept = self.pick(n for n in range(len(self.axes)) if n not in gone)
    stacks = (*self.stacks, *(axis for n in gone for axis in self.axes[n]))
    return dataclasses.replace(kept, stacks=tuple(dict.fromkeys(stacks)))

  def inserted(self, position: int, axes: tuple[int, ...] = ()) -> "View":
    """With one more axis, a new one or one that was sliced away before."""
    axes = (*self.axes[:position], axes, *self.axes[position:])
    stacks = tuple(n for n in self.stacks if n not in axes[position])
    return dataclasses.replace(self, axes=axes, stacks=stacks)

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
    """A part of it. An axis of which one place is left was indexed, so it may be a stack."""
    one = (n for n, size in enumerate(after) if size == 1 < before[n])
    stacks = dict.fromkeys((*self.stacks, *(axis for n in one for axis in self.axes[n])))
    return dataclasses.replace(self, stacks=tuple(stacks)).repeated(_fraction(after, before))

  def reshaped(self, before: Sequence[int], after: Sequence[int]) -> "View":
    """Axes that are split or joined in one go share what is behind them."""
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
    """All but how often."""
    return self.path, self.axes, self.stacks


@dataclasses.dataclass(frozen=True)
class Value:
  """What is known of a value: the leaves it is a view of, and what it is computed from."""

  views: tuple[View, ...] = ()
  source: Source = Source.PARAMETERS

  def map(self, f: Callable[[View], View]) -> "Value":
    return dataclasses.replace(self, views=tuple(map(f, self.views))) if self.views else self

  def repeated(self, times: Fraction | int) -> "Value":
    return self.map(lambda view: view.repeated(times))


PLAIN = {source: Value((), source) for source in Source}
"""Values that are no view of a leaf."""


def either(values: Iterable[Value]) -> Value:
  """What is one of the values, or all of them in the same places (a sum)."""
  views, source = {}, Source.PARAMETERS
  for value in values:
    source = max(source, value.source)
    for view in value.views:
      views.setdefault(view.arrangement, view)
  return Value(tuple(views.values()), source)


def together(values: Iterable[Value]) -> Value:
  """What holds all of the values, each in a place of its own (a concatenation)."""
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
  """One use of a leaf: by which primitive, the roles of axes, what it met, how many rows, and in
  how many groups its outputs see inputs of their own."""

  primitive: str
  roles: dict[int, str]
  source: Source
  rows: Fraction
  groups: int = 1


class Notes:
  """What was seen of each leaf."""

  def __init__(self):
    self.uses: dict[str, list[Use]] = {}
    self.not_followed: dict[str, list[str]] = {}
    self.joined: dict[str, list[str]] = {}

  def use(
    self, value: Value, primitive: str, inputs, stacks, rows: int, source: Source, groups: int = 1
  ) -> None:
    """Notes a use of the leaves behind a value; a leaf that is not contracted is only joined.

    inputs, stacks: axes of the value.
    rows: how many rows meet the value.
    source: what the other operand is computed from.
    groups: in how many groups the outputs see inputs of their own.
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
