"""Leaves that a task adds to a model: a classification head and its other leaves.

Kernels are initialized from a normal distribution with standard deviation 0.02, transformers'
initializer_range; biases from zero.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lora_jax import families
from lora_jax.attachment import key_of
from lora_jax.checks import shown
from lora_jax.io.pretrained import Pretrained

PyTree = Any
Start = Callable[[str, tuple[int, ...], jax.Array], jax.Array]

HEAD = "head/kernel"
_DEVIATION = 0.02


def labels_of(task: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the class names of a config; raises ValueError for fewer than two, or a duplicate."""
  labels = tuple(task["labels"])
  if len(labels) < 2 or len(set(labels)) < len(labels):
    raise ValueError(f"task.labels {shown(labels)}: give two or more different names")
  return labels


def add(found: Pretrained, key: jax.Array, classes: Sequence[str]) -> Pretrained:
  """Returns the model with a new classification head; shapes if `found` has shapes.

  A model that has a head of these very classes, in this order, keeps it.

  Args:
    found: the model.
    key: a random key for the new leaves.
    classes: the names of the head's outputs.
  """
  config = found.family.with_classes(found.config, tuple(classes))
  if config == found.config:
    return found
  return replace(found, found.family, config, key, _start)


def replace(
  found: Pretrained, family: families.Family, config: families.Config, key: jax.Array, start: Start
) -> Pretrained:
  """Returns the model as one of another configuration, whose head is new.

  Args:
    found: the model, or its shapes.
    family, config: of the result; its parameters outside of the head are those of `found`.
    key: a random key for the new leaves.
    start: `(path, shape, key) -> values` of a new leaf.
  """
  known = {config.family: family}
  body = families.param_shapes(dataclasses.replace(config, classes=()), known)
  shapes = families.param_shapes(config, known)
  new = {
    path: shape for path, shape in shapes.items() if path.startswith("head/") or path not in body
  }

  def make() -> dict[str, jax.Array]:
    return {path: start(path, shape, key).astype(config.param_dtype) for path, shape in new.items()}

  is_shape = isinstance(jax.tree.leaves(found.params)[0], jax.ShapeDtypeStruct)
  leaves = jax.eval_shape(make) if is_shape else make()
  added = traverse_util.unflatten_dict(leaves, sep="/")
  wanted = {path.partition("/")[0] for path in shapes}  # a model may have had two heads
  kept = {name: x for name, x in found.params.items() if name in wanted and name not in added}
  return dataclasses.replace(found, family=family, config=config, params=kept | added)


def _start(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
  if not path.endswith("/kernel"):
    return jnp.zeros(shape)
  return _DEVIATION * jax.random.normal(key if path == HEAD else key_of(key, path), shape)
