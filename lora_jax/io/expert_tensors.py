"""The kernels of experts, of which files have many tensors and a model has one leaf a layer.

    joined(tensors, path)["model.layers.0.mlp.experts.gate_up_proj"].load()    # (experts, out, in)
    apart(arrays, table)["model.layers.0.mlp.experts.3.up_proj.weight"]         # the inverse

Safetensors files of Qwen3-MoE have three matrices an expert, or the two joined ones that
transformers 5 has in memory. GGUF files have all experts in one tensor, gate and up apart.
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
_OF_ALL = re.compile(r"(blk\.\d+)\.ffn_(gate|up)_exps\.weight")
_JOINED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedTensor:
  """Tensors of a file as one, read one after another by `load`.

  name: of the whole.
  parts: for each expert the tensors whose rows follow each other; of one group, whose tensors hold
    all experts already, where `stacked` is false.
  """

  name: str
  parts: tuple[tuple[Any, ...], ...]
  stacked: bool

  @property
  def shape(self) -> tuple[int, ...]:
    *experts, _, columns = self.parts[0][0].shape
    rows = sum(part.shape[-2] for part in self.parts[0])
    return (*([len(self.parts)] if self.stacked else experts), rows, columns)

  @property
  def dtype(self) -> str:
    """Of safetensors."""
    return self.parts[0][0].dtype

  @property
  def kind(self) -> gguf.GGMLQuantizationType:
    """Of GGUF; float32 where the parts differ, which can only be dequantised then."""
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
    first = _rows(self.parts[0], read)
    if not self.stacked:
      return first
    whole = np.empty((len(self.parts), *first.shape), first.dtype)
    whole[0] = first
    for n, group in enumerate(self.parts[1:], 1):
      whole[n] = _rows(group, read)
    return whole


def joined(tensors: Mapping[str, Any], where: Any) -> dict[str, Any]:
  """The tensors of a file, those of experts joined; others, and joined ones, as they are.

  where: begins the message of an error.

  Raises ValueError where an expert lacks a matrix, or its matrices are of different shapes or
  dtypes, and where a matrix is there twice.
  """
  found, experts = {}, defaultdict(lambda: defaultdict(dict))
  for name, tensor in tensors.items():
    if match := _OF_AN_EXPERT.fullmatch(name):
      experts[match[1]][match[3]][int(match[2])] = tensor
    elif match := _OF_ALL.fullmatch(name):
      experts[f"{match[1]}.ffn_gate_up_exps.weight"][match[2]][0] = tensor
    else:
      found[name] = tensor
  try:
    for owner, kernels in experts.items():
      if not owner.endswith(".weight"):
        for name, kinds in _JOINED.items():
          _add(found, f"{owner}.{name}", owner, [kernels[kind] for kind in kinds], stacked=True)
      else:
        _add(found, owner, owner, [kernels["gate"], kernels["up"]], stacked=False)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  return found


def apart(arrays: Mapping[str, np.ndarray], table: names.Table) -> dict[str, np.ndarray]:
  """The arrays under the names of files, those of experts as files have them; views, no copies.

  table: of the names; kernels that lie (in, out) in the file, as in gpt-oss, stay joined.
  """
  found = {}
  for name, array in arrays.items():
    owner, _, last = name.rpartition(".")
    if owner.endswith(".mlp.experts") and last in _JOINED and names.is_transposed(name, table):
      for n, expert in enumerate(array):
        kinds = _JOINED[last]
        for kind, rows in zip(kinds, np.split(expert, len(kinds)), strict=True):
          found[f"{owner}.{n}.{kind}_proj.weight"] = rows
    elif name.endswith(".ffn_gate_up_exps.weight"):
      for kind, rows in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
        found[name.replace("gate_up", kind)] = rows
    else:
      found[name] = array
  return found


def _add(found: dict[str, Any], name: str, owner: str, kernels: list, *, stacked: bool) -> None:
  """Joins the kernels of each kind, `{number: tensor}`, to one tensor."""
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
  if len(parts[0][0].shape) != 3 - stacked:
    raise ValueError(f"{parts[0][0].name}: shape {parts[0][0].shape} is no kernel of experts")
  found[name] = JoinedTensor(name=name, parts=parts, stacked=stacked)


def _rows(group: tuple[Any, ...], read: Callable[[Any], np.ndarray]) -> np.ndarray:
  return read(group[0]) if len(group) == 1 else np.concatenate(list(map(read, group)), axis=-2)
