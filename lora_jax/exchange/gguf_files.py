"""Writes a low-rank adapter as a GGUF file that llama.cpp loads with `--lora`.

    write("adapter.gguf", {"blk.0.attn_q.weight": (a, b)}, alpha=16.0, architecture="llama")

The adapted weight is `w + alpha / rank * b @ a` in the layout of the base's GGUF file, where w is
(out, in). Each pair has its own rank, and the file has one alpha.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from lora_jax.io import casting, outputs

EMBEDDING = "token_embd.weight"
"""The weight whose rows llama.cpp looks up; of its adapter it wants a as (in, rank)."""

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_KINDS = {
  "float32": GGMLQuantizationType.F32,
  "float16": GGMLQuantizationType.F16,
  "bfloat16": GGMLQuantizationType.BF16,
}


def write(
  path: str | Path,
  factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  alpha: float,
  architecture: str,
  dtype: str = "float32",
) -> None:
  """Writes an adapter to a file, completely or not at all.

  Args:
    path: of the file; an existing file is replaced.
    factors: `{name: (a, b)}` by the names of the base's tensors, a (rank, in) and b (out, rank).
    alpha: the numerator of the scale, not zero: llama.cpp reads zero as no scale.
    architecture: of the base, as in its `general.architecture`.
    dtype: of the tensors: float32, float16 or bfloat16.

  Raises:
    ValueError: if there are no factors, alpha is zero, two factors differ in rank, or values
      overflow the dtype.
  """
  path = outputs.replaceable_file(path)
  if not factors or not alpha:
    raise ValueError(f"{path}: there must be factors, and an alpha that is not zero ({alpha})")
  for name, (a, b) in factors.items():
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
      raise ValueError(f"{name}: {a.shape} and {b.shape} are not (rank, in) and (out, rank)")
  each = {f"{name}.lora_a": a for name, (a, _) in factors.items()}
  each |= {f"{name}.lora_b": b for name, (_, b) in factors.items()}
  try:
    casting.cast(each, _DTYPES[dtype])
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  with (
    outputs.whole_file(path) as partial,
    contextlib.closing(gguf.GGUFWriter(partial, architecture)) as writer,
  ):
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (a, b) in factors.items():
      _add(writer, f"{name}.lora_a", a.T if name == EMBEDDING else a, dtype)
      _add(writer, f"{name}.lora_b", b, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, dtype: str) -> None:
  kind = _KINDS[dtype]
  data = gguf.quants.quantize(np.ascontiguousarray(tensor, np.float32), kind)
  writer.add_tensor(name, data, raw_dtype=kind)
