"""Heads of classes that a task gives a model: new leaves, which start from the run's seed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lora_jax.checks import shown
from lora_jax.families import Family, param_shapes
from lora_jax.io.pretrained import Pretrained

HEAD = "head/.*"
"""The pattern of a head's leaves."""

_DEVIATION = 0.02  # of the new kernel, as transformers' initializer_range


def labels_of(task: Mapping[str, Any]) -> tuple[str, ...]:
  """The names of a config's classes; ValueError where there are too few or one comes twice."""
  labels = tuple(task["labels"])
  if len(labels) < 2 or len(set(labels)) < len(labels):
    raise ValueError(f"task.labels {shown(labels)}: give two or more different names")
  return labels


def with_head(found: Pretrained, labels: Sequence[str], key: jax.Array) -> Pretrained:
  """The model with a new head of classes in the place of its own; of shapes, their shapes."""
  family: Family = found.family
  config = family.with_classes(found.config, tuple(labels))
  shapes = param_shapes(config, {config.family: family})
  is_shape = isinstance(jax.tree.leaves(found.params)[0], jax.ShapeDtypeStruct)
  head = {}
  for path, shape in shapes.items():
    if not path.startswith("head/"):
      continue

    def start(path: str = path, shape: tuple[int, ...] = shape) -> jax.Array:
      is_kernel = path.endswith("/kernel")
      values = _DEVIATION * jax.random.normal(key, shape) if is_kernel else jnp.zeros(shape)
      return values.astype(config.param_dtype)

    head[path] = jax.eval_shape(start) if is_shape else start()
  own = {path.partition("/")[0] for path in shapes} - {"head"}
  body = {name: x for name, x in found.params.items() if name in own}
  params = body | traverse_util.unflatten_dict(head, sep="/")
  return dataclasses.replace(found, config=config, params=params)
