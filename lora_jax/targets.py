"""Which leaves are adapted, and how: patterns and presets to `{path: spec}`.

match(params, [
    (r".*/attn/(query|value)/kernel", LoRA(rank=8, alpha=16.0)),
    ("mlp", LoRA(rank=4, alpha=8.0)),
])
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax import tree
from lora_jax.adapters import Full, LoRA, Method
from lora_jax.axes import Axes
from lora_jax.weights import is_weight

PyTree = Any

# What the presets go by when no traced axes tell: the names that Flax, Haiku and PyTorch give.
_KERNEL = re.compile(r"(.*/)?(kernel|w|weight)")
_ATTENTION = re.compile(r"(.*/)?([^/]*(attn|attention)[^/]*|att)(/.*)?", re.IGNORECASE)
_MLP = re.compile(r"(.*/)?([^/]*(mlp|ffn|feed_?forward|intermediate)[^/]*|ff)(/.*)?", re.IGNORECASE)
# Contracted leaves that are no layers of the body: what reads tokens in and out, and what routes.
_APART = re.compile(
  r"(^|.*/)(embed\w*|\w*embed|\w*embeddings?|wte|wpe|head|\w*_head|router|\w*_router)(/.*|$)",
  re.IGNORECASE,
)

_BIAS = re.compile(r"(.*/)?((\w*_)?bias|b)")
_NORM = re.compile(
  r"(.*/)?([^/]*norm[^/]*|(\w*_)?(ln|bn)(_\w+|\d+)?)/(scale|weight|gamma|bias|offset|beta)",
  re.IGNORECASE,
)

# A layer that is only convolved or gathered is no linear one.
_PRODUCTS = frozenset({"dot_general", "ragged_dot_general"})

# What a preset leaves out whatever the method is: leaves that are no kernels.
_KERNELS = LoRA(rank=1, alpha=1.0)

# The presets of leaves that are no kernels, and what they ask of a leaf.
_BY_NAME = {"bias": _BIAS, "norm": _NORM}
_FLOATS = Full()

PRESETS = ("all-linear", "attention", "mlp", *_BY_NAME)


def match(
  params: PyTree,
  rules: Sequence[tuple[str, Method | None]],
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, Method]:
  """Returns `{path: spec}` of the leaves to adapt, in the tree's order.

  Args:
    params: the base, a pytree of arrays, Weights or `jax.ShapeDtypeStruct`s.
    rules: ordered (pattern, spec) pairs; the first whose pattern matches a leaf decides. A pattern
      is a regular expression for the whole path, or a preset: "all-linear" (every linear layer
      but embeddings, heads and routers), "attention" and "mlp" (those of them in such blocks),
      "bias" and "norm" (all biases; all parameters of normalisation layers; for `Full`).
      The spec None leaves a leaf as it is.
    axes: what `trace_axes` found. With it the presets of linear layers take what the model
      multiplies by, whatever the name; without it, as "bias" and "norm" always, they go by the
      usual names.

  Raises:
    ValueError: when a pattern matches no leaf (the nearest paths are listed), or matches one that
      cannot be adapted (with the reason).
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  specs, taken = {}, set()
  for pattern, spec in rules:
    hits = _select(pattern, leaves, axes)
    if not hits and pattern in PRESETS:
      raise ValueError(f"the preset {pattern!r} matches no leaf of these parameters")
    if not hits:
      nearest = difflib.get_close_matches(pattern, leaves, n=5, cutoff=0.0)
      raise ValueError(
        f"the pattern {pattern!r} matches no leaf; it must match a whole path. "
        f"The nearest paths: {', '.join(nearest)}"
      )
    for path in hits:
      if path in taken:
        continue
      taken.add(path)
      if spec is not None:
        reason = spec.unfit(leaves[path])
        if reason:
          raise ValueError(
            f"the pattern {pattern!r} matches {path}, which cannot be adapted: {reason}; "
            "narrow the pattern, or put (pattern, None) for this path before it"
          )
        specs[path] = spec
  return {path: specs[path] for path in leaves if path in specs}


def _select(pattern: str, leaves: Mapping[str, Any], axes) -> list[str]:
  if pattern not in PRESETS:
    return tree.matching(pattern, leaves)
  if pattern in _BY_NAME:
    named = _BY_NAME[pattern]
    return [x for x in leaves if named.fullmatch(x) and not _FLOATS.unfit(leaves[x])]
  linear = [path for path in leaves if _is_linear(path, leaves[path], axes)]
  block = {"attention": _ATTENTION, "mlp": _MLP}.get(pattern)
  return [path for path in linear if block is None or block.fullmatch(path)]


def _is_linear(path: str, leaf, axes) -> bool:
  if _APART.fullmatch(path) or _KERNELS.unfit(leaf):
    return False
  if axes is None:
    return _KERNEL.fullmatch(path) is not None
  return bool(axes[path].roles) and _PRODUCTS.intersection(axes[path].uses) != set()
