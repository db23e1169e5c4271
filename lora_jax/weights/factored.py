"""Factored: `a @ b` without a base, a kernel of rank r that costs r (d + k) per use.

    before    {"query": {"kernel": W}}                d k parameters
    after     {"query": {"kernel": Factored(a, b)}}   r (d + k) parameters, W ≈ a b

The factors have the axes of a LowRank's, and a Factored is applied as a LowRank with an empty base.
It may itself be the base of an adapter, which restores accuracy. Its factors may be Weights, such
as quantized ones, which are dequantized where they are used.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.weights import explicit, promotion
from lora_jax.weights.base import NotFactored, Weight, check_zero, is_weight, materialize
from lora_jax.weights.factor_axes import A, B, part_axes
from lora_jax.weights.low_rank import LowRank
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class Factored(Weight):
  """`a @ b`, an array of a's dtype.

  Attributes:
    a: [*stack, *inputs, rank], an array or a Weight.
    b: [*stack, rank, *outputs], of a's dtype.
    roles: the role of each axis of the array, without leading stack axes; see `weights.low_rank`.
    path: the leaf's path, for messages.
  """

  LAYOUTS: ClassVar = {"a": A, "b": B}

  a: Any
  b: Any
  roles: str = dataclasses.field(default="io", kw_only=True, metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  def applied(self) -> "_Product":
    a, b = materialize((self.a, self.b))
    return _Product(_Nothing(self.dtype), a, b, roles=self.roles, path=self.path)

  def materialize(self):
    return self.applied().materialize()

  @property
  def explicit_sharding(self):
    return _sharding(self.a, self.b, self.all_roles)

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  @property
  def shape(self):
    return _shape(self.a.shape, self.b.shape, self.all_roles)

  @property
  def ndim(self):
    return len(self.a.shape) - 1 + self.roles.count("o")

  @property
  def dtype(self):
    return self.a.dtype

  @property
  def is_stacked(self):
    return self.ndim > len(self.roles)

  @property
  def all_roles(self) -> str:
    """The role of every axis of the array, including leading stack axes."""
    return self.roles.rjust(self.ndim, "s")

  def partition_specs(self, spec):
    """Each axis of a factor is sharded like the array's axis that it is; the rank is unsharded."""
    names = (*spec, *[None] * (self.ndim - len(spec)))
    specs = {}
    for name, layout in self.LAYOUTS.items():
      axes = part_axes(self.all_roles, layout)
      own, part = jax.P(*(None if n is None else names[n] for n in axes)), getattr(self, name)
      specs[name] = part.partition_specs(own) if is_weight(part) else own
    return dataclasses.replace(self, **specs)


@register
@dataclasses.dataclass(frozen=True)
class _Nothing(Weight):
  """The base of a product without a base: zero under every operation on its axes."""

  of_dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(default="", kw_only=True, compare=False, metadata={"static": True})

  @property
  def dtype(self):
    return self.of_dtype

  def materialize(self):
    return jnp.zeros((), self.dtype)

  def dot_general(self, other, dimension_numbers, *, preferred_element_type=None, **_):
    return self._zero(other, preferred_element_type)

  def conv_general_dilated(self, x, *, preferred_element_type=None, **_):
    return self._zero(x, preferred_element_type)

  def ragged_dot_general(self, lhs, group_sizes, *, preferred_element_type=None, **_):
    return self._zero(lhs, preferred_element_type)

  def _zero(self, other, wanted):
    return jnp.zeros((), wanted or promotion.joint(other.dtype, self.dtype))

  def astype(self, dtype):
    return _Nothing(dtype)

  def transpose(self, permutation):
    return self

  def reshape(self, new_sizes, **_):
    return self

  def squeeze(self, dimensions):
    return self

  def broadcast_in_dim(self, shape, broadcast_dimensions, **_):
    return self

  def partition_specs(self, spec):
    return self

  def slice(self, start_indices, limit_indices, strides):
    return self

  def dynamic_slice(self, start_indices, slice_sizes):
    return self

  def rev(self, dimensions):
    return self

  def pad(self, value, config):
    check_zero(value)
    return self

  def gather(self, indices, **_):
    return self

  def scaled(self, c):
    return self

  def times(self, x, axes):
    return self


@register
@dataclasses.dataclass(frozen=True)
class _Product(LowRank):
  """A LowRank without a base; its shape follows from its factors."""

  @property
  def shape(self):
    return _shape(self.a.shape, self.b.shape, self.all_roles)

  @property
  def ndim(self):
    return self.a.ndim - 1 + self.roles.count("o")

  @property
  def explicit_sharding(self):
    return _sharding(self.a, self.b, self.all_roles)

  def _result_sharding(self, x, y, use):
    del y  # the base's result is always the scalar zero
    return explicit.of_result(use, self, x)

  def gather(self, indices, *, dimension_numbers, mode, fill_value=None, **params):
    d = dimension_numbers
    rows = super().gather(indices, dimension_numbers=d, mode=mode, fill_value=fill_value, **params)
    if lax.GatherScatterMode.from_any(mode) != lax.GatherScatterMode.FILL_OR_DROP:
      return rows
    if is_weight(rows):
      raise NotFactored("a gather of layers of a stack has a fill value for indices out of bounds")
    (axis,) = d.collapsed_slice_dims
    size = self.shape[axis]
    fill = jnp.asarray(jnp.nan if fill_value is None else fill_value, rows.dtype)

    def filled(rows, indices):
      found = (indices[..., 0] >= 0) & (indices[..., 0] < size)
      return jnp.where(jnp.expand_dims(found, d.offset_dims), rows, fill)

    return explicit.laid_out(filled, explicit.sharding_of(rows))(rows, indices)


def _shape(a: tuple[int, ...], b: tuple[int, ...], roles: str) -> tuple[int, ...]:
  """The shape of the product of factors of these shapes."""
  sizes = dict(zip((*part_axes(roles, A), *part_axes(roles, B)), (*a, *b), strict=True))
  return tuple(sizes[n] for n in range(len(roles)))


def _sharding(a, b, roles: str) -> NamedSharding | None:
  """The sharding of the product of factors: every axis is sharded as in its factor."""
  shardings = [explicit.sharding_of(factor) for factor in (a, b)]
  known = [sharding for sharding in shardings if sharding is not None]
  if not known:
    return None
  axes: dict[int, Any] = dict.fromkeys(range(len(roles)))
  for layout, factor, sharding in zip((A, B), (a, b), shardings, strict=True):
    names = explicit.mesh_axes(sharding, len(factor.shape))
    for n, name in zip(part_axes(roles, layout), names, strict=True):
      if n is not None and name not in axes.values():  # a mesh axis shards only one axis
        axes[n] = name
  return explicit.with_axes(known[0], tuple(axes.values()))
