"""GGUFBlocks: the quantized blocks of a GGUF file, unchanged, dequantized where they are used.

    before    {"query": {"kernel": W}}                                dequantized at loading
    after     {"query": {"kernel": GGUFBlocks(blocks, kind="Q4_1")}}  the bytes of the file

The values equal those of `gguf.quants.dequantize` bit for bit. A block is a run of bytes: scales in
float16 or in a few bits, then the values in 2 to 8 bits each. The layouts are those of
ggml-quants.h in llama.cpp (github.com/ggml-org/llama.cpp).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lora_jax.weights.coded import Coded
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class GGUFBlocks(Coded):
  """An array in the blocks of a GGUF file.

  Attributes:
    blocks: uint8 [*rows, the bytes of a row].
    kind: the type of the blocks, one of `KINDS`.
    columns, sizes, to, path: as in `Coded`.
  """

  blocks: jax.Array
  kind: str = dataclasses.field(kw_only=True, metadata={"static": True})

  @classmethod
  def of(
    cls, blocks: np.ndarray, kind: str, columns: tuple[int, ...], dtype: DTypeLike
  ) -> "GGUFBlocks":
    """Wraps the rows of a file as `io.pretrained.load(keep_blocks=...)` returns them.

    Args:
      blocks: uint8 [*rows, the bytes of a row].
      kind: the name of the ggml type.
      columns: the axis of the array that a row runs along, counted from its end.
      dtype: the dtype of the array.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in KINDS:
      raise ValueError(f"blocks of kind {kind} cannot be kept; known are {', '.join(KINDS)}")
    sizes = (blocks.shape[-1] // KINDS[kind].size * KINDS[kind].numbers,)
    dtype = jnp.dtype(dtype).name
    return cls(jnp.asarray(blocks), kind=kind, columns=columns, sizes=sizes, to=dtype)

  def decode(self):
    kind = KINDS[self.kind]
    return _joined(kind.decode(_split(self.blocks, kind.size)))


# Each function below maps uint8 [..., bytes of a block] to float32 [..., values of a block].


def _q4_0(x):
  d, q = _cut(x, 2, 16)
  return _half(d) * _minus(_bits(q, 4, run=16), 8)


def _q4_1(x):
  d, m, q = _cut(x, 2, 2, 16)
  return _half(d) * _float(_bits(q, 4, run=16)) + _half(m)


def _q5_0(x):
  d, high, low = _cut(x, 2, 4, 16)
  return _half(d) * _minus(_bits(low, 4, run=16) | _bits(high, 1, run=1) << 4, 16)


def _q5_1(x):
  d, m, high, low = _cut(x, 2, 2, 4, 16)
  return _half(d) * _float(_bits(low, 4, run=16) | _bits(high, 1, run=1) << 4) + _half(m)


def _q8_0(x):
  d, q = _cut(x, 2, 32)
  return _float(lax.bitcast_convert_type(q, jnp.int8)) * _half(d)


def _q2_k(x):
  scales, q, d, least = _cut(x, 16, 64, 2, 2)
  d, least = _half(d) * _float(scales & 15), _half(least) * _float(scales >> 4)
  return _joined(d[..., None] * _float(_split(_bits(q, 2, run=32), 16)) - least[..., None])


def _q3_k(x):
  high, low, low_scales, high_scales, d = _cut(x, 32, 64, 8, 4, 2)
  scales = _bits(low_scales, 4, run=8) | _bits(high_scales, 2, run=4) << 4
  # A set bit of `high` subtracts nothing, a cleared one subtracts four.
  q = _minus(_bits(low, 2, run=32) | _bits(high, 1, run=32) << 2, 4)
  return _joined((_half(d) * _minus(scales, 32))[..., None] * _split(q, 16))


def _q4_k(x):
  d, least, scales, q = _cut(x, 2, 2, 12, 128)
  return _between(d, least, scales, _bits(q, 4, run=32))


def _q5_k(x):
  d, least, scales, high, low = _cut(x, 2, 2, 12, 32, 128)
  return _between(d, least, scales, _bits(low, 4, run=32) | _bits(high, 1, run=32) << 4)


def _q6_k(x):
  low, high, scales, d = _cut(x, 128, 64, 16, 2)
  d = _half(d) * _float(lax.bitcast_convert_type(scales, jnp.int8))
  q = _minus(_bits(low, 4, run=64) | _bits(high, 2, run=32) << 4, 32)
  return _joined(d[..., None] * _split(q, 16))


def _mxfp4(x):
  """E2M1 values and E8M0 scales (Open Compute Project 2023, Microscaling Formats 1.0, section 5).

  The float32 result is assembled from bits, since a product would flush subnormal values to zero.
  """
  scale, q = _cut(x, 1, 16)
  q = _bits(q, 4, run=16).astype(jnp.uint32)
  step, half = (q >> 1 & 3).astype(jnp.int32), q & 1
  one = jnp.uint32(1 << 23)
  significand = jnp.where(step == 0, half * one, one | half << 22)
  exponent = scale.astype(jnp.int32) + step - 1
  shift = jnp.maximum(1 - exponent, 0).astype(jnp.uint32)
  bits = jnp.where(
    exponent > 0, exponent.astype(jnp.uint32) << 23 | significand & one - 1, significand >> shift
  )
  infinity = jnp.uint32(255 << 23)
  bits = jnp.where(significand == 0, 0, jnp.where(exponent > 254, infinity, bits))
  return lax.bitcast_convert_type(q >> 3 << 31 | bits, jnp.float32)


def _between(d, least, scales, q):
  """Eight runs of 32 values, each with a scale and a minimum of six bits."""
  first, second, third = _cut(scales, 4, 4, 4)
  d_scales = jnp.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=-1)
  m_scales = jnp.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=-1)
  d, least = _half(d) * _float(d_scales), _half(least) * _float(m_scales)
  return _joined(d[..., None] * _float(_split(q, 32)) - least[..., None])


def _cut(x: jax.Array, *sizes: int) -> list[jax.Array]:
  return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def _half(x: jax.Array) -> jax.Array:
  """[..., 1] from the two bytes of a float16."""
  return _float(lax.bitcast_convert_type(x, jnp.float16))[..., None]


def _float(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def _minus(x: jax.Array, offset: int) -> jax.Array:
  return _float(x.astype(jnp.int32) - offset)


def _bits(x: jax.Array, width: int, *, run: int) -> jax.Array:
  """Unpacks values of `width` bits; each run of bytes holds the lowest bits of all values first."""
  runs = _split(x, run)[..., None, :]
  shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
  shifts = jnp.expand_dims(shifts, [n for n in range(runs.ndim) if n != runs.ndim - 2])
  return _joined(_joined(runs >> shifts & jnp.uint8(2**width - 1)))


def _split(x: jax.Array, size: int) -> jax.Array:
  """Splits the last axis into [runs, size]."""
  return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _joined(x: jax.Array) -> jax.Array:
  """Joins the last two axes."""
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


class Kind(NamedTuple):
  """The number of values and bytes of a block, and the function that dequantizes it."""

  numbers: int
  size: int
  decode: Callable[[jax.Array], jax.Array]


KINDS = {
  "Q4_0": Kind(32, 18, _q4_0),
  "Q4_1": Kind(32, 20, _q4_1),
  "Q5_0": Kind(32, 22, _q5_0),
  "Q5_1": Kind(32, 24, _q5_1),
  "Q8_0": Kind(32, 34, _q8_0),
  "Q2_K": Kind(256, 84, _q2_k),
  "Q3_K": Kind(256, 110, _q3_k),
  "Q4_K": Kind(256, 144, _q4_k),
  "Q5_K": Kind(256, 176, _q5_k),
  "Q6_K": Kind(256, 210, _q6_k),
  "MXFP4": Kind(32, 17, _mxfp4),
}
