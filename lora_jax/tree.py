"""Slash paths over pytrees: the one addressing scheme of the library.

A leaf's path is its keys joined by slashes, for all containers (dicts, FrozenDicts, dataclasses,
NNX states, tuples):

    >>> flatten({"block_0": {"attn": {"query": {"kernel": 1.0}}}})
    {'block_0/attn/query/kernel': 1.0}
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

PyTree = Any


def path_string(key_path: jax.tree_util.KeyPath) -> str:
  """The slash path of a JAX key path."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Returns `{path: leaf}` in the tree's own order.

  Args:
    tree: any pytree.
    is_leaf: stops the descent, as in `jax.tree.leaves`.

  Raises:
    ValueError: if two leaves have the same path, as in {"a/b": 1, "a": {"b": 2}}.
  """
  leaves = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
    path = path_string(key_path)
    if path in leaves:
      raise ValueError(f"{path}: two leaves have this path; rename one of them")
    leaves[path] = leaf
  return leaves


def map_with_path(
  f: Callable[[str, Any], Any], tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> PyTree:
  """Maps `f(path, leaf)` over the tree."""
  return jax.tree_util.tree_map_with_path(
    lambda key_path, leaf: f(path_string(key_path), leaf), tree, is_leaf=is_leaf
  )


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
  """The paths that a regular expression matches as a whole.

  Raises:
    TypeError: if the pattern is not a string.
    ValueError: if the pattern is not a regular expression.
  """
  if not isinstance(pattern, str):
    raise TypeError(f"the pattern {pattern!r} is a {type(pattern).__name__} and not a string")
  try:
    regex = re.compile(pattern)
  except re.error as error:
    raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
  return [path for path in paths if regex.fullmatch(path)]


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  """Returns the tree with new leaves at the given paths.

  Raises:
    ValueError: if the tree has no leaf at one of the paths.
  """
  missing = sorted(set(leaves) - set(flatten(tree)))
  if missing:
    raise ValueError(f"the tree has no leaf at {', '.join(missing)}")
  return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
  """Splits a tree by a mask of bools into (selected, rest), each with None in the other's places.

  None is an empty pytree: `jax.grad`, `optax` and checkpoints see nothing there, so an optimizer
  state for `selected` holds no array for a leaf of `rest`. `join` is the inverse.

  Args:
    tree: any pytree.
    mask: the same structure, or a prefix of it, with bool leaves (e.g. from `trainable_mask`).
  """
  # The mask may be a prefix of the tree, so it is broadcast to the leaves first.
  full = jax.tree.map(lambda m, subtree: jax.tree.map(lambda _: m, subtree), mask, tree)
  selected = jax.tree.map(lambda m, leaf: leaf if m else None, full, tree)
  rest = jax.tree.map(lambda m, leaf: None if m else leaf, full, tree)
  return selected, rest


def join(selected: PyTree, rest: PyTree) -> PyTree:
  """Joins the two parts of a `partition`: `join(*partition(tree, mask)) == tree`."""
  return jax.tree.map(
    lambda s, r: r if s is None else s, selected, rest, is_leaf=lambda leaf: leaf is None
  )
