"""Joins and splits the kernels of experts: many tensors in files, one leaf per layer in a model.

    joined(tensors, path, table)["model.layers.0.mlp.experts.gate_up_proj"].load()
    # (experts, out, in)
    apart(arrays, table)["model.layers.0.mlp.experts.3.up_proj.weight"]         # the inverse

Safetensors files of Qwen3-MoE have three matrices per expert, or the two joined ones that
transformers 5 has in memory. GGUF files have all experts in one tensor, with separate gate and up.
So are the biases of gpt-oss, whose joined form interleaves the rows of gate and up.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from lora_jax.io import names

_LISTED = 4
_OF_AN_EXPERT = re.compile(
  r"(model\.layers\.\d+\.mlp\.experts)\.(0|[1-9]\d{0,5})\.(gate|up|down)_proj\.weight"
)
_OF_ALL = re.compile(r"(blk\.\d+)\.ffn_(gate|up)_exps\.(weight|bias)")
_GATE_UP = re.compile(r"blk\.\d+\.ffn_gate_up_exps\.(weight|bias)")
_JOINED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedTensor:
  """Tensors of a file that are joined to one; `load` reads them one after another.

  name: of the joined tensor.
  parts: for each expert the tensors whose rows are joined; a single group if `stacked` is False,
    where each tensor already has all experts.
  axis: the axis of the rows of a group: -2 for kernels, -1 for biases.
  in_turn: whether the rows of a group are interleaved rather than concatenated.
  """

  name: str
  parts: tuple[tuple[Any, ...], ...]
  stacked: bool
  axis: int = -2
  in_turn: bool = False

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.parts[0][0].shape)
    shape[self.axis] = sum(part.shape[self.axis] for part in self.parts[0])
    return (*([len(self.parts)] if self.stacked else []), *shape)

  @property
  def dtype(self) -> str:
    """The dtype of safetensors."""
    return self.parts[0][0].dtype

  @property
  def kind(self) -> gguf.GGMLQuantizationType:
    """The type of GGUF; float32 if the parts differ, which must then be dequantized."""
    kinds = {part.kind for group in self.parts for part in group}
    return kinds.pop() if len(kinds) == 1 else gguf.GGMLQuantizationType.F32

  @property
  def is_quantized(self) -> bool:
    return gguf.GGML_QUANT_SIZES[self.kind][0] > 1

  @property
  def data(self) -> np.ndarray:
    """The blocks of GGUF, as `GGUFTensor.data`."""
    return self._read(lambda part: part.data)

  def load(self) -> np.ndarray:
    return self._read(lambda part: part.load())

  def _read(self, read: Callable[[Any], np.ndarray]) -> np.ndarray:
    first = self._rows(self.parts[0], read)
    if not self.stacked:
      return first
    whole = np.empty((len(self.parts), *first.shape), first.dtype)
    whole[0] = first
    for n, group in enumerate(self.parts[1:], 1):
      whole[n] = self._rows(group, read)
    return whole

  def _rows(self, group: tuple[Any, ...], read: Callable[[Any], np.ndarray]) -> np.ndarray:
    if len(group) == 1:
      return read(group[0])
    arrays = list(map(read, group))
    if not self.in_turn:
      return np.concatenate(arrays, axis=self.axis)
    shape = list(arrays[0].shape)
    shape[self.axis] *= len(arrays)
    return np.stack(arrays, axis=self.axis).reshape(shape)


def joined(tensors: Mapping[str, Any], where: Any, table: names.Table) -> dict[str, Any]:
  """Returns the tensors of a file with those of experts joined; others are unchanged.

  where: the start of an error.
  table: of the names.

  Raises ValueError if an expert lacks a matrix, its matrices differ in shape or dtype, or a matrix
  occurs twice.
  """
  found, experts = {}, defaultdict(lambda: defaultdict(dict))
  for name, tensor in tensors.items():
    if match := _OF_AN_EXPERT.fullmatch(name):
      experts[match[1]][match[3]][int(match[2])] = tensor
    elif match := _OF_ALL.fullmatch(name):
      experts[f"{match[1]}.ffn_gate_up_exps.{match[3]}"][match[2]][0] = tensor
    else:
      found[name] = tensor
  try:
    for owner, kernels in experts.items():
      if _GATE_UP.fullmatch(owner) is None:
        for name, kinds in _JOINED.items():
          of_kinds = [kernels[kind] for kind in kinds]
          _add(found, f"{owner}.{name}", owner, of_kinds, axes=2, stacked=True)
      else:
        axis = {"axis": -1, "axes": 2} if owner.endswith(".bias") else {"axes": 3}
        pair, in_turn = [kernels["gate"], kernels["up"]], names.is_in_turn(owner, table)
        _add(found, owner, owner, pair, stacked=False, in_turn=in_turn, **axis)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  return found


def apart(arrays: Mapping[str, np.ndarray], table: names.Table) -> dict[str, np.ndarray]:
  """Returns the arrays by the names of files, with experts split as in files; views, no copies.

  table: of the names; kernels that are (in, out) in the file, as in gpt-oss, stay joined.
  """
  found = {}
  for name, array in arrays.items():
    owner, _, last = name.rpartition(".")
    if owner.endswith(".mlp.experts") and last in _JOINED and names.is_transposed(name, table):
      for n, expert in enumerate(array):
        kinds = _JOINED[last]
        for kind, rows in zip(kinds, np.split(expert, len(kinds)), strict=True):
          found[f"{owner}.{n}.{kind}_proj.weight"] = rows
    elif _GATE_UP.fullmatch(name):
      in_turn = names.is_in_turn(name, table)
      halves = (array[:, ::2], array[:, 1::2]) if in_turn else np.split(array, 2, axis=1)
      for kind, rows in zip(("gate", "up"), halves, strict=True):
        found[name.replace("gate_up", kind)] = rows
    else:
      found[name] = array
  return found


def _add(
  found: dict[str, Any], name: str, owner: str, kernels: list, *, axes: int, **how: Any
) -> None:
  """Joins the kernels of each kind, `{number: tensor}`, to one tensor.

  axes: the number of axes of a part.
  how: fields of the JoinedTensor.
  """
  if name in found:
    raise ValueError(f"{owner}: holds the kernels of its experts twice, joined and apart")
  count = len(set().union(*kernels))
  if lacking := sorted({n for kind in kernels for n in range(count) if n not in kind}):
    raise ValueError(
      f"{name}: of {count} experts in the file, kernels are missing of the experts "
      f"{', '.join(map(str, lacking[:_LISTED]))}{' …' if len(lacking) > _LISTED else ''}"
    )
  parts = tuple(tuple(kind[n] for kind in kernels) for n in range(count))
  for group in parts:
    for first, part in zip(parts[0], group, strict=True):
      dtypes = {getattr(x, "dtype", None) for x in (parts[0][0], part)}
      if part.shape != first.shape or part.shape != group[0].shape or len(dtypes) > 1:
        raise ValueError(
          f"{part.name}: shape {part.shape}, where the others of {name} have {first.shape}, or "
          f"another dtype than {parts[0][0].name}"
        )
  if len(parts[0][0].shape) != axes:
    raise ValueError(f"{parts[0][0].name}: shape {parts[0][0].shape} is no kernel of experts")
  found[name] = JoinedTensor(name=name, parts=parts, **how)
