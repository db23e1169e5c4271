"""Writes a model as one GGUF file, which llama.cpp, `transformers` and `pretrained.load` read.

    wider = save("model.gguf", params, config, tokenizer, dtype="q8_0")
    wider      # {"blk.0.ffn_down.weight": "float16", ...}: tensors stored in a wider dtype

Norms, biases, other leaves with one axis, and learned positions stay in float32; Gemma's norms are
written with 1 added. The rows of queries and keys are in the order of llama.cpp's rotary positions:
the features of a pair are half a head apart in this library, and adjacent in GGUF files of a Llama.
In files of other architectures they are half a head apart too. The formats are those of ggml
(github.com/ggml-org/ggml, docs/gguf.md). The `gguf` package quantizes the blocks, with one tensor
in memory at a time.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from lora_jax import families
from lora_jax.io import casting, gguf_configs, gguf_gemma, outputs
from lora_jax.io import tokenizer as tokenizers
from lora_jax.io.export import file_tensors

KINDS = {
  "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
  "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
  "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
  "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
  "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
  "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
  "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
  "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
"""The dtypes of the matrices, from the widest; from q8_0 on they have blocks of 32 values."""

_FOUR_OR_FIVE_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_ROUTER = ".ffn_gate_inp.weight"  # llama.cpp keeps it so
_POSITIONS = "position_embd.weight"  # llama.cpp does not quantize it
_LARGEST_HALF = float(np.finfo(np.float16).max)


def save(
  path: str | Path,
  params: Mapping[str, Any],
  config: families.Config,
  tokenizer: tokenizers.Tokenizer,
  *,
  dtype: str = "float32",
) -> dict[str, str]:
  """Writes a model to a new file, completely or not at all.

  With dtypes of four or five bits, embedding and head are q8_0, since errors in the head affect
  every token. A matrix whose rows cannot be split into blocks is float16.

  path: of the file.
  params: plain arrays for the config's model, stacked or not.
  config, tokenizer: from `pretrained.load`.
  dtype: of the matrices, one of KINDS.

  Returns the matrices that are stored in a wider dtype, {tensor name: dtype}.

  Raises FileExistsError for an existing file; TypeError for a leaf that is not an array; and
  ValueError for values that are not finite or overflow the dtype, for params that do not match the
  config, and for a config or a tokenizer that the format cannot express.
  """
  path = outputs.new_file(path)
  if dtype not in KINDS:
    raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(KINDS)}")
  architecture = gguf_configs.architecture(config)
  metadata, rope_factors = gguf_configs.to_gguf(config)
  metadata |= tokenizers.to_gguf(tokenizer, config.vocab_size)
  tensors = file_tensors(params, config, families.family_of(config).names["gguf"])
  tensors |= rope_factors
  dtypes = {name: _dtype(name, tensor.shape, dtype) for name, tensor in tensors.items()}

  with (
    outputs.whole_file(path) as partial,
    contextlib.closing(gguf.GGUFWriter(partial, architecture)) as writer,
  ):
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(KINDS[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
      _add(writer, key, value)
    for name, tensor in tensors.items():
      kind = KINDS[dtypes[name]][0]
      size = int(np.prod(quant_shape_to_byte_shape(tensor.shape, kind)))
      writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
      rows = np.ascontiguousarray(_as_stored(name, tensor, config), np.float32)
      _check_values(name, rows, dtypes[name])
      writer.write_tensor_data(quantize(rows, KINDS[dtypes[name]][0]))
  return {
    name: dtypes[name]
    for name, tensor in tensors.items()
    if tensor.ndim > 1 and dtypes[name] != dtype
  }


def _dtype(name: str, shape: tuple[int, ...], wanted: str) -> str:
  """The dtype that a tensor is stored in."""
  if len(shape) < 2 or name == _POSITIONS or name.endswith((_ROUTER, ".bias")):
    return "float32"
  if name in _EMBEDDINGS and wanted in _FOUR_OR_FIVE_BITS:
    wanted = "q8_0"
  block_size, _ = gguf.GGML_QUANT_SIZES[KINDS[wanted][0]]
  return "float16" if shape[-1] % block_size else wanted


def _check_values(name: str, rows: np.ndarray, dtype: str) -> None:
  if not np.isfinite(rows).all():
    raise ValueError(f"{name}: holds values that are not finite; there is no sense in storing them")
  # The scales of blocks are float16 too.
  if dtype == "bfloat16":
    casting.cast({name: rows}, ml_dtypes.bfloat16)
  elif dtype != "float32" and (largest := abs(rows).max()) > _LARGEST_HALF:
    raise ValueError(
      f"{name}: its largest value {largest:.3g} is beyond {dtype}; use bfloat16 or float32"
    )


def _as_stored(name: str, tensor: np.ndarray, config: families.Config) -> np.ndarray:
  """The tensor (out, in) as in llama.cpp: 1 + a norm, interleaved halves of heads of a Llama."""
  if name.endswith("norm.weight") and gguf_gemma.is_offset("scale", config):
    return tensor + 1
  if not gguf_configs.rotates_neighbours(gguf_configs.architecture(config)):
    return tensor
  heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
  projection = name.split(".")[-2]
  if projection not in heads:
    return tensor
  halves = tensor.reshape(heads[projection], 2, -1, tensor.shape[-1])
  return halves.swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  """Adds metadata, in the type that llama.cpp expects."""
  match value:
    case bool():
      writer.add_bool(key, value)
    case int():
      writer.add_uint32(key, value)
    case float():
      writer.add_float32(key, value)
    case str():
      writer.add_string(key, value)
    case list() | bytes():
      writer.add_array(key, value)
