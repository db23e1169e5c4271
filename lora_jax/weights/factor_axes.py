"""The bookkeeping of axes between a matrix and its two factors.

Every axis of a matrix has a role, one letter: `s` stack, `i` input, `o` output. Factor a has the
stacks, the inputs and the rank as its axes; factor b the stacks, the rank and the outputs. The axes
of a role keep the matrix's order. An operation on an axis of the matrix is thus an operation on one
axis of one factor or, for a stack, on one axis of both.
"""

import string
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

Labels = str  # one letter per axis, as in einsum
RANK = "r"
A, B = "sir", "sro"  # the layouts of the two factors
_EMPTY = 2**127 - 1  # a prime


def labels(count: int) -> Labels:
  """A lower-case letter for each axis of a matrix; `r` is reserved for the rank."""
  return string.ascii_lowercase.replace(RANK, "")[:count]


def factor_labels(matrix: Labels, roles: str) -> tuple[Labels, Labels]:
  """The labels of a and of b, given those of the matrix."""
  return part_labels(matrix, roles, A), part_labels(matrix, roles, B)


def part_labels(matrix: Labels, roles: str, layout: str) -> Labels:
  """The labels of a part, given those of the matrix; `layout` gives the part's roles in order.

  >>> part_labels("abcd", "sioo", "sro")
  'arcd'
  """
  pairs = list(zip(matrix, roles, strict=True))
  return "".join(
    RANK if wanted == RANK else "".join(c for c, role in pairs if role == wanted)
    for wanted in layout
  )


def part_axes(roles: str, layout: str) -> list[int | None]:
  """The matrix's axis for each axis of a part; None for the rank."""
  names = labels(len(roles))
  place = {name: n for n, name in enumerate(names)} | {RANK: None}
  return [place[c] for c in part_labels(names, roles, layout)]


def part_sizes(shape: Sequence[int], roles: str, layout: str, rank: int) -> tuple[int, ...]:
  """The shape of a part of a matrix of this shape."""
  return tuple(rank if n is None else shape[n] for n in part_axes(roles, layout))


def permuted_part(roles: str, permutation: Sequence[int], new_roles: str, layout: str) -> list[int]:
  """The permutation of a part that matches a permutation of the matrix."""
  before, after = part_axes(roles, layout), part_axes(new_roles, layout)
  return [before.index(None if n is None else permutation[n]) for n in after]


def reshaped_roles(roles: str, before: Sequence[int], after: Sequence[int]) -> str | None:
  """The roles after a reshape; None if it splits or joins axes of different roles.

  A new axis of size one counts as a stack.
  """
  if 0 not in before:
    return _split_and_joined(roles, before, after)
    # First treat zero as a size that no other axis has.
  sizes = ([size or _EMPTY for size in each] for each in (before, after))
  return _split_and_joined(roles, *sizes) or _around_zero(roles, before, after)


def _around_zero(roles: str, before: Sequence[int], after: Sequence[int]) -> str | None:
  """The roles after a reshape of an empty array, in which the axes around the zero may change.

  Axes of one role may become any others there, since there are no values to move.
  """
  start = 0
  while start < len(before) and start < len(after) and before[start] == after[start] != 0:
    start += 1
  end = 0
  while before[-1 - end] == after[-1 - end] != 0:
    end += 1
  last = len(before) - end
  if len(set(roles[start:last])) > 1:
    return None
  return roles[:start] + roles[start] * (len(after) - start - end) + roles[last:]


def _split_and_joined(roles: str, before: Sequence[int], after: Sequence[int]) -> str | None:
  kept = [(size, role) for size, role in zip(before, roles, strict=True) if size != 1]
  new_roles = []
  rest = iter(kept)
  size, role, left = 1, "", 1
  for wanted in after:
    if wanted == 1:
      new_roles.append("s")
      continue
    # Axes are joined until they contain the new one, which is then split off.
    while left < wanted:
      size, next_role = next(rest, (0, ""))
      if not size or (left > 1 and next_role != role):
        return None
      left, role = left * size, next_role
    if left % wanted:
      return None
    left //= wanted
    new_roles.append(role)
  return "".join(new_roles)


def contract(
  x: jax.Array, x_labels: Labels, y: jax.Array, y_labels: Labels, out_labels: Labels, **params: Any
) -> jax.Array:
  """`einsum("x_labels,y_labels->out_labels", x, y)` as one dot_general, cheaper to trace than
  einsum. Every label that only one operand has must be in the result."""
  batch = [c for c in x_labels if c in y_labels and c in out_labels]
  summed = [c for c in x_labels if c in y_labels and c not in out_labels]

  def places(labels: Labels, chosen: Sequence[str]) -> list[int]:
    return [labels.index(c) for c in chosen]

  z = lax.dot_general(
    x,
    y,
    (
      (places(x_labels, summed), places(y_labels, summed)),
      (places(x_labels, batch), places(y_labels, batch)),
    ),
    **params,
  )
  free = [c for c in x_labels if c not in y_labels] + [c for c in y_labels if c not in x_labels]
  return reordered(z, "".join(batch + free), out_labels)


def reordered(x: jax.Array, before: Labels, after: Labels) -> jax.Array:
  """The array with its axes in another order; the array itself if the order is the same."""
  return x if before == after else lax.transpose(x, [before.index(c) for c in after])
