"""Data-parallel training by `jax.pmap`: one program, with different rows on every device.

    train_step = make_pmap_train_step(objective, tx)
    state, frozen = replicate((state, frozen))
    state, metrics = train_step(state, frozen, split(batch))
    metrics, state = first(metrics), first(state)

For users of `pmap`, or of code that is written for it. `jax.pmap` has been in maintenance mode
since JAX 0.8, and JAX recommends `jax.jit` with shardings (`lora_jax.sharding`) for new code, which
also shards the base. The step here keeps a whole copy of the base on every device. Both compute the
same losses.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from lora_jax.train.step import Batch, Objective, make_update

PyTree = Any

_AXIS = "devices"


def make_pmap_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  parts: int = 1,
  dropout_key: jax.Array | None = None,
) -> Callable:
  """Makes the step `(state, frozen, batch) -> (state, metrics)` over all local devices.

  Every array has a leading axis of devices: `replicate` adds it to the state and the frozen
  weights, and `split` to the batch. The applied gradient is that of the whole batch, the devices'
  gradients weighted by their tokens. The state is donated.

  Args and metrics: those of `lora_jax.train.step.make_train_step`.
  """
  update = make_update(objective, tx, parts=parts, dropout_key=dropout_key, axis_name=_AXIS)
  return jax.pmap(update, axis_name=_AXIS, donate_argnums=0)


def replicate(params: PyTree) -> PyTree:
  """The tree with a copy of every array on every local device, along a new leading axis."""
  devices = jax.local_devices()
  sharding = NamedSharding(Mesh(np.array(devices), (_AXIS,)), jax.P(_AXIS))

  def copies(x: jax.Array) -> jax.Array:
    each = [jax.device_put(x[None], device) for device in devices]
    return jax.make_array_from_single_device_arrays((len(devices), *x.shape), sharding, each)

  return jax.tree.map(copies, params)


def split(batch: Batch) -> Batch:
  """Returns the batch with its rows split along a leading axis of local devices.

  Raises:
    ValueError: if the rows are not a multiple of the devices.
  """
  devices = jax.local_device_count()

  def blocks(x: np.ndarray) -> np.ndarray:
    if x.shape[0] % devices:
      raise ValueError(
        f"a batch of {x.shape[0]} rows cannot be divided over {devices} devices; "
        f"use a multiple of {devices}"
      )
    return x.reshape(devices, -1, *x.shape[1:])

  return jax.tree.map(blocks, batch)


def first(params: PyTree) -> PyTree:
  """Returns the first device's copy of the tree, without the leading axis."""
  return jax.tree.map(lambda x: x.addressable_shards[0].data[0], params)
