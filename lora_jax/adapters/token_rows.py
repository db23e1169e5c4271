"""TokenRows: trains chosen rows of an embedding, such as those of new tokens.

    before    {"embed": {"embedding": W}}
    after     {"embed": {"embedding": TokenRows(w=W, dw=0, ids=(49152, 49153))}}

    match(params, [("embed/embedding", TokenRows(ids=(49152, 49153)))])
    match(params, [("head/kernel", TokenRows(ids=(49152, 49153), axis=1))])

`W[ids[n]]` becomes `W[ids[n]] + dw[n]`, with dw = 0 at the start. A head that is tied to the
embedding uses the same rows. Neither the look-up nor the logits materialize an array of the size of
vocabulary times width. The trained values are those of PEFT's `trainable_token_indices`, which
stores the rows themselves (`rows` of the attached weight).

Defined for leaves with one axis of tokens that are looked up or used in products; not for stacks of
them, nor for convolutions.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from lora_jax import checks, weights
from lora_jax.adapters.base import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows(Method):
  """The spec of an embedding in which some rows train.

  Attributes:
    ids: the tokens whose rows train, without duplicates.
    axis: the axis of the tokens: 0 in an embedding, 1 in the kernel of a head.
  """

  ids: tuple[int, ...]
  axis: int = 0

  def __post_init__(self):
    self.settle("ids", _tokens)
    self.settle("axis", checks.whole)
    if not self.ids or len(set(self.ids)) != len(self.ids) or min(self.ids) < 0:
      raise ValueError(
        f"TokenRows: ids {self.ids} must be one or more tokens, each once, none below 0"
      )

  def init(self, key, path, w, roles):
    """As in `Method`; raises if there is no such axis of tokens, or no such token."""
    shape = tuple(w.shape)
    if not 0 <= self.axis < len(shape) or roles.count(roles[self.axis]) != 1 or "s" in roles:
      raise ValueError(
        f"{path}: axis {self.axis} of {shape}, with the roles {roles!r}, does not count the tokens "
        "of one embedding; TokenRows takes an axis that is the only one of its role, and no stacks"
      )
    if max(self.ids) >= shape[self.axis]:
      raise ValueError(
        f"{path}: token {max(self.ids)} is not among the {shape[self.axis]} of {shape}; "
        "make the embedding larger first"
      )
    rest = shape[: self.axis] + shape[self.axis + 1 :]
    return weights.TokenRows(
      w=None,
      dw=jnp.zeros((len(self.ids), *rest), jnp.float32),
      ids=self.ids,
      roles="".join("i" if n == self.axis else "o" for n in range(len(shape))),
    )


def _tokens(name: str, value: Any) -> tuple[int, ...]:
  """Token ids from a sequence or an array of whole numbers."""
  if isinstance(value, str | bytes) or not isinstance(value, Iterable):
    raise TypeError(f"{name} {value!r} is not a sequence of token ids")
  return tuple(checks.whole(f"{name}: the token", token) for token in value)
