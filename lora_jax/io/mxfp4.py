"""Reads kernels of safetensors files in MXFP4, the format of gpt-oss: 4-bit blocks and scales.

    tensors = joined(tensors, folder, table)
    tensors["model.layers.0.mlp.experts.down_proj"].load()      # bfloat16 [experts, in, out]

A kernel is two tensors of bytes: `..._blocks` [experts, out, in / 32, 16], two values per byte, the
first in the lower four bits, and `..._scales` [experts, out, in / 32]. A value is E2M1, a scale
E8M0, a power of two (Open Compute Project 2023, OCP Microscaling Formats 1.0, sections 5.3.3 and
5.4.1, and 6.3 for their product). bfloat16 represents every product exactly.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.io import names

_PARTS = re.compile(r"(.+)_(blocks|scales)")
_SIZE, _BYTES = 32, 16  # values of a block, and its bytes
_BIAS, _NAN = 127, 255  # of E8M0
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)
"""The two values of each byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DequantizedTensor:
  """A kernel (experts, in, out); nothing is read before `load`.

  name: of the unquantized kernel.
  blocks, scales: the tensors of the file.
  """

  name: str
  blocks: Any
  scales: Any
  dtype: str = dataclasses.field(default="BF16", init=False)

  @property
  def shape(self) -> tuple[int, ...]:
    experts, outputs, count, _ = self.blocks.shape
    return experts, count * _SIZE, outputs

  def load(self) -> np.ndarray:
    """Returns the kernel in bfloat16.

    Raises ValueError for a scale that is NaN, and if the file has become shorter.
    """
    blocks, scales = self.blocks.load(), self.scales.load()
    if (scales == _NAN).any():
      raise ValueError(f"{self.scales.name}: holds scales that are no numbers; the file is damaged")
    found = np.empty(self.shape, ml_dtypes.bfloat16)
    exponents = scales.astype(np.int32) - _BIAS
    for n, expert in enumerate(blocks):  # in float32 one at a time
      with np.errstate(over="ignore"):  # the caller checks it
        values = np.ldexp(_PAIRS[expert], exponents[n][..., None, None])
      found[n] = values.reshape(len(expert), -1).T
    return found


def joined(tensors: Mapping[str, Any], where: Any, table: names.Table) -> dict[str, Any]:
  """Returns the tensors of a file, with blocks and scales replaced by their kernels.

  where: the start of an error.
  table: of the names; tensors without a kernel in it are unchanged.

  Raises ValueError if blocks or scales are missing, of another dtype or of inconsistent shapes, and
  if the file also has the kernel itself.
  """
  found, parts = {}, {}
  for name, tensor in tensors.items():
    match = _PARTS.fullmatch(name)
    if match and names.is_in_out(match[1], table):
      parts.setdefault(match[1], {})[match[2]] = tensor
    else:
      found[name] = tensor
  for name, pair in parts.items():
    lacking = [x for x in ("blocks", "scales") if x not in pair]
    if lacking or name in found:
      problem = f"lacks {name}_{lacking[0]}" if lacking else "holds it as numbers too"
      raise ValueError(f"{where}: {name}: is in MXFP4, and the file {problem}")
    tensor = DequantizedTensor(name=name, **pair)
    _check(where, tensor)
    found[name] = tensor
  return found


def _check(where: Any, tensor: DequantizedTensor) -> None:
  blocks, scales = tensor.blocks, tensor.scales
  for part in (blocks, scales):
    if part.dtype != "U8":
      raise ValueError(f"{where}: {part.name}: its dtype {part.dtype} is not U8, as MXFP4 needs")
  if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or blocks.shape[:-1] != scales.shape:
    raise ValueError(
      f"{where}: {tensor.name}: blocks {blocks.shape} and scales {scales.shape} are not (experts, "
      f"out, in / {_SIZE}, {_BYTES}) and (experts, out, in / {_SIZE})"
    )
