"""An array put together on its devices from pieces that are read one at a time.

    array = assemble((30, 576, 1536), jnp.bfloat16, [read_layer_0, read_layer_1, ...], sharding)

What is in the host's memory: one piece, and the shards of this array that this process's devices
hold, until they are there.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np


def assemble(
  shape: tuple[int, ...],
  dtype: np.dtype,
  pieces: Sequence[Callable[[], np.ndarray]],
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """Returns the array of which piece i is the row `array[i]`, or of one piece that is all of it.

  shape, dtype: of the array; a piece of another dtype is cast.
  pieces: functions that read; each is called once, and let go of before the next.
  sharding: of the array, over the devices of all processes; None: on the default device.
  """
  where = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  bounds = {
    device: tuple(slice(*x.indices(size)[:2]) for x, size in zip(index, shape, strict=True))
    for device, index in where.addressable_devices_indices_map(shape).items()
  }
  # Devices that hold the same part share one buffer.
  shards = {_key(b): (b, np.empty([x.stop - x.start for x in b], dtype)) for b in bounds.values()}
  for i, read in enumerate(pieces):
    piece = read()
    for part, buffer in shards.values():
      if piece.ndim == len(shape):
        buffer[...] = piece[part]
      elif part[0].start <= i < part[0].stop:
        buffer[i - part[0].start] = piece[part[1:]]
  if sharding is None:
    ((_, buffer),) = shards.values()
    return jax.numpy.asarray(buffer)
  arrays = [jax.device_put(shards[_key(part)][1], device) for device, part in bounds.items()]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _key(part: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
  return tuple((x.start, x.stop) for x in part)
