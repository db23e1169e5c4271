"""Chooses the leaves to adapt, and their specs: from patterns and presets to `{path: spec}`.

match(params, [
    (r".*/attn/(query|value)/kernel", LoRA(rank=8, alpha=16.0)),
    ("mlp", LoRA(rank=4, alpha=8.0)),
])
"""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import checks, tree
from lora_jax.adapters import Full, LoRA, Method
from lora_jax.axes import Axes, convolution_roles
from lora_jax.weights import Format, is_weight

PyTree = Any

# The presets use these names where no traced axes are given: those of Flax, Haiku, Equinox and
# PyTorch.
_KERNEL = re.compile(r"(.*/)?(kernel|w|w_[ih]|weight|weight_[ih]h)")
# The block that a component of a path names.
_BLOCKS = {
  "attention": re.compile(r".*(attn|attention).*|att", re.IGNORECASE),
  "mlp": re.compile(r".*(mlp|ffn|feed_?forward|intermediate).*|ffw?(_?\d+)?", re.IGNORECASE),
}
# Leaves that are not layers of the body: those that embed tokens or pixels, read out, or route. A
# dense layer below an embedding (of the time, or a label) does belong to the body, and a layer with
# several attention heads is not a head in this sense.
_APART = re.compile(
  r"(.*/)?((\w*patch_embed\w*|embeddings|head|(?!(\w*_)?(multi|single|attn|attention|self|cross|query|key|kv)"
  r"_head(/|$))\w*_head|router|\w*_router)(/.*)?|(embed\w*|\w*embed|\w*embeddings?|wte|wpe)(/[^/]*)?)",
  re.IGNORECASE,
)

_HEADS = re.compile(r"(.*/)?(head|\w*_head)(/.*)?", re.IGNORECASE)

_BIAS = re.compile(r"(.*/)?((\w*_)?bias|b)")
_NORM = re.compile(
  r"(.*/)?([^/]*norm[^/]*|(\w*_)?(ln|bn)(_\w+|\d+)?)/(scale|weight|gamma|bias|offset|beta)",
  re.IGNORECASE,
)

# A layer that is only convolved or gathered is not linear.
_PRODUCTS = frozenset({"dot_general", "ragged_dot_general"})
_CONVOLUTIONS = frozenset({"conv_general_dilated"})

# Leaves that presets leave out for every method, since they are not kernels.
_KERNELS = LoRA(rank=1, alpha=1.0)

# The presets for leaves that are not kernels, with a condition on the leaf.
_BY_NAME = {"bias": _BIAS, "norm": _NORM}
_FLOATS = Full()

_EXAMPLE = '[("all-linear", LoRA(rank=8, alpha=16.0))]'

PRESETS = ("all-linear", *_BLOCKS, "convolutions", *_BY_NAME)


class Targets(dict[str, Method]):
  """The result of `match`: the dict `{path: spec}`, which also remembers its axes.

  So `init`, `summary` and other functions that take specs need not be given the axes again. A copy
  as a plain dict (`{**specs}`, `specs | more`, a comprehension) holds only the specs; pass the axes
  along with it.

  Attributes:
    axes: the axes that `match` was given, or None.
    left_out: `{path: reason}` for leaves that look like kernels of the requested presets but were
      left out.
  """

  def __init__(
    self,
    specs: Mapping[str, Method],
    axes: Mapping[str, Axes] | None,
    left_out: Mapping[str, str],
  ):
    super().__init__(specs)
    self.axes = axes
    self.left_out = dict(left_out)


def axes_of(
  specs: Iterable[str], axes: Mapping[str, Axes] | None, leaves: Mapping[str, Any]
) -> Mapping[str, Axes] | None:
  """The given axes or, without any, those that the specs remember.

  Args:
    specs: the result of `match`, or any paths.
    axes: the result of `trace_axes`, or None.
    leaves: the tree's leaves, by path.

  Raises:
    ValueError: if the axes are those of another tree.
  """
  if axes is None and isinstance(specs, Targets):
    axes = specs.axes
  if axes is not None:
    _check_same_tree(axes, (path for path in specs if path in leaves), leaves)
  return axes


def _check_same_tree(axes: Mapping[str, Axes], paths: Iterable[str], leaves: Mapping[str, Any]):
  missing = next((path for path in paths if path not in axes), None)
  if missing is not None:
    raise ValueError(
      f"{missing}: is not among the axes, which were traced for another tree: its first path is "
      f"{next(iter(axes), None)!r}, and that of these parameters {next(iter(leaves), None)!r}; "
      "call lora_jax.trace_axes with the same tree"
    )


def match(
  params: PyTree,
  rules: Sequence[tuple[str, Method | None]],
  axes: Mapping[str, Axes] | None = None,
) -> Targets:
  """Returns `{path: spec}` for the leaves to adapt, in the tree's order; it remembers the axes.

  Warns, with paths and reasons, if a preset leaves out leaves that look like kernels because
  `trace_axes` could not follow them. `left_out` of the result has all leaves that a preset leaves
  out, and so has the table of `summary`.

  Args:
    params: the base, a pytree of arrays, Weights or `jax.ShapeDtypeStruct`s.
    rules: ordered (pattern, spec) pairs; the first whose pattern matches a leaf decides. A pattern
      is a regular expression for the whole path, or a preset. "all-linear" is every linear layer
      except embeddings, heads and routers. "attention" and "mlp" are those in such blocks; the last
      component of the path that names one of the two decides. "convolutions" is the kernel of every
      convolution, with any window and groups, except heads. "bias" is all biases, "norm" all
      parameters of normalization layers, both for `Full`. The spec None leaves a leaf unchanged.
    axes: the result of `trace_axes`. With it, the presets of linear layers select the kernels that
      the model multiplies by, under any name. Without it, and always for "bias" and "norm", they
      select by the usual names. Linen collections other than "params" hold no kernels.

  Raises:
    TypeError: if the rules are not a list of pairs, a pattern is not a string, or a spec is not a
      spec (its class, for example).
    ValueError: if a pattern matches no leaf (the nearest paths are listed), or matches one that
      cannot be adapted (with the reason), or if the axes are those of another tree.
  """
  rules = checks.rules(rules, Method | Format | None, "spec", _EXAMPLE)
  leaves = tree.flatten(params, is_leaf=is_weight)
  if axes is not None:
    _check_same_tree(axes, leaves, leaves)
  states = _states(leaves)
  specs, taken, left_out = {}, set(), {}
  for pattern, spec in rules:
    reasons = _reasons(pattern, leaves, states, axes)
    hits = _select(pattern, leaves, states, reasons)
    if spec is not None:
      left_out |= {path: reason for path, reason in reasons.items() if reason}
    if not hits and pattern in PRESETS:
      raise ValueError(
        f"the preset {pattern!r} matches no leaf of these parameters{_listed(left_out)}"
      )
    if not hits:
      nearest = difflib.get_close_matches(pattern, leaves, n=5, cutoff=0.0)
      meant = difflib.get_close_matches(pattern.replace("_", "-"), PRESETS, n=1)
      preset = f"The preset {meant[0]!r} has a similar name. " if meant else ""
      raise ValueError(
        f"the pattern {pattern!r} matches no leaf; it must match a whole path. {preset}"
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
  left_out = {path: left_out[path] for path in leaves if path in left_out and path not in taken}
  lost = {path: reason for path, reason in left_out.items() if _is_lost(path, reason, axes)}
  if lost:
    warnings.warn(
      f"{len(lost)} that look like kernels are left out, since trace_axes cannot tell how they are "
      f"used{_listed(lost)}. Name them in a pattern of their own, or leave them out by (pattern, "
      "None)",
      stacklevel=2,
    )
  return Targets({path: specs[path] for path in leaves if path in specs}, axes, left_out)


def _select(pattern: str, leaves: Mapping[str, Any], states, reasons) -> list[str]:
  if pattern not in PRESETS:
    return tree.matching(pattern, leaves)
  if pattern in _BY_NAME:
    named = _BY_NAME[pattern]
    return [
      x
      for x in leaves
      if named.fullmatch(_unboxed(x)) and not _FLOATS.unfit(leaves[x]) and x not in states
    ]
  return [path for path in leaves if reasons.get(path) == ""]


def _reasons(pattern: str, leaves: Mapping[str, Any], states, axes) -> dict[str, str]:
  """For a preset of linear layers, a reason for every leaf that looks like a kernel.

  An empty reason includes the leaf, any other leaves it out.
  """
  if pattern not in PRESETS or pattern in _BY_NAME:
    return {}
  reasons = {}
  for path, leaf in leaves.items():
    if pattern == "convolutions":
      reason = _reason_of_convolution(path, leaves, states.get(path), axes)
    else:
      reason = _reason(path, leaf, states.get(path), axes)
    if reason is not None and (pattern not in _BLOCKS or pattern in _blocks(path)):
      reasons[path] = reason
  return reasons


def _reason(path: str, leaf: Any, state: str | None, axes) -> str | None:
  """The reason why a leaf that looks like a kernel is no linear layer of the body; empty if it is.

  None for a leaf that does not look like a kernel, by its name or its use.
  """
  named = _KERNEL.fullmatch(_unboxed(path)) is not None
  found = None if axes is None else axes[path]
  unfit = _KERNELS.unfit(leaf)
  if not named and (unfit or found is None or not (found.roles or found.not_followed)):
    return None
  if unfit:
    return unfit if len(getattr(leaf, "shape", ())) > 1 else None
  if state:
    return f"it is in the collection {state!r}, which holds no parameters"
  if _APART.fullmatch(_unboxed(path)):
    return "its path says that it embeds, reads out or routes"
  if found is None or (_PRODUCTS.intersection(found.uses) and found.roles):
    return ""
  return found.reason or f"it is not a factor of a product ({', '.join(found.uses)})"


def _reason_of_convolution(
  path: str, leaves: Mapping[str, Any], state: str | None, axes
) -> str | None:
  """The reason why a convolution's kernel is left out; empty if it is taken, None for others."""
  if axes is None:
    is_one = bool(convolution_roles(path, leaves))
  else:
    is_one = bool(axes[path].roles and _CONVOLUTIONS.intersection(axes[path].uses))
  if not is_one:
    return None
  if unfit := _KERNELS.unfit(leaves[path]):
    return unfit
  if state:
    return f"it is in the collection {state!r}, which holds no parameters"
  return "its path says that it reads out" if _HEADS.fullmatch(_unboxed(path)) else ""


def _is_lost(path: str, reason: str, axes: Mapping[str, Axes] | None) -> bool:
  """True if a leaf is left out because the trace met it but cannot tell how it is used."""
  if axes is None or reason != axes[path].reason:
    return False
  found = axes[path]
  named = _KERNEL.fullmatch(_unboxed(path)) is not None
  return bool(found.not_followed or (named and (found.uses or found.joined)))


def _blocks(path: str) -> set[str]:
  """The blocks named by the deepest component of a path that names any."""
  for part in reversed(path.split("/")):
    if named := {block for block, name in _BLOCKS.items() if name.fullmatch(part)}:
      return named
  return set()


def _states(leaves: Mapping[str, Any]) -> dict[str, str]:
  """`{path: collection}` for leaves in collections of variables that are not parameters."""
  collections = {path: path.split("/") for path in leaves}
  of_linen = any(parts[0] == "params" and parts[1:] for parts in collections.values())
  states = {}
  for path, parts in collections.items():
    if of_linen and parts[0] != "params":
      states[path] = parts[0]
    elif "batch_stats" in parts[:-1]:  # NNX keeps them in the module itself
      states[path] = "batch_stats"
  return states


def _unboxed(path: str) -> str:
  """The path of the value in a Flax box: kernel/value is the kernel."""
  return re.sub(r"(?<=.)/(value|raw_value)$", "", path)


def _listed(reasons: Mapping[str, str], most: int = 5) -> str:
  """The first reasons, as the end of a sentence."""
  if not reasons:
    return ""
  shown = "; ".join(f"{path}: {reason}" for path, reason in [*reasons.items()][:most])
  return f": {shown}{' …' if len(reasons) > most else ''}"
