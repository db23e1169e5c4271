"""From a tree of parameters to a tree of Weights and back: init, attach, detach, merge, unmerge.

specs    = match(params, [("all-linear", LoRA(rank=8, alpha=16.0))])
adapters = init(key, params, specs)        # {path: adapter}, all that trains
weights  = attach(params, adapters)        # the tree of params, with Weights at these paths
merged   = merge(params, adapters)         # plain arrays again

`init`, `detach` and `exchange.load` return sealed adapters: the parts that do not train (A of
LoRA-FA, the matrices of VeRA, the norms of DoRA, the start of PiSSA) are not leaves of the tree. So
no optimizer moves them, not even by weight decay, and its state holds nothing for them.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lora_jax import checks, tree
from lora_jax.adapters import Method
from lora_jax.axes import Axes, roles_of
from lora_jax.targets import axes_of
from lora_jax.weights import (
  Adapted,
  Full,
  Pruned,
  Weight,
  inside_mask,
  is_weight,
  materialize,
  unmasked,
)

PyTree = Any


def init(
  key: jax.Array,
  params: PyTree,
  specs: Mapping[str, Method],
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, Adapted]:
  """Returns fresh adapters, `{path: adapter}`, sealed, in float32 for any dtype of the base.

  Each leaf's random key comes from `key` and a hash of its path, so a change of the targets does
  not change the start of other leaves.

  In a traced function, such as under `jit` or `eval_shape`, untrained parts have no values to seal.
  The adapters are then unsealed, as `unseal` returns them.

  Args:
    key: a random key.
    params: the base. Only its shapes are read, so `jax.ShapeDtypeStruct`s suffice, unless the
      method starts from the values (PiSSA, OLoRA, DoRA).
    specs: the result of `match`.
    axes: the result of `trace_axes`; by default the axes that `match` was given. Kernels of two
      axes (in, out) and those of convolutions (see `axes.convolution_roles`) do not need it.

  Raises:
    TypeError: if a spec is not a spec (its class, for example).
    ValueError: if a rank exceeds its kernel's, a kernel of more than two axes has no roles, there
      is no leaf at a path, the axes are those of another tree, or a function of its own makes the
      method's adapters (EVA, LoftQ).
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(specs, Method, "spec", leaves)
  for path, spec in specs.items():
    if spec.STARTED_BY:
      raise ValueError(
        f"{path}: {type(spec).__name__} starts from more than the base; make its adapters by "
        f"{spec.STARTED_BY}"
      )
  axes = axes_of(specs, axes, leaves)
  return {
    path: spec.init(
      key_of(key, path),
      path,
      leaves[path],
      roles_of(path, leaves, axes) if spec.NEEDS_ROLES else "",
    ).seal()
    for path, spec in specs.items()
  }


def seal(tree: PyTree) -> PyTree:
  """Returns the tree with sealed adapters: parts that do not train are not among the leaves."""
  return _adapters_mapped(lambda adapter: adapter.seal(), tree)


def unseal(tree: PyTree) -> PyTree:
  """Returns the tree with all parts of its adapters among the leaves, including untrained ones.

  Use it where all parts are needed as leaves: for an Orbax checkpoint (which refuses a sealed
  tree), a sharding, a stack of adapters that differ in parts that do not train.

      checkpointer.save(folder, lora_jax.unseal(adapters))
      like = jax.eval_shape(lambda: lora_jax.unseal(lora_jax.init(key, params, specs)))
      adapters = lora_jax.seal(checkpointer.restore(folder, like))

  Args:
    tree: adapters, or any tree that contains some, such as an optimizer's state.
  """
  return _adapters_mapped(lambda adapter: adapter.unseal(), tree)


def attach(params: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """Returns the tree of `params` with a Weight at the path of every adapter.

  A pruned leaf stays pruned: its adapter goes inside its mask.

  Args:
    params: the base.
    adapters: `{path: adapter}`.

  Raises:
    ValueError: if an adapter does not fit its leaf, or if it has dropout and its leaf is pruned.
  """
  leaves = _targets(params, adapters)
  weights = {path: _attached(leaves[path], adapter, path) for path, adapter in adapters.items()}
  return tree.map_with_path(lambda path, leaf: weights.get(path, leaf), params, is_leaf=is_weight)


def detach(
  weights: PyTree, adapters: Iterable[str], params: PyTree | None = None
) -> dict[str, Adapted]:
  """Extracts the adapters from a trained tree, sealed: `detach(attach(p, x), x) == x`.

  Args:
    weights: a tree that `attach` returned, perhaps trained since.
    adapters: their paths, or the adapters themselves as they were attached.
    params: the base. With it, a leaf without an adapter that was trained in full is returned as a
      `Full` as well: `merge(params, detach(weights, adapters, params))` is `materialize(weights)`.

  Raises:
    ValueError: if there is no leaf or no adapter at a path, or if trained values would be dropped:
      an adapter that is not requested or, without params, a leaf that `trainable_mask(also=...)`
      trains in full.
  """
  leaves = _targets(weights, adapters)
  adapted = {path: unmasked(leaves[path]) for path in adapters}
  for path, leaf in adapted.items():
    if not isinstance(leaf, Adapted):
      raise ValueError(f"{path}: has no adapter; detach takes the tree that attach made")
  for path, leaf in leaves.items():
    if path not in adapted and is_weight(leaf) and jax.tree.reduce(bool.__or__, leaf.trainable()):
      raise ValueError(
        f"{path}: has an adapter that would be dropped; request it too, or merge it into the base"
      )
  in_full = sorted({path for leaf in adapted.values() for path in leaf.trained_beside})
  if params is None and in_full:
    raise ValueError(
      f"{', '.join(in_full)}: trained in full, and would be dropped; pass the base as well, "
      "detach(weights, adapters, params), which returns each as a Full, or materialize(weights)"
    )
  found: dict[str, Adapted] = {path: leaf.detach().seal() for path, leaf in adapted.items()}
  return found if params is None else found | _trained_in_full(leaves, params, in_full)


def merge(params: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """Returns plain arrays that compute the same as `attach(params, adapters)`.

  Computed in float32 and rounded once to each leaf's dtype.
  """
  return materialize(attach(params, adapters))


def unmerge(merged: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """Inverts `merge` up to rounding: `unmerge(merge(params, adapters), adapters)` is params."""
  leaves = _targets(merged, adapters)
  base = {path: adapter.unmerge(leaves[path], path) for path, adapter in adapters.items()}
  return tree.map_with_path(lambda path, leaf: base.get(path, leaf), merged, is_leaf=is_weight)


def trainable_mask(weights: PyTree, also: Iterable[str] = ()) -> PyTree:
  """Returns a tree of bools, True for leaves that train, for `optax.masked` and `partition`.

  Args:
    weights: a tree with Weights. The kind of a Weight says which parts train (a LowRank's A and B).
    also: patterns of further leaves, trained in full (heads, norms, biases). A pattern is a regular
      expression for the whole path. A tree that is partitioned by the mask and joined again
      remembers these leaves, so that `detach` does not drop them silently.

  Raises:
    TypeError: if `also` is a string instead of a list of strings.
    ValueError: if a pattern is invalid, matches no leaf, or matches a Weight.
  """
  if isinstance(also, str):
    raise TypeError(f"also={also!r} is one pattern; give a list of them, [{also!r}]")
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
    lambda path, leaf: _mask(leaf, full) if is_weight(leaf) else path in full,
    weights,
    is_leaf=is_weight,
  )


def with_dropout(weights: PyTree, key: jax.Array) -> PyTree:
  """Returns the weights with dropout for one training step.

  Each weight whose spec sets `dropout` drops that fraction, by `key` and a hash of its path;
  without this call nothing is dropped.

  Args:
    weights: the result of `attach`, or of `join` in the step.
    key: a random key for this step.
  """

  def dropping(path, leaf):
    if isinstance(leaf, Adapted) and leaf.drops:
      return leaf.with_dropout(key_of(key, path))
    return leaf

  return tree.map_with_path(dropping, weights, is_leaf=is_weight)


def _adapters_mapped(f: Callable[[Adapted], Adapted], tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: f(x) if isinstance(x, Adapted) else x, tree, is_leaf=is_weight)


def _attached(leaf: Any, adapter: Adapted, path: str) -> Weight:
  if adapter.drops and unmasked(leaf) is not leaf:
    raise ValueError(
      f"{path}: is pruned, so its adapter is used inside the mask, as a sum without thin factors "
      "whose inputs could be dropped; set its dropout to 0"
    )
  return inside_mask(lambda w: adapter.attach(w, path), leaf)


def _mask(leaf: Weight, in_full: set[str]) -> Weight:
  mask = leaf.trainable()
  if isinstance(leaf, Pruned) and is_weight(leaf.w):
    return dataclasses.replace(mask, w=_mask(leaf.w, in_full))
  if isinstance(mask, Adapted):
    return dataclasses.replace(mask, trained_beside=tuple(sorted(in_full)))
  return mask


def _trained_in_full(
  leaves: Mapping[str, Any], params: PyTree, declared: Iterable[str]
) -> dict[str, Adapted]:
  """The leaves that are not Weights and differ from the base, as changes of the base.

  In a traced function there are no values to compare, so the declaration of the mask decides.
  """
  base = tree.flatten(params, is_leaf=is_weight)

  def differs(path: str, leaf: Any) -> bool:
    if is_weight(leaf) or leaf is base[path] or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return False
    if any(isinstance(x, jax.core.Tracer) for x in (leaf, base[path])):
      return path in declared
    return not np.array_equal(leaf, base[path], equal_nan=True)

  return {
    path: Full(w=None, dw=leaf.astype(jnp.float32) - base[path].astype(jnp.float32))
    for path, leaf in leaves.items()
    if differs(path, leaf)
  }


def _targets(params: PyTree, adapters: Iterable[str]) -> dict[str, Any]:
  leaves = tree.flatten(params, is_leaf=is_weight)
  missing = sorted(set(adapters) - set(leaves))
  if missing:
    raise ValueError(f"the tree has no leaf at {', '.join(missing)}, for which there is an adapter")
  return leaves


def key_of(key: jax.Array, path: str) -> jax.Array:
  """A leaf's own random key, from a hash of its path; independent of the other leaves."""
  hashed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
  return jax.random.fold_in(key, hashed)
