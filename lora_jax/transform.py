"""From a tree of parameters to a tree of Weights and back: init, attach, detach, merge, unmerge.

specs    = match(params, [("all-linear", LoRA(rank=8, alpha=16.0))])
adapters = init(key, params, specs)        # {path: adapter}, the only thing that trains
weights  = attach(params, adapters)        # the tree of params, with Weights at these paths
merged   = merge(params, adapters)         # plain arrays again
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from lora_jax import tree
from lora_jax.adapters import Method
from lora_jax.axes import Axes
from lora_jax.weights import Adapted, Pruned, Weight, is_weight, materialize

PyTree = Any


def init(
  key: jax.Array,
  params: PyTree,
  specs: Mapping[str, Method],
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, Adapted]:
  """Returns fresh adapters, `{path: adapter}`; float32, whatever the base's dtype is.

  Each leaf's random key comes from `key` and a hash of its path, so that a change of the targets
  does not change another leaf's start.

  Args:
    key: a random key.
    params: the base. Only shapes are read of it, so `jax.ShapeDtypeStruct`s will do, unless the
      method starts from the values (PiSSA, OLoRA, DoRA).
    specs: what `match` returned.
    axes: what `trace_axes` found. Kernels of two axes (in, out) do not need it.

  Raises:
    ValueError: when a rank exceeds its kernel's, or a kernel of more than two axes has no roles.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  return {
    path: spec.init(
      key_of(key, path),
      path,
      leaves[path],
      roles_of(spec, path, leaves[path], axes),
    )
    for path, spec in specs.items()
  }


def attach(params: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """The tree of `params` with a Weight at the path of every adapter.

  A pruned leaf stays pruned: its adapter goes inside its mask.

  Raises:
    ValueError: when an adapter does not fit its leaf, or would drop inputs of a pruned one.
  """
  leaves = _targets(params, adapters)
  weights = {path: _attached(leaves[path], adapter, path) for path, adapter in adapters.items()}
  return tree.map_with_path(lambda path, leaf: weights.get(path, leaf), params, is_leaf=is_weight)


def detach(weights: PyTree, adapters: Iterable[str]) -> dict[str, Adapted]:
  """The adapters as they stand in a tree that was trained: `detach(attach(p, x), x) == x`.

  Args:
    weights: a tree that `attach` made, its arrays perhaps changed since.
    adapters: their paths, or the adapters themselves as they were attached.

  Raises:
    ValueError: when a path has no leaf, or one without an adapter.
  """
  leaves = _targets(weights, adapters)
  adapted = {path: _unmasked(leaves[path]) for path in adapters}
  for path, leaf in adapted.items():
    if not isinstance(leaf, Adapted):
      raise ValueError(f"{path}: has no adapter; detach takes the tree that attach made")
  return {path: leaf.detach() for path, leaf in adapted.items()}


def merge(params: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """Plain arrays that compute what `attach(params, adapters)` does.

  Computed in float32 and rounded once to each leaf's dtype.
  """
  return materialize(attach(params, adapters))


def unmerge(merged: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """The base of a merge: `unmerge(merge(params, adapters), adapters)` is params, to rounding."""
  leaves = _targets(merged, adapters)
  base = {path: adapter.unmerge(leaves[path], path) for path, adapter in adapters.items()}
  return tree.map_with_path(lambda path, leaf: base.get(path, leaf), merged, is_leaf=is_weight)


def trainable_mask(weights: PyTree, also: Iterable[str] = ()) -> PyTree:
  """Says what trains: a tree of bools, leaf by leaf, as `optax.masked` and `partition` take it.

  Args:
    weights: a tree with Weights; what trains of each is for its kind to say (A and B of a LowRank).
    also: patterns of further leaves, trained in full (heads, norms, biases). A pattern is a regular
      expression for the whole path.

  Raises:
    ValueError: when a pattern matches no leaf, or one that is a Weight, or is none.
  """
  leaves = tree.flatten(weights, is_leaf=is_weight)
  full = set()
  for pattern in also:
    hits = tree.matching(pattern, leaves)
    if not hits:
      raise ValueError(f"the pattern {pattern!r} of leaves to train in full matches no leaf")
    for path in hits:
      if is_weight(leaves[path]):
        raise ValueError(f"{path}: is adapted, and {pattern!r} asks to train it in full; choose")
    full.update(hits)
  return tree.map_with_path(
    lambda path, leaf: leaf.trainable() if is_weight(leaf) else path in full,
    weights,
    is_leaf=is_weight,
  )


def with_dropout(weights: PyTree, key: jax.Array) -> PyTree:
  """The weights dropping inputs of their adapters, for one training step.

  Each weight whose spec says `dropout` drops that share, by `key` and a hash of its path; without
  this call nothing is dropped. `weights` is what `attach` made, or `join` in the step.
  """

  def dropping(path, leaf):
    if isinstance(leaf, Adapted) and leaf.drops:
      return leaf.with_dropout(key_of(key, path))
    return leaf

  return tree.map_with_path(dropping, weights, is_leaf=is_weight)


def _attached(leaf: Any, adapter: Adapted, path: str) -> Weight:
  if not isinstance(leaf, Pruned):
    return adapter.attach(leaf, path)
  if adapter.drops:
    raise ValueError(
      f"{path}: is pruned, and its adapter is used inside the mask, as a sum that has no thin "
      "factors whose inputs could be dropped; set its dropout to 0"
    )
  return dataclasses.replace(leaf, w=adapter.attach(leaf.w, path))


def _unmasked(leaf: Any) -> Any:
  return leaf.w if isinstance(leaf, Pruned) else leaf


def _targets(params: PyTree, adapters: Iterable[str]) -> dict[str, Any]:
  leaves = tree.flatten(params, is_leaf=is_weight)
  missing = sorted(set(adapters) - set(leaves))
  if missing:
    raise ValueError(f"the tree has no leaf at {', '.join(missing)}, for which there is an adapter")
  return leaves


def roles_of(spec: Method, path: str, leaf, axes: Mapping[str, Axes] | None) -> str:
  """The roles of a leaf's axes: what was traced, or (in, out) for two axes.

  Empty for a method that needs none.

  Raises:
    ValueError: when neither says it.
  """
  if not spec.NEEDS_ROLES:
    return ""
  if axes is not None and axes[path].roles:
    return axes[path].roles
  if len(leaf.shape) == 2:
    return "io"
  found = "the function that was traced contracts none of them" if axes else "the shape does not"
  raise ValueError(
    f"{path}: which of the axes of {tuple(leaf.shape)} are inputs, outputs or stacked layers? "
    f"{found} say it; pass axes=lora_jax.trace_axes(f, params, *example)"
  )


def key_of(key: jax.Array, path: str) -> jax.Array:
  """A leaf's own random key, by a hash of its path: the same whatever the other leaves are."""
  hashed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
  return jax.random.fold_in(key, hashed)
