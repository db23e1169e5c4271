"""What an adapter method's spec is."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.weights import Adapted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A spec: the method and its settings, which `match` gives to leaves."""

  NEEDS_ROLES: ClassVar[bool] = True
  """Whether it asks which axes are inputs, outputs and stacks; else `init` gets no roles."""

  def settle(self, name: str, check: Callable, **options: Any) -> None:
    """Checks one setting, for `__post_init__`, by a function of `lora_jax.checks`; None is kept
    where it is the setting's default."""
    value = getattr(self, name)
    if value is None and getattr(type(self), name, value) is None and hasattr(type(self), name):
      return
    checked = check(f"{type(self).__name__}: {name}", value, **options)
    object.__setattr__(self, name, checked)

  def init(self, key: jax.Array, path: str, w: Any, roles: str) -> Adapted:
    """The adapter of one leaf at its start.

    Args:
      key: a random key of this leaf's own.
      path: the leaf's path, for errors.
      w: the leaf, of which most methods read the shape alone.
      roles: the role of each of its axes, as in `lora_jax.weights.low_rank`.

    Raises:
      ValueError: when the method is not defined for such a leaf, or its settings do not fit it.
    """
    raise NotImplementedError

  def unfit(self, leaf: Any) -> str | None:
    """Why a leaf cannot be adapted by this method whatever its axes are, or None."""
    if not hasattr(leaf, "shape"):
      return f"it is no array but {leaf!r}"
    if len(leaf.shape) < 2:
      return f"its shape {tuple(leaf.shape)} has fewer than two axes"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return f"its dtype {leaf.dtype} is not a float"
    return None


def sizes(shape: tuple[int, ...], roles: str) -> tuple[tuple[int, ...], ...]:
  """The sizes of the stacked, the input and the output axes."""
  return tuple(
    tuple(size for size, x in zip(shape, roles, strict=True) if x == role) for role in "sio"
  )
