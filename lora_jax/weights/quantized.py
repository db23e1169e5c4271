"""Quantized: an array in 4 or 8 bits a value, with a scale for each block or each row.

    before    {"query": {"kernel": W}}                                     16 or 32 bits a value
    after     {"query": {"kernel": Quantized(codes, scale, levels="nf4")}}   4.2 bits a value

A value is dequantized as `levels[code] * scale` and quantized to the nearest level. As the base `w`
of a LowRank it makes QLoRA:

    LowRank(w=Quantized(...), a, b)

Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E, for NF4 and for
double quantization. The paper quantizes the scales to 8-bit floats, in blocks of 256 over all rows.
Here they are 8-bit steps between the minimum and the maximum of a row, so that rows stay separate.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks
from lora_jax.weights import explicit, promotion
from lora_jax.weights.coded import Coded, rows_of
from lora_jax.weights.factor_axes import labels
from lora_jax.weights.products import dot_labels
from lora_jax.weights.pytree import register
from lora_jax.weights.scaled import times

# Quantiles of the normal distribution: eight up to zero and eight above, the largest of which is 1.
_NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip

_PACKED = {"nf4": np.array(_NF4, np.float32), "int4": np.arange(-8, 8, dtype=np.float32)}
"""The values of the 4-bit levels; two quantized values share a byte."""

_WHOLE = {"int8": jnp.int8, "uint8": jnp.uint8, "fp8": jnp.float8_e4m3fn}
"""Levels that are the values of a dtype."""

_LARGEST = {"nf4": 1.0, "int4": 7.5, "int8": 127.5, "uint8": 255.0, "fp8": 448.0}
"""The value that a block's maximum is scaled to; for integers, all that rounds to the last one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """A format to quantize an array to.

  Attributes:
    levels: "nf4", "int4", "int8" or "fp8" (e4m3).
    block: the number of values along the inputs that share a scale; None: all that make one output.
    double: True to quantize the scales of a row too, to 8 bits each.
  """

  levels: str
  block: int | None = None
  double: bool = False

  def __post_init__(self):
    known = [name for name in _LARGEST if name != "uint8"]
    if self.levels not in known:
      raise ValueError(f"Format: levels {self.levels!r} are unknown; use {', '.join(known)}")
    if self.block is not None:
      object.__setattr__(self, "block", checks.whole("Format: block", self.block))
      if self.block < 2 or self.block % 2:
        raise ValueError(f"Format: block {self.block} is not an even number above 0")
    if checks.flag("Format: double", self.double) and self.block is None:
      raise ValueError("Format: double quantizes the scales of blocks; set block as well")

  def unfit(self, leaf: Any) -> str | None:
    """The reason why a leaf cannot be quantized, or None; `lora_jax.match` asks for it."""
    if not hasattr(leaf, "shape") or len(leaf.shape) < 2:
      return "it has fewer than two axes"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return f"its dtype {leaf.dtype} is not a float"
    if isinstance(leaf, Coded):
      return f"it is quantized already, a {type(leaf).__name__}"
    return None


NF4 = Format(levels="nf4", block=64, double=True)
INT8 = Format(levels="int8")
INT4 = Format(levels="int4", block=32)
FP8 = Format(levels="fp8")


@register
@dataclasses.dataclass(frozen=True)
class Quantized(Coded):
  """`levels[codes] * scale + offset`.

  Attributes:
    codes: the quantized values. uint8 [*rows, columns / 2] for levels of four bits, with the even
      column in the lower bits; else int8, uint8 or float8 [*rows, columns]. The columns are padded
      to whole blocks.
    scale: [*rows, blocks], an array or a Quantized.
    offset: [*rows, blocks], or None for zero.
    levels: as in `Format`; "uint8" for the scales of a Quantized.
    columns, sizes, to, path: as in `Coded`.
  """

  codes: jax.Array
  scale: Any
  offset: jax.Array | None = None
  levels: str = dataclasses.field(kw_only=True, metadata={"static": True})

  def decode(self):
    numbers = _blocks(self._leveled(jnp.float32), self.scale.shape[-1])
    numbers = numbers * as_array(self.scale)[..., None]
    if self.offset is not None:
      numbers = numbers + self.offset[..., None]
    return _joined(numbers)

  def dot_general(
    self, other, dimension_numbers, *, weight_is_lhs, preferred_element_type=None, **params
  ):
    """With one scale a row, and rows among the outputs, the scale multiplies the product."""
    names = labels(self.ndim)
    _, out_labels = dot_labels(other.ndim, self.ndim, dimension_numbers, weight_is_lhs)
    rows = "".join(names[n] for n in self._row_axes)
    if self.scale.shape[-1] > 1 or self.offset is not None or not set(rows) <= set(out_labels):
      return super().dot_general(
        other,
        dimension_numbers,
        weight_is_lhs=weight_is_lhs,
        preferred_element_type=preferred_element_type,
        **params,
      )
    # The unscaled product may overflow float16 where the scaled one does not.
    asked, dtype = promotion.of_base(preferred_element_type, other.dtype, self.dtype)
    sharding = self.explicit_sharding

    def leveled(self):
      wide = dataclasses.replace(self, to=promotion.joint(self.to).name)
      return wide.arranged(wide._leveled(wide.to))

    def scaled(y, scale):
      return times(y, out_labels, as_array(scale)[..., 0], rows)

    def product(self, other):
      w = explicit.laid_out(leveled, sharding)(self)
      operands = (w, other) if weight_is_lhs else (other, w)
      y = jax.lax.dot_general(*operands, dimension_numbers, preferred_element_type=asked, **params)
      y = explicit.laid_out(scaled, explicit.sharding_of(y))(y, self.scale)
      return y.astype(dtype or y.dtype)

    return self.used(product, other)

  def _leveled(self, dtype) -> jax.Array:
    """The levels of the quantized values, [*rows, columns]."""
    if self.levels in _WHOLE:
      return self.codes.astype(dtype)
    nibbles = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
    levels = jnp.asarray(_PACKED[self.levels], dtype)
    return levels[_joined(nibbles)]


# ---- quantization


def quantized(w: jax.Array, format: Format, columns: tuple[int, ...]) -> Quantized:
  """Quantizes an array to a format; the result keeps the array's dtype.

  Args:
    w: any float array.
    format: the format to quantize to.
    columns: the axes that blocks are cut from, counted from the end of the shape, ascending.
  """
  numbers = rows_of(w, columns).astype(jnp.float32)
  scale = scales(numbers, format)
  return coded(numbers, scale, format, like=w, columns=columns)


def scales(numbers: jax.Array, format: Format) -> Any:
  """The scales [*rows, blocks] of values [*rows, columns], from the maximum of each block."""
  blocks = _blocks(_filled(numbers, format), _count(numbers, format))
  scale = jnp.abs(blocks).max(axis=-1, initial=0) / _LARGEST[format.levels]
  return quantized_scales(jnp.where(scale == 0, 1, scale), format)


def quantized_scales(scale: jax.Array, format: Format) -> Any:
  """The scales [*rows, blocks] in the format's own precision."""
  if not format.double:
    return scale
  offset = scale.min(axis=-1, keepdims=True)
  step = (scale.max(axis=-1, keepdims=True) - offset) / _LARGEST["uint8"]
  codes = jnp.round((scale - offset) / jnp.where(step == 0, 1, step)).astype(jnp.uint8)
  return Quantized(
    codes, step, offset, levels="uint8", columns=(-1,), sizes=scale.shape[-1:], to="float32"
  )


def coded(
  numbers: jax.Array, scale: Any, format: Format, *, like: jax.Array, columns: tuple[int, ...]
) -> Quantized:
  """Quantizes values [*rows, columns] to the nearest levels, given the scales.

  Args:
    numbers: the values, float32.
    scale: [*rows, blocks], as `scales` returns them.
    format: the format to quantize to.
    like: an array with the shape and dtype of the result.
    columns: as in `quantized`.
  """
  dense = as_array(scale)
  blocks = _blocks(_filled(numbers, format), dense.shape[-1])
  codes = _joined(nearest(blocks / dense[..., None], format.levels))
  if format.levels in _PACKED:
    codes = codes[..., ::2] | codes[..., 1::2] << 4
  return Quantized(
    codes,
    scale,
    levels=format.levels,
    columns=tuple(columns),
    sizes=tuple(like.shape[n] for n in columns),
    to=jnp.dtype(like.dtype).name,
  )


def as_array(scale: Any) -> jax.Array:
  """The scales as an array, dequantized if they are quantized themselves."""
  return scale.materialize() if isinstance(scale, Quantized) else scale


def nearest(x: jax.Array, levels: str) -> jax.Array:
  """Quantizes values, already divided by their scale, to the nearest levels; not packed."""
  if levels == "fp8":
    return x.clip(-_LARGEST["fp8"], _LARGEST["fp8"]).astype(jnp.float8_e4m3fn)
  if levels == "int8":
    return jnp.round(x).clip(-128, 127).astype(jnp.int8)
  table = _PACKED[levels]
  return jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), x).astype(jnp.uint8)


def level(codes: jax.Array, levels: str) -> jax.Array:
  """The float32 levels of quantized values as `nearest` returns them."""
  if levels in _WHOLE:
    return codes.astype(jnp.float32)
  return jnp.asarray(_PACKED[levels])[codes]


def _count(numbers: jax.Array, format: Format) -> int:
  """The number of blocks of a row."""
  return 1 if format.block is None else max(1, -(-numbers.shape[-1] // format.block))


def _filled(numbers: jax.Array, format: Format) -> jax.Array:
  """Pads each row with zeros to whole blocks and whole bytes."""
  unit = format.block or (2 if format.levels in _PACKED else 1)
  return jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % unit)])


def _blocks(numbers: jax.Array, count: int) -> jax.Array:
  """Splits rows into [*rows, blocks, values of a block]."""
  *rows, columns = numbers.shape
  return numbers.reshape(*rows, count, columns // count)


def _joined(x: jax.Array) -> jax.Array:
  """Joins the last two axes."""
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
