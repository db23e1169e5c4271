"""A base and what is learnt beside it.

Every adapter method has a Weight of this kind: a frozen base `w` and named parts, of which some
train. An adapter is the same thing without its base, `w=None`: what is initialised, saved,
combined and stacked. `attach` gives it a base, `detach` takes the base away.

An adapter may be sealed: the parts of it that do not train are then no leaves of it. An optimizer
that is given the adapters sees nothing there, so it cannot move them, by weight decay or otherwise.

A part's axes are those of the base or the rank, so its layout is said in the letters of their
roles: "sir" is [*stack, *inputs, rank]. Fitting, sharding and stacking follow from that alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jax import lax

from lora_jax.weights import base, explicit, promotion
from lora_jax.weights.base import NotFactored, Weight
from lora_jax.weights.factors import part_axes


@dataclasses.dataclass(frozen=True)
class Adapted(Weight):
  """A weight made of a base and named parts; each kind is a subclass.

  A kind sets `LAYOUTS`, `LINEAR` and either `applied` (the arrays and Weights that it is computed
  by: one line for whatever comes down to a low-rank product) or `delta` and the operations.

  Attributes:
    w: the base, an array or another Weight; None in an adapter.
    roles: the role of each axis of w, leading stack axes left out; see `weights.low_rank`.
    frozen: the names of parts that do not train beside those that never do.
    path: the leaf's path, for messages.
    sealed: the names of parts that are no leaves; see `seal`.
    trained_beside: the paths of leaves that train in full beside this one; see `trainable_mask`.
  """

  LAYOUTS: ClassVar[Mapping[str, str]]
  """The roles of the axes of each part, by the part's name."""
  TRAINED: ClassVar[tuple[str, ...]]
  """The parts that train."""
  LINEAR: ClassVar[str]
  """A part in which the change of the base is linear: times two, it is twice the change."""

  w: Any
  roles: str = dataclasses.field(default="io", kw_only=True, metadata={"static": True})
  frozen: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  sealed: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, metadata={"static": True})
  trained_beside: tuple[str, ...] = dataclasses.field(
    default=(), kw_only=True, compare=False, metadata={"static": True}
  )

  # ---- the array that it stands for

  def delta(self) -> jax.Array:
    """What is added to the base, in its axes and in at least float32."""
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
    """The role of every axis of w, leading stack axes included."""
    return self.roles.rjust(self.ndim, "s")

  @property
  def parts(self) -> dict[str, jax.Array]:
    """The parts by name; one that is None is left out."""
    named = {name: getattr(self, name) for name in self.LAYOUTS}
    return {name: part for name, part in named.items() if part is not None}

  # ---- with and without the base

  def attach(self, w, path: str) -> Weight:
    """This adapter on a base.

    Raises:
      ValueError: when the parts are not those of a leaf of w's shape.
    """
    # A derivative by the whole adapter, and an optimizer that follows it, change what trains.
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
    """This weight without its base and its place."""
    return dataclasses.replace(self, w=None, path="", trained_beside=())

  def seal(self) -> Self:
    """This adapter with the parts that do not train among its structure instead of its leaves.

    They are constants of a function that is compiled. In a traced function, and on devices of other
    processes, a part has no value to hold, and the adapter is returned as it is.
    """
    names = self._untrained
    sealable = all(_has_value(getattr(self, name)) for name in names)
    return dataclasses.replace(self, sealed=names) if names and sealable else self

  def unseal(self) -> Self:
    """This adapter with every part among its leaves."""
    return dataclasses.replace(self, sealed=()) if self.sealed else self

  @property
  def apart(self) -> tuple[str, ...]:
    if not self.sealed:
      return ()
    # Not what was exchanged for a traced value since.
    return tuple(name for name in self.sealed if _has_value(getattr(self, name)))

  @property
  def _untrained(self) -> tuple[str, ...]:
    """The parts that do not train."""
    return tuple(name for name in self.parts if name not in self.TRAINED or name in self.frozen)

  def unmerge(self, merged: jax.Array, path: str) -> jax.Array:
    """The base of which `merged` is the merge with this adapter, to rounding."""
    delta = self.attach(merged, path).delta()
    return (merged.astype(delta.dtype) - delta).astype(merged.dtype)

  def fits(self) -> bool:
    """Whether every part has the shape that the base and one rank give it."""
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

  def rescaled(self, c) -> Self:
    """This weight with the change of the base multiplied by a number, which may be traced."""
    part = promotion.multiplied(getattr(self, self.LINEAR), c)
    return dataclasses.replace(self, **{self.LINEAR: part})

  def as_low_rank(self) -> "Adapted":
    """The plain LoRA adapter, a LowRank without a base, that changes any base as this one does.

    Raises:
      NotFactored: when there is none, or none that does without the base.
    """
    raise NotFactored(f"{type(self).__name__} has no low-rank form of its own")

  @property
  def drops(self) -> bool:
    """Whether a training step drops some of its inputs: whether `with_dropout` is needed."""
    return False

  def with_dropout(self, key: jax.Array) -> Self:
    """This weight as a training step uses it; itself, for a kind that drops nothing."""
    return self

  # ---- what trains, and where it lives

  def trainable(self):
    mask = jax.tree.map(lambda _: False, self)
    leaves = self.parts.keys() - set(self.apart)
    trained = {name: name not in self.frozen for name in self.TRAINED if name in leaves}
    return dataclasses.replace(mask, **trained)

  def partition_specs(self, spec):
    """Each axis of a part is sharded as the axis of w that it is; the rank is not."""
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
  return getattr(part, "is_fully_addressable", True) and not jax.dtypes.issubdtype(
    part.dtype, jax.dtypes.extended
  )
