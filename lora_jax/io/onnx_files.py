"""Reads the initializers of an ONNX file, by the names of their exported modules.

    graph = open_file("vit.onnx")
    graph.tensors["backbone.encoder.layer.0.mlp.fc1.weight"].load()       # (in, out)
    graph.constants["backbone.encoder.layer.0.norm1.Constant_1"]          # 1e-06

PyTorch's exporter transposes the weights of linear layers and calls them `onnx::MatMul_1981`. The
node that multiplies by the weight has the name of its module. The graph is not run. This requires
the package `onnx` of the extra `vision`.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import files

_MOST_BYTES = (1 << 31) - 1  # of a message of protocol buffers
_ANONYMOUS = "onnx::"
_MAX_AXES = 32
_FLOATS = {1: ("F32", np.float32), 10: ("F16", np.float16), 11: ("F64", np.float64)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OnnxTensor:
  """A float initializer; its attributes are those of `lora_jax.io.safetensors.StoredTensor`."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  content: bytes

  def load(self) -> np.ndarray:
    """Returns the tensor, as a read-only array."""
    kind = dict(_FLOATS.values())[self.dtype]
    return np.frombuffer(self.content, np.dtype(kind).newbyteorder("<")).reshape(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
  """The part of a graph that is read.

  Attributes:
    tensors: the float initializers by their names. An initializer without a name is named after the
      first node that uses it: `<module>.weight`, as (in, out), for a MatMul, and otherwise
      `<module>.<node>.<number of the input>`.
    constants: the values of scalar Constant nodes, by `<module>.<node>`.
  """

  tensors: Mapping[str, OnnxTensor]
  constants: Mapping[str, float]


def open_file(path: str | Path) -> Graph:
  """Reads a file.

  Raises:
    FileNotFoundError, PermissionError: as `files.open_regular` does.
    ModuleNotFoundError: without the package `onnx`.
    ValueError: for a file that is not ONNX, is over 2 GiB or has tensors in other files, and for
      initializers with the wrong size or the same name.
  """
  path = Path(path)
  try:
    import onnx  # the import takes a second, and few callers need it
    from google.protobuf.message import DecodeError
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{path}: is read by the package onnx, which is not installed: pip install "
      f'"lora_jax[vision]" ({error})'
    ) from None
  with files.open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
  content = files.read_bytes(path, _MOST_BYTES)
  try:
    model = onnx.ModelProto.FromString(content)
    if not model.graph.node:
      raise ValueError("has no graph")
    return _graph(model.graph)
  except (DecodeError, ValueError) as error:
    raise ValueError(
      f"{path}: not a whole ONNX file of {size:,} bytes ({str(error)[:500]})"
    ) from None


def _graph(graph: Any) -> Graph:
  names = {}
  for node in graph.node:
    for number, name in enumerate(map(_text, node.input)):
      if name.startswith(_ANONYMOUS):
        names.setdefault(name, _called_after(node, number))
  tensors: dict[str, OnnxTensor] = {}
  for initializer in graph.initializer:
    if initializer.data_type not in _FLOATS:
      continue  # shapes and indices
    name = _text(initializer.name)
    name = names.get(name, name)
    if name in tensors:
      raise ValueError(f"has two tensors {shown(name)}")
    tensors[name] = _tensor(name, initializer)
  constants = {}
  for node in graph.node:
    if node.op_type == "Constant" and len(node.attribute) == 1:
      value = node.attribute[0].t
      kind = {1: np.float32, 7: np.int64}.get(value.data_type)
      if kind and len(value.raw_data) == np.dtype(kind).itemsize:
        constants[_module(node.name)] = np.frombuffer(value.raw_data, kind)[0].item()
  return Graph(tensors=tensors, constants=constants)


def _called_after(node: Any, number: int) -> str:
  module, _, last = _module(node.name).rpartition(".")
  is_weight = node.op_type == "MatMul" and number == 1
  return f"{module}.weight" if is_weight else f"{module}.{last}.{number}"


def _text(name: str | bytes) -> str:
  """A name for a message; names that are not UTF-8 are bytes."""
  if not isinstance(name, str):
    raise ValueError(f"has a name that is no text, {shown(name)}")
  return name


def _module(name: str | bytes) -> str:
  return _text(name).strip("/").replace("/", ".")


def _tensor(name: str, found: Any) -> OnnxTensor:
  if found.data_location or found.external_data:
    raise ValueError(f"{shown(name)} lies in another file; save the model as one")
  shape = tuple(found.dims)
  dtype, kind = _FLOATS[found.data_type]
  if len(shape) > _MAX_AXES or not all(0 <= size < 1 << 40 for size in shape):
    raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
  content = found.raw_data
  if not content and found.float_data:
    content = np.asarray(found.float_data, "<f4").tobytes()
  if len(content) != math.prod(shape) * np.dtype(kind).itemsize:
    raise ValueError(f"{shown(name)}: {dtype} {shown(shape)} is not of {len(content)} bytes")
  return OnnxTensor(name=name, shape=shape, dtype=dtype, content=content)
