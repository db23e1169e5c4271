"""From a tree of parameters to a tree of Weights and back: init, attach, detach, merge, unmerge.

specs    = match(params, [("all-linear", LoRA(rank=8, alpha=16.0))])
adapters = init(key, params, specs)        # {path: adapter}, the only thing that trains
weights  = attach(params, adapters)        # the tree of params, with Weights at these paths
merged   = merge(params, adapters)         # plain arrays again

Adapters are sealed when `init`, `detach` and `exchange.load` return them: the parts that do not
train (A of LoRA-FA, the matrices of VeRA, the norms of DoRA, the start of PiSSA) are no leaves of
the tree. So no optimizer moves them, weight decay or not, and its state holds nothing for them.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks, tree
from lora_jax.adapters import Method
from lora_jax.axes import Axes, candidates, convolution_roles
from lora_jax.targets import axes_of
from lora_jax.weights import Adapted, Full, Pruned, Weight, is_weight, materialize

PyTree = Any


def init(
  key: jax.Array,
  params: PyTree,
  specs: Mapping[str, Method],
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, Adapted]:
  """Returns fresh adapters, `{path: adapter}`, sealed; float32, whatever the base's dtype is.

  Each leaf's random key comes from `key` and a hash of its path, so that a change of the targets
  does not change another leaf's start.

  In a traced function, as under `jit` or `eval_shape`, what does not train has no value to seal:
  there the adapters are as `unseal` makes them.

  Args:
    key: a random key.
    params: the base. Only shapes are read of it, so `jax.ShapeDtypeStruct`s will do, unless the
      method starts from the values (PiSSA, OLoRA, DoRA).
    specs: what `match` returned.
    axes: what `trace_axes` found; by default what `match` was given. Kernels of two axes (in, out)
      and those of convolutions (see `axes.convolution_roles`) do not need it.

  Raises:
    TypeError: when a spec is none (its class, for example).
    ValueError: when a rank exceeds its kernel's, a kernel of more than two axes has no roles, there
      is no leaf at a path, or the axes are those of another tree.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  checks.by_path(specs, Method, "spec", leaves)
  axes = axes_of(specs, axes, leaves)
  return {
    path: spec.init(
      key_of(key, path),
      path,
      leaves[path],
      roles_of(spec, path, leaves, axes),
    ).seal()
    for path, spec in specs.items()
  }


def seal(tree: PyTree) -> PyTree:
  """The tree with its adapters sealed: their parts that do not train are no leaves of it."""
  return _adapters_mapped(lambda adapter: adapter.seal(), tree)


def unseal(tree: PyTree) -> PyTree:
  """The tree with all parts of its adapters among the leaves, those that do not train too.

  It is for whatever looks at the leaves and needs all of them: an Orbax checkpoint (which refuses a
  sealed tree), a sharding, a stack of adapters that differ in parts that do not train.

      checkpointer.save(folder, lora_jax.unseal(adapters))
      like = jax.eval_shape(lambda: lora_jax.unseal(lora_jax.init(key, params, specs)))
      adapters = lora_jax.seal(checkpointer.restore(folder, like))

  Args:
    tree: adapters, or any tree that has some, as the state of an optimizer.
  """
  return _adapters_mapped(lambda adapter: adapter.unseal(), tree)


def attach(params: PyTree, adapters: Mapping[str, Adapted]) -> PyTree:
  """The tree of `params` with a Weight at the path of every adapter.

  A pruned leaf stays pruned: its adapter goes inside its mask.

  Raises:
    ValueError: when an adapter does not fit its leaf, or would drop inputs of a pruned one.
  """
  leaves = _targets(params, adapters)
  weights = {path: _attached(leaves[path], adapter, path) for path, adapter in adapters.items()}
  return tree.map_with_path(lambda path, leaf: weights.get(path, leaf), params, is_leaf=is_weight)


def detach(
  weights: PyTree, adapters: Iterable[str], params: PyTree | None = None
) -> dict[str, Adapted]:
  """The adapters as they stand in a tree that was trained, sealed: `detach(attach(p, x), x) == x`.

  Args:
    weights: a tree that `attach` made, its arrays perhaps changed since.
    adapters: their paths, or the adapters themselves as they were attached.
    params: the base. With it a leaf that is not adapted, but trained in full, is returned as well,
      as a `Full`: `merge(params, detach(weights, adapters, params))` is `materialize(weights)`.

  Raises:
    ValueError: when a path has no leaf, or one without an adapter; when something that trains would
      be dropped: an adapter that is not asked for, or, without params, a leaf that
      `trainable_mask(also=...)` trains in full.
  """
  leaves = _targets(weights, adapters)
  adapted = {path: _unmasked(leaves[path]) for path in adapters}
  for path, leaf in adapted.items():
    if not isinstance(leaf, Adapted):
      raise ValueError(f"{path}: has no adapter; detach takes the tree that attach made")
  for path, leaf in leaves.items():
    if path not in adapted and is_weight(leaf) and jax.tree.reduce(bool.__or__, leaf.trainable()):
      raise ValueError(
        f"{path}: has an adapter that would be dropped; ask for it too, or merge it into the base"
      )
  in_full = sorted({path for leaf in adapted.values() for path in leaf.trained_beside})
  if params is None and in_full:
    raise ValueError(
      f"{', '.join(in_full)}: trained in full, and would be dropped; pass the base as well, "
      "detach(weights, adapters, params), which returns each as a Full, or materialize(weights)"
    )
  found = {path: leaf.detach().seal() for path, leaf in adapted.items()}
  return found if params is None else found | _trained_in_full(leaves, params, in_full)


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
      expression for the whole path. A tree that is partitioned by the mask and joined again knows
      of them, so that `detach` does not drop them without a word.

  Raises:
    TypeError: when `also` is one string, and not a list of them.
    ValueError: when a pattern matches no leaf, or one that is a Weight, or is none.
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
  """The weights dropping inputs of their adapters, for one training step.

  Each weight whose spec says `dropout` drops that share, by `key` and a hash of its path; without
  this call nothing is dropped. `weights` is what `attach` made, or `join` in the step.
  """

  def dropping(path, leaf):
    if isinstance(leaf, Adapted) and leaf.drops:
      return leaf.with_dropout(key_of(key, path))
    return leaf

  return tree.map_with_path(dropping, weights, is_leaf=is_weight)


def _adapters_mapped(f: Callable[[Adapted], Adapted], tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: f(x) if isinstance(x, Adapted) else x, tree, is_leaf=is_weight)


def _attached(leaf: Any, adapter: Adapted, path: str) -> Weight:
  if not isinstance(leaf, Pruned):
    return adapter.attach(leaf, path)
  if adapter.drops:
    raise ValueError(
      f"{path}: is pruned, and its adapter is used inside the mask, as a sum that has no thin "
      "factors whose inputs could be dropped; set its dropout to 0"
    )
  return dataclasses.replace(leaf, w=adapter.attach(leaf.w, path))


def _mask(leaf: Weight, in_full: set[str]) -> Weight:
  mask = leaf.trainable()
  if isinstance(mask, Pruned) and is_weight(mask.w):
    return dataclasses.replace(mask, w=_mask(leaf.w, in_full))
  if isinstance(mask, Adapted):
    return dataclasses.replace(mask, trained_beside=tuple(sorted(in_full)))
  return mask


def _trained_in_full(
  leaves: Mapping[str, Any], params: PyTree, declared: Iterable[str]
) -> dict[str, Full]:
  """The leaves that are no Weights and not those of the base, as changes of the base.

  In a traced function there are no values to compare, and what the mask declared decides.
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


def _unmasked(leaf: Any) -> Any:
  return leaf.w if isinstance(leaf, Pruned) else leaf


def _targets(params: PyTree, adapters: Iterable[str]) -> dict[str, Any]:
  leaves = tree.flatten(params, is_leaf=is_weight)
  missing = sorted(set(adapters) - set(leaves))
  if missing:
    raise ValueError(f"the tree has no leaf at {', '.join(missing)}, for which there is an adapter")
  return leaves


def roles_of(
  spec: Method, path: str, leaves: Mapping[str, Any], axes: Mapping[str, Axes] | None
) -> str:
  """The roles of a leaf's axes: what was traced, (in, out) for two axes, or a convolution's.

  Empty for a method that needs none.

  Args:
    spec: the method.
    path: the leaf's.
    leaves: all leaves of the tree, by path.
    axes: what `trace_axes` found, of the same tree (`axes_of` checks it), or None.

  Raises:
    ValueError: when none of these says it; with the possible roles.
  """
  if not spec.NEEDS_ROLES:
    return ""
  shape = tuple(leaves[path].shape)
  traced = "" if axes is None else axes[path].roles
  if traced and len(traced) != len(shape):
    raise ValueError(
      f"{path}: its shape is {shape}, and the axes {traced!r} were traced for another; call "
      "lora_jax.trace_axes with the same tree"
    )
  roles = traced or ("io" if len(shape) == 2 else convolution_roles(path, leaves))
  if roles:
    return roles
  found = "the shape does not say it" if axes is None else f"the trace says: {axes[path].reason}"
  raise ValueError(
    f"{path}: which of the axes of {shape} are inputs, outputs or stacked layers? {found}; pass "
    "axes=lora_jax.trace_axes(f, params, *example), with an f that multiplies by this leaf. "
    f"It may have the roles {candidates(shape)}"
  )


def key_of(key: jax.Array, path: str) -> jax.Array:
  """A leaf's own random key, by a hash of its path: the same whatever the other leaves are."""
  hashed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
  return jax.random.fold_in(key, hashed)
