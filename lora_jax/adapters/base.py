"""The base class of the adapter methods' specs."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.weights import Adapted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A spec: a method and its settings, which `match` assigns to leaves."""

  NEEDS_ROLES: ClassVar[bool] = True
  """True if the method needs to know inputs, outputs and stacks; otherwise `init` gets no roles."""

  STARTED_BY: ClassVar[str] = ""
  """The function that makes the adapters, if they start from more than the base; `lora_jax.init`
  then refuses the spec."""

  def settle(self, name: str, check: Callable, **options: Any) -> None:
    """Checks one setting in `__post_init__` by a function of `lora_jax.checks`; None passes if it
    is the setting's default."""
    value = getattr(self, name)
    if value is None and getattr(type(self), name, value) is None and hasattr(type(self), name):
      return
    checked = check(f"{type(self).__name__}: {name}", value, **options)
    object.__setattr__(self, name, checked)

  def init(self, key: jax.Array, path: str, w: Any, roles: str) -> Adapted:
    """Returns a fresh adapter for one leaf.

    Args:
      key: a random key for this leaf.
      path: the leaf's path, for errors.
      w: the leaf; most methods read only its shape.
      roles: the role of each of its axes, as in `lora_jax.weights.low_rank`.

    Raises:
      ValueError: if the method is not defined for such a leaf, or its settings do not fit it.
    """
    raise NotImplementedError

  def unfit(self, leaf: Any) -> str | None:
    """The reason why a leaf of any axes cannot be adapted by this method, or None."""
    if not hasattr(leaf, "shape"):
      return f"it is {leaf!r} and not an array"
    if len(leaf.shape) < 2:
      return f"its shape {tuple(leaf.shape)} has fewer than two axes"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return f"its dtype {leaf.dtype} is not a float"
    return None


def sizes(shape: tuple[int, ...], roles: str) -> tuple[tuple[int, ...], ...]:
  """The sizes of the stack, input and output axes."""
  return tuple(
    tuple(size for size, x in zip(shape, roles, strict=True) if x == role) for role in "sio"
  )
