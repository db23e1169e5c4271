"""Assembles an array on its devices from pieces that are read one at a time.

    array = assemble((30, 576, 1536), jnp.bfloat16, [read_layer_0, read_layer_1, ...], sharding)

Host memory holds one piece, and the shards for this process's devices until they are transferred.
On the CPU backend the shards are not copied.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

_ALIGNMENT = 64  # bytes


def assemble(
  shape: tuple[int, ...],
  dtype: np.dtype,
  pieces: Sequence[Callable[[], np.ndarray]],
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """Returns the array with piece i as its row `array[i]`, or with a single piece as the whole.

  shape, dtype: of the array; a piece of another dtype is cast.
  pieces: functions that read; each is called once, and let go of before the next.
  sharding: of the array, over the devices of all processes; None: on the default device.
  """
  where = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  bounds = {
    device: _bounds(index, shape)
    for device, index in where.addressable_devices_indices_map(shape).items()
  }
  # Devices that hold the same part share one buffer.
  shards = {_key(part): (part, _empty(part, dtype)) for part in bounds.values()}
  for i, read in enumerate(pieces):
    piece = read()
    for part, buffer in shards.values():
      if piece.ndim == len(shape):
        buffer[...] = piece[part]
      elif part[0].start <= i < part[0].stop:
        buffer[i - part[0].start] = piece[part[1:]]
    del piece  # or it would stay while the next one is read
  if sharding is None:
    ((_, buffer),) = shards.values()
    return jax.numpy.asarray(buffer)
  arrays = [jax.device_put(shards[_key(part)][1], device) for device, part in bounds.items()]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
  """The part of an array that is on a device, with the numbers of both its ends."""
  assert index is not None  # every device has a part
  return tuple(slice(*x.indices(size)[:2]) for x, size in zip(index, shape, strict=True))


def _empty(part: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
  """Room for a part, at an address from which the CPU backend takes it over without a copy."""
  shape = [x.stop - x.start for x in part]
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + _ALIGNMENT, np.uint8)
  start = -room.ctypes.data % _ALIGNMENT
  return room[start : start + size].view(dtype).reshape(shape)


def _key(part: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
  return tuple((x.start, x.stop) for x in part)
