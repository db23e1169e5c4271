"""Leaves that a task adds to a model: a head of classes, and what else only a head has.

A kernel starts from a key by a normal distribution of 0.02, as transformers' initializer_range, a
bias from zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lora_jax import families
from lora_jax.checks import shown
from lora_jax.io.pretrained import Pretrained
from lora_jax.transform import key_of

PyTree = Any

HEAD = "head/kernel"
_DEVIATION = 0.02


def labels_of(task: Mapping[str, Any]) -> tuple[str, ...]:
  """The names of a config's classes; ValueError where there are too few or one comes twice."""
  labels = tuple(task["labels"])
  if len(labels) < 2 or len(set(labels)) < len(labels):
    raise ValueError(f"task.labels {shown(labels)}: give two or more different names")
  return labels


def add(found: Pretrained, key: jax.Array, classes: Sequence[str]) -> Pretrained:
  """The model with a new head of classes in place of its own; of shapes, their shapes.

  Args:
    found: the model.
    key: of the new leaves.
    classes: the names of the head's outputs.
  """
  config = found.family.with_classes(found.config, tuple(classes))
  known = {config.family: found.family}
  body = families.param_shapes(dataclasses.replace(config, classes=()), known)
  shapes = families.param_shapes(config, known)
  new = {
    path: shape for path, shape in shapes.items() if path.startswith("head/") or path not in body
  }

  def start() -> dict[str, jax.Array]:
    return {
      path: _start(path, shape, key).astype(config.param_dtype) for path, shape in new.items()
    }

  is_shape = isinstance(jax.tree.leaves(found.params)[0], jax.ShapeDtypeStruct)
  leaves = jax.eval_shape(start) if is_shape else start()
  added = traverse_util.unflatten_dict(leaves, sep="/")
  wanted = {path.partition("/")[0] for path in shapes}  # a model may have had two heads
  kept = {name: x for name, x in found.params.items() if name in wanted and name not in added}
  return dataclasses.replace(found, config=config, params=kept | added)


def _start(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
  if not path.endswith("/kernel"):
    return jnp.zeros(shape)
  return _DEVIATION * jax.random.normal(key if path == HEAD else key_of(key, path), shape)
