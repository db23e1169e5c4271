"""Loads a model on eight devices, in a process of its own, and prints the memory that it took:
`python loading_worker.py FOLDER`.
"""

import json
import resource
import sys

import jax

from lora_jax import sharding
from lora_jax.io import pretrained


def peak() -> int:
  """The most memory that this process has had so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)

  def shardings(shapes, rules):
    return sharding.lay_out(shapes, mesh, rules).shardings

  before = peak()
  loaded = pretrained.load(sys.argv[1], scan_layers=True, shardings=shardings)
  jax.block_until_ready(loaded.params)
  leaves = jax.tree.leaves(loaded.params)
  held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
  print(json.dumps({"taken": peak() - before, "held": held}))
