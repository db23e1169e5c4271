"""Statements about several processes, each called by all of them:

python -m experiments.launch --processes=2 -- processes_worker FOLDER STATEMENT...

Each process has two devices. The names of the statements that hold are printed by the first.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from experiments import processes
from lora_jax import sharding, tree
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.step import State

MESHES = [(4, 1, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)]


def make_mesh(sizes):
  return sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))


def a_state(mesh):
  """A State whose arrays lie in every way on the devices of both processes."""
  key = jax.random.key(0)
  arrays = {
    "rows": (jax.random.normal(key, (64, 64)), jax.P(("data", "fsdp"))),
    "columns": (jax.random.normal(key, (6, 8)).astype(jnp.bfloat16), jax.P(None, "tensor")),
    "whole": (jnp.arange(5), jax.P()),
  }
  placed = {
    name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in arrays.items()
  }
  step = jax.device_put(jnp.int32(3), NamedSharding(mesh, jax.P()))
  values = {name: np.asarray(x) for name, (x, _) in arrays.items()}
  return State(step, placed, {"mu": placed["rows"]}), values


def each_process_reads_its_own_rows_and_together_they_are_the_batch(_):
  batch = np.arange(8 * 3).reshape(8, 3)
  for sizes in MESHES:
    mesh = make_mesh(sizes)
    index, count = sharding.process_rows(mesh, 8)
    assert count == min(2, sizes[0] * sizes[1])
    rows = batch.reshape(count, -1, 3)[index]
    placed = sharding.put_rows({"tokens": rows}, mesh)["tokens"]
    assert placed.shape == (8, 3)
    np.testing.assert_array_equal(sharding.gather(placed), batch)


def a_mesh_that_leaves_devices_of_some_process_unused_is_refused(_):
  try:
    sharding.make_mesh(data=2, fsdp=1, tensor=1)
  except ValueError as error:
    assert "data 2 x fsdp 1 x tensor 1 does not fit the 4 devices of 2 processes" in str(error)
  else:
    raise AssertionError("not refused")


def what_one_mesh_saved_another_restores_bit_for_bit(folder):
  state, values = a_state(make_mesh((2, 1, 2)))
  with Checkpoints(folder, keep=2, fingerprint="f") as checkpoints:
    checkpoints.save(state, {"position": 7})
  like, _ = a_state(make_mesh((1, 4, 1)))
  with Checkpoints(folder, keep=2, fingerprint="f") as checkpoints:
    restored = checkpoints.restore(like)
  assert restored.data_state == {"position": 7}
  assert int(restored.state.step) == 3
  for path, leaf in tree.flatten(restored.state).items():
    assert leaf.sharding == tree.flatten(like)[path].sharding, path
  whole = sharding.gather(restored.state.trainable)
  for name, value in values.items():
    assert whole[name].tobytes() == value.tobytes(), name


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def what_one_process_finds_damaged_all_pass_over_for_the_one_before(folder):
  for sizes in [(2, 1, 2), (1, 4, 1)]:  # the second has shards that only one process reads
    for damage in (flip, truncate, pathlib.Path.unlink):
      passed_over(folder / f"{sizes}_{damage.__name__}", sizes, damage)


def passed_over(folder, sizes, damage):
  state, values = a_state(make_mesh(sizes))
  with Checkpoints(folder, keep=2, fingerprint="f") as checkpoints:
    checkpoints.save(state, {"position": 1})
    checkpoints.save(state._replace(step=state.step + 1), {"position": 2})
  if processes.is_first():
    files = [path for path in (folder / "4/state").rglob("d/*") if path.is_file()]
    written = [path for path in files if "process_1" in str(path)]
    damage(max(written or files, key=lambda path: path.stat().st_size))
  multihost_utils.sync_global_devices("damaged")
  with Checkpoints(folder, keep=2, fingerprint="f") as checkpoints:
    restored = checkpoints.restore(state)
  assert restored.data_state == {"position": 1}
  assert (folder / "damaged-4").is_dir()
  whole = sharding.gather(restored.state.trainable)
  assert whole["rows"].tobytes() == values["rows"].tobytes()


def main(argv):
  processes.join()
  assert (jax.process_count(), jax.local_device_count()) == (2, 2)
  for name in argv[2:]:
    globals()[name](pathlib.Path(argv[1]) / name)
    print(name, flush=True)


if __name__ == "__main__":
  app.run(main)
