"""A base and the parts that are learned alongside it.

Every adapter method has a Weight of this kind: a frozen base `w` and named parts, some of which
train. An adapter is the same object without its base, `w=None`. Adapters are what is initialized,
saved, combined and stacked. `attach` adds the base, `detach` removes it.

An adapter may be sealed: the parts that do not train are then not among its leaves. An optimizer
that is given sealed adapters does not see these parts, so weight decay cannot move them.

Each axis of a part is an axis of the base or the rank. A layout gives the roles of these axes in
letters: "sir" is [*stack, *inputs, rank]. Shape checks, sharding and stacking follow from it.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.base import NotFactored, Weight
from lora_jax.weights.factor_axes import part_axes

if TYPE_CHECKING:
  from lora_jax.weights.low_rank import LowRank


@dataclasses.dataclass(frozen=True)
class Adapted(Weight):
  """A weight made of a base and named parts; each kind is a subclass.

  A kind sets `LAYOUTS`, `TRAINED` and `LINEAR`. It then defines either `applied`, which returns
  the Weight that computes it (one line for any low-rank product), or `delta` and the operations.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    roles: the role of each axis of w, without leading stack axes; see `weights.low_rank`.
    frozen: the names of parts that do not train, in addition to those that never do.
    path: the leaf's path, for messages.
    sealed: the names of parts that are not leaves; see `seal`.
    trained_beside: the paths of leaves that train in full with this one; see `trainable_mask`.
  """

  LAYOUTS: ClassVar[Mapping[str, str]]
  """The roles of the axes of each part, by the part's name."""
  TRAINED: ClassVar[tuple[str, ...]]
  """The parts that train."""
  LINEAR: ClassVar[str]
  """A part in which the change of the base is linear: doubling it doubles the change."""

  w: Any
  roles: str = dataclasses.field(default="io", kw_only=True, metadata={"static": True})
  frozen: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  sealed: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, metadata={"static": True})
  trained_beside: tuple[str, ...] = dataclasses.field(
    default=(), kw_only=True, compare=False, metadata={"static": True}
  )

  # ---- the array that it represents

  def delta(self) -> jax.Array:
    """The change that is added to the base, in the base's axes and in at least float32."""
    return self.applied().delta()

  def materialize(self):
    delta = self.delta()
    return (base.materialize(self.w).astype(delta.dtype) + delta).astype(self.dtype)

  @property
  def shape(self):
    return tuple(self.w.shape)

  @property
  def dtype(self):
    return self.w.dtype

  @property
  def aval(self):
    return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.explicit_sharding)

  @property
  def explicit_sharding(self):
    return explicit.sharding_of(self.w)

  @property
  def is_stacked(self):
    return self.ndim > len(self.roles)

  @property
  def all_roles(self) -> str:
    """The role of every axis of w, including leading stack axes."""
    return self.roles.rjust(self.ndim, "s")

  @property
  def parts(self) -> dict[str, jax.Array]:
    """The parts by name, without those that are None."""
    named = {name: getattr(self, name) for name in self.LAYOUTS}
    return {name: part for name, part in named.items() if part is not None}

  # ---- attaching and detaching the base

  def attach(self, w: Any, path: str) -> Self:
    """Returns this adapter on a base.

    Raises:
      ValueError: if the shapes of the parts do not fit a leaf of w's shape.
    """
    # `jax.grad` by the whole adapter, or an optimizer step on it, changes the trained parts.
    fixed = {
      name: lax.stop_gradient(part)
      for name, part in self.parts.items()
      if name in self._untrained and isinstance(part, jax.core.Tracer)
    }
    weight = dataclasses.replace(self, w=w, path=path, sealed=(), **fixed)
    if not weight.fits():
      shapes = " and ".join(str(part.shape) for part in self.parts.values())
      reason = "it was made for another model"
      if self.apart:
        reason += (
          f", or it was sliced or stacked without {' and '.join(self.apart)}, which is sealed "
          "(lora_jax.unseal the adapters first)"
        )
      raise ValueError(
        f"{path}: the adapter's factors {shapes}, for a leaf of the roles {self.roles!r}, do not "
        f"fit {tuple(w.shape)}; {reason}"
      )
    return weight

  def detach(self) -> Self:
    """Returns the adapter: this weight without its base and path."""
    return dataclasses.replace(self, w=None, path="", trained_beside=())

  def seal(self) -> Self:
    """Returns this adapter with its untrained parts in the tree structure instead of the leaves.

    In a compiled function they are constants. A traced value, or an array on devices of other
    processes, cannot be part of the structure; the adapter is then returned unchanged.
    """
    names = self._untrained
    sealable = all(_has_value(getattr(self, name)) for name in names)
    return dataclasses.replace(self, sealed=names) if names and sealable else self

  def unseal(self) -> Self:
    """Returns this adapter with every part among its leaves."""
    return dataclasses.replace(self, sealed=()) if self.sealed else self

  @property
  def apart(self) -> tuple[str, ...]:
    if not self.sealed:
      return ()
    # A part that has since been replaced by a traced value is a leaf.
    return tuple(name for name in self.sealed if _has_value(getattr(self, name)))

  @property
  def _untrained(self) -> tuple[str, ...]:
    """The parts that do not train."""
    return tuple(name for name in self.parts if name not in self.TRAINED or name in self.frozen)

  def unmerge(self, merged: jax.Array, path: str) -> jax.Array:
    """The base whose merge with this adapter is `merged`, up to rounding."""
    delta = self.attach(merged, path).delta()
    return (merged.astype(delta.dtype) - delta).astype(merged.dtype)

  def fits(self) -> bool:
    """True if every part has the shape that follows from the base and a single rank."""
    if self.ndim < len(self.roles):
      return False
    ranks = set()
    for name, part in self.parts.items():
      axes = self._axes(name)
      if len(axes) != part.ndim:
        return False
      for n, size in zip(axes, part.shape, strict=True):
        if n is None:
          ranks.add(size)
        elif size != self.shape[n]:
          return False
    return len(ranks) <= 1

  def rescaled(self, c: jax.Array | float) -> "Adapted":
    """Returns this weight with its change of the base times c, which may be traced."""
    part = promotion.multiplied(getattr(self, self.LINEAR), c)
    return dataclasses.replace(self, **{self.LINEAR: part})

  def as_low_rank(self) -> "LowRank":
    """Returns the plain LoRA adapter, a LowRank without a base, that makes the same change.

    Raises:
      NotFactored: if there is none, or if it depends on the base.
    """
    raise NotFactored(f"{type(self).__name__} has no low-rank form of its own")

  @property
  def drops(self) -> bool:
    """True if a training step drops some of its inputs, so that `with_dropout` is needed."""
    return False

  def with_dropout(self, key: jax.Array) -> Self:
    """Returns this weight as a training step uses it; unchanged if the kind drops nothing."""
    return self

  # ---- training and sharding

  def trainable(self):
    mask = jax.tree.map(lambda _: False, self)
    leaves = self.parts.keys() - set(self.apart)
    trained = {name: name not in self.frozen for name in self.TRAINED if name in leaves}
    return dataclasses.replace(mask, **trained)

  def partition_specs(self, spec):
    """Each axis of a part is sharded like the axis of w that it is; the rank is not sharded."""
    names = (*spec, *[None] * (self.ndim - len(spec)))
    parts = {
      name: jax.P(*(None if n is None else names[n] for n in self._axes(name)))
      for name in self.parts
    }
    w = self.w.partition_specs(spec) if base.is_weight(self.w) else spec
    return dataclasses.replace(self, w=w, **parts)

  def _axes(self, name: str) -> list[int | None]:
    return part_axes(self.all_roles, self.LAYOUTS[name])


def _has_value(part: Any) -> bool:
  if isinstance(part, jax.core.Tracer) or not isinstance(part, jax.Array | np.ndarray):
    return False
  return getattr(part, "is_fully_addressable", True) and not jnp.issubdtype(
    part.dtype, jax.dtypes.extended
  )
