"""The bookkeeping of axes between a matrix and its two factors.

Every axis of a matrix has a role, one letter: `s` stack, `i` input, `o` output. The factor a holds
the stacks, then the inputs, then the rank; the factor b holds the stacks, then the rank, then the
outputs; each in the order that the axes have in the matrix. So whatever is done to an axis of the
matrix is done to one axis of one factor, or, for a stack, to one axis of both.
"""

import string
from collections.abc import Sequence

import jax
from jax import lax

Labels = str  # a letter an axis, as in einsum
RANK = "r"


def labels(count: int) -> Labels:
  """A lower-case letter for each axis of a matrix; `r` stays free for the rank."""
  return string.ascii_lowercase.replace(RANK, "")[:count]


def factor_labels(matrix: Labels, roles: str) -> tuple[Labels, Labels]:
  """The labels of a and of b, given those of the matrix."""
  of = {role: "".join(c for c, x in zip(matrix, roles, strict=True) if x == role) for role in "sio"}
  return of["s"] + of["i"] + RANK, of["s"] + RANK + of["o"]


def factor_axes(roles: str) -> tuple[list[int | None], list[int | None]]:
  """For each axis of a and of b, the matrix's axis that it is; None for the rank."""
  names = labels(len(roles))
  place = {name: n for n, name in enumerate(names)} | {RANK: None}
  a, b = factor_labels(names, roles)
  return [place[c] for c in a], [place[c] for c in b]


def per_factor(roles: str, values: Sequence, rank) -> tuple[list, list]:
  """A value for each axis of a and of b, given one for each axis of the matrix and the rank's."""
  a, b = factor_axes(roles)
  return tuple([rank if n is None else values[n] for n in axes] for axes in (a, b))


def permuted(roles: str, permutation: Sequence[int]) -> tuple[list[int], list[int], str] | None:
  """The permutations of a and b that follow one of the matrix, and the new roles."""
  new_roles = "".join(roles[n] for n in permutation)
  orders = []
  for before, after in zip(factor_axes(roles), factor_axes(new_roles), strict=True):
    orders.append([before.index(None if n is None else permutation[n]) for n in after])
  return *orders, new_roles


def reshaped_roles(roles: str, before: Sequence[int], after: Sequence[int]) -> str | None:
  """The roles after a reshape which splits and joins axes of one role only; None for another.

  An axis of size one that appears counts as a stack.
  """
  kept = [(size, role) for size, role in zip(before, roles, strict=True) if size != 1]
  new_roles = []
  rest = iter(kept)
  size, role, left = 1, "", 1
  for wanted in after:
    if wanted == 1:
      new_roles.append("s")
      continue
    # Axes are joined until they hold the new one, which is then split off.
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
  x: jax.Array, x_labels: Labels, y: jax.Array, y_labels: Labels, out_labels: Labels, **params
) -> jax.Array:
  """`einsum("x_labels,y_labels->out_labels", x, y)` by one dot_general, where every label that
  only one operand has is in the result; lighter to trace and to lower than einsum itself."""
  batch = [c for c in x_labels if c in y_labels and c in out_labels]
  summed = [c for c in x_labels if c in y_labels and c not in out_labels]

  def places(labels: Labels, chosen: Sequence[str]) -> list[int]:
    return [labels.index(c) for c in chosen]

  z = lax.dot_general(
    x, y,
    ((places(x_labels, summed), places(y_labels, summed)),
     (places(x_labels, batch), places(y_labels, batch))),
    **params,
  )  # fmt: skip
  free = [c for c in x_labels if c not in y_labels] + [c for c in y_labels if c not in x_labels]
  return reordered(z, "".join(batch + free), out_labels)


def reordered(x: jax.Array, before: Labels, after: Labels) -> jax.Array:
  """The array with its axes in another order, itself where that is the one it has."""
  return x if before == after else lax.transpose(x, [before.index(c) for c in after])
