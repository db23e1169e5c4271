"""LoKr's tensors, with the shapes that PEFT derives from the config.

The outputs are split into l × k and the inputs into m × n, as `factorization` splits a size; the
window of a convolution stays with n. The rank r determines which matrices are whole and which are
products: a matrix is whole if a product would not make it smaller.

    lokr_w1 (l, m)      or lokr_w1_a (l, r) and lokr_w1_b (r, m)
    lokr_w2 (k, n)      or lokr_w2_a (k, r) and lokr_w2_b (r, n), perhaps with lokr_t2 between them
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.adapters.lokr import factorization
from lora_jax.exchange.modules import Module
from lora_jax.weights import LoKr

Shape = tuple[int, ...]
Parts = dict[str, np.ndarray]


class Split(NamedTuple):
  """A module's sizes: outputs = out_1 * out_2, channels = in_1 * in_2, and the ranks of products.

  rank_1, rank_2: of the first and the second matrix; None for a whole matrix.
  """

  out_1: int
  out_2: int
  in_1: int
  in_2: int
  rank_1: int | None
  rank_2: int | None


def order(module: Module) -> Shape:
  """The axes of the leaf in PEFT's order of flattening, as in `LoKr.order`."""
  if not module.is_conv:
    return ()
  inputs, outputs = (
    [n - len(module.roles) for n, x in enumerate(module.roles) if x == role] for role in "io"
  )
  return (*(inputs[n] for n in module.channels_first()), *outputs)


def parts(
  module: Module,
  kinds: Mapping[str, str],
  shapes: Mapping[str, Shape],
  rank: int,
  load: Callable[[str, Shape], np.ndarray],
) -> Parts:
  """The parts of one layer's adapter.

  Args:
    module: the layer's module.
    kinds: `{suffix: name}` of its tensors.
    shapes: `{name: shape}` of the file's tensors.
    rank: the rank according to the config.
    load: reads a tensor of a given shape.

  Raises:
    ValueError: if the tensors are not those of a LoKr of this layer.
  """
  first = {"lokr_w1"} if "lokr_w1" in kinds else {"lokr_w1_a", "lokr_w1_b"}
  second = {"lokr_w2"} if "lokr_w2" in kinds else {"lokr_w2_a", "lokr_w2_b"}
  second |= {"lokr_t2"} & kinds.keys() if module.is_conv else set()
  if kinds.keys() != first | second:
    raise ValueError(f"{', '.join(sorted(kinds.values()))}: these are not the tensors of a LoKr")
  # Two sizes are taken from the shapes; the others follow from them, and `load` checks them.
  rows, columns = (shapes[kinds[x]] for x in (min(first), max(first)))
  out_1, in_1 = rows[0] if rows else 0, columns[-1] if columns else 0
  window = module.window()
  inner = math.prod(window)
  if not out_1 or not in_1 or module.outputs % out_1 or module.inputs % (in_1 * inner):
    raise ValueError(f"{kinds[min(first)]}: {out_1} × {in_1} do not divide the layer's sizes")
  out_2, in_2 = module.outputs // out_1, module.inputs // (in_1 * inner)
  found = {}
  if "lokr_w1" in kinds:
    found["w1"] = load(kinds["lokr_w1"], (out_1, in_1)).T
  else:
    found["w1_a"] = load(kinds["lokr_w1_b"], (rank, in_1)).T
    found["w1_b"] = load(kinds["lokr_w1_a"], (out_1, rank)).T
  if "lokr_w2" in kinds:
    found["w2"] = load(kinds["lokr_w2"], (out_2, in_2, *window)).reshape(out_2, -1).T
  elif "lokr_t2" in kinds:  # one side of the core is multiplied into the factor of the inputs
    core = load(kinds["lokr_t2"], (rank, rank, *window, *[1] * (2 - len(window))))
    side = load(kinds["lokr_w2_b"], (rank, in_2))
    found["w2_a"] = np.einsum("ij...,jn->in...", core, side).reshape(rank, -1).T
    found["w2_b"] = load(kinds["lokr_w2_a"], (rank, out_2))
  else:
    found["w2_a"] = load(kinds["lokr_w2_b"], (rank, in_2 * inner)).T
    found["w2_b"] = load(kinds["lokr_w2_a"], (out_2, rank)).T
  return found


def tensors(module: Module, adapter: LoKr, parts: Parts) -> dict[str, np.ndarray]:
  """The tensors of one layer's adapter by suffix.

  Raises:
    ValueError: if the axes are flattened in another order than PEFT's.
  """
  flattened, expected = (
    [n for n in axes or range(-len(module.roles), 0) if module.roles[n] == "i"]
    for axes in (adapter.order, order(module))
  )
  if flattened != expected and module.window() != (1,) * len(module.window()):
    raise ValueError(
      f"{module.path}: PEFT splits the channels of a convolution and not its window; make the "
      "adapter with LoKr(channels=True)"
    )
  names = {
    "w1": "lokr_w1",
    "w1_a": "lokr_w1_b",
    "w1_b": "lokr_w1_a",
    "w2": "lokr_w2",
    "w2_a": "lokr_w2_b",
    "w2_b": "lokr_w2_a",
  }
  found = {names[field]: part.T for field, part in parts.items()}
  if "w2" in parts:
    out_2, joined = found["lokr_w2"].shape
    window = module.window()
    found["lokr_w2"] = found["lokr_w2"].reshape(out_2, joined // math.prod(window), *window)
  return found


def split(module: Module, parts: Parts) -> Split:
  """The sizes of the parts of a layer."""
  in_1, out_1 = (parts[x].shape[n] for x, n in _ends("w1", parts))
  in_2, out_2 = (parts[x].shape[n] for x, n in _ends("w2", parts))
  ranks = (parts[f"{x}_b"].shape[0] if f"{x}_b" in parts else None for x in ("w1", "w2"))
  return Split(out_1, out_2, in_1, in_2 // math.prod(module.window()), *ranks)


def _ends(name: str, parts: Collection[str]) -> tuple[tuple[str, int], tuple[str, int]]:
  """The parts that have the rows and the columns of a matrix, and their axes."""
  return ((name, 0), (name, 1)) if name in parts else ((f"{name}_a", 0), (f"{name}_b", 1))


def ranks_and_settings(splits: Mapping[str, Split]) -> tuple[dict[str, int], dict[str, Any]]:
  """The rank of each module, and the config's fields from which PEFT derives these splits.

  Raises:
    ValueError: if PEFT would derive other splits from every rank.
  """
  both = any(x.rank_1 is not None for x in splits.values())
  ranks = {owner: _rank(x, both) for owner, x in splits.items()}
  for owner, x in splits.items():
    whole_1 = not (both and ranks[owner] < max(x.out_1, x.in_1) / 2)
    whole_2 = not ranks[owner] < max(x.out_2, x.in_2) / 2
    products = {rank for rank in (x.rank_1, x.rank_2) if rank is not None}
    if products - {ranks[owner]} or (whole_1, whole_2) != (x.rank_1 is None, x.rank_2 is None):
      raise ValueError(
        f"{owner}: PEFT derives from one rank which matrices of a LoKr are products, and no rank "
        f"gives those of {x}; merge it into the model"
      )
  for factor in (None, *sorted({size for x in splits.values() for size in (x.out_1, x.in_1)})):
    if all(
      factorization(x.out_1 * x.out_2, factor) == (x.out_1, x.out_2)
      and factorization(x.in_1 * x.in_2, factor) == (x.in_1, x.in_2)
      for x in splits.values()
    ):
      return ranks, {"decompose_both": both, "decompose_factor": factor or -1}
  raise ValueError(
    f"{', '.join(sorted(splits)[:4])}…: PEFT splits the sizes of all layers by one factor, and "
    "no factor splits them like this; merge the adapter into the model"
  )


def _rank(split: Split, both: bool) -> int:
  """A rank from which PEFT derives a split, or None."""
  for rank in (split.rank_1, split.rank_2):
    if rank is not None:
      return rank
  largest = max(split.out_2, split.in_2, *((split.out_1, split.in_1) if both else ()))
  return max(1, math.ceil(largest / 2))
