"""Loading to shards: what is read, and what it takes of the host's memory."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import device_processes
import jax
import numpy as np
import pytest

from lora_jax import sharding, tree
from lora_jax.io import export, pretrained, shards
from lora_jax.models import layers, llama

WORKER = pathlib.Path(__file__).with_name("loading_worker.py")
ROOT = WORKER.parents[2]


def test_one_piece_is_in_memory_beside_the_array():
  piece = np.dtype(np.float32).itemsize * 1024 * 1024
  read = functools.partial(np.ones, (1024, 1024), np.float32)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tracemalloc.start()
  try:
    array = shards.assemble((8, 1024, 1024), np.dtype(np.float32), [read] * 8, place)
    jax.block_until_ready(array)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert 8 * piece < peak < 9 * piece + piece // 4
  np.testing.assert_array_equal(array, 1)


def test_without_a_sharding_the_array_may_be_used_beside_any_other():
  array = shards.assemble((2, 3), np.dtype(np.float32), [lambda: np.ones((2, 3))], None)
  assert array.dtype == np.float32
  assert not array.committed


def test_a_model_is_loaded_to_its_shards_as_it_is_loaded_whole(smollm2):
  one = sharding.make_mesh(data=1, fsdp=1, tensor=1)
  laid_out = []

  def shardings(shapes, rules):
    laid_out.append(sharding.lay_out(shapes, one, rules))
    return laid_out[0].shardings

  loaded = pretrained.load(pretrained.DEFAULT, scan_layers=True, shardings=shardings)
  expected = tree.flatten(layers.stack_layers(smollm2.params))
  leaves = tree.flatten(loaded.params)
  assert leaves.keys() == expected.keys()
  for path, leaf in leaves.items():
    assert leaf.sharding == tree.flatten(laid_out[0].shardings)[path]
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.fixture(scope="module")
def taken(tmp_path_factory, smollm2):
  """For 1 layer and 20: the memory that loading took on eight devices, and what they hold."""

  def measure(layers: int) -> dict[str, int]:
    config = llama.LlamaConfig(
      vocab_size=49152,
      width=64,
      mlp_width=8192,
      num_layers=layers,
      num_heads=4,
      num_kv_heads=4,
      head_dim=16,
      max_length=64,
      tie_embeddings=True,
    )
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    folder = tmp_path_factory.mktemp("model") / "model"
    export.save(folder, params, config, smollm2.tokenizer)
    flags = device_processes.xla_flags("--xla_force_host_platform_device_count=8")
    done = subprocess.run(
      [sys.executable, WORKER, folder],
      capture_output=True,
      text=True,
      timeout=300,
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  return measure(1), measure(20)


@pytest.mark.slow
def test_loading_takes_one_tensor_beside_the_shards(taken):
  small, large = taken  # the difference leaves out the tokenizer and the libraries
  held = large["held"] - small["held"]
  largest_tensor = 4 * 49152 * 64
  assert held > 100e6
  assert large["taken"] - small["taken"] < held + largest_tensor
