"""`python -m benchmarks.tpu`: its steps by shapes, its table, and one compiled step."""

import dataclasses
import importlib.util

import jax
import main_programs
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from experiments import topologies
from lora_jax import sharding

tpu = main_programs.imported("benchmarks.tpu")
TINY = dataclasses.replace(
  tpu.MODELS["1B"],
  vocab_size=256,
  width=128,
  mlp_width=256,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
)
KERNELS = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 128 * 256 * 3)
OTHERS = 256 * 128 + 5 * 128  # the embedding and the norms
FACTORS = 2 * 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
DEVICES = np.array(jax.devices()[:1]).reshape(1, 1, 1)


def bytes_of(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("method", "base", "trained"),
  [
    ("lora", 2 * (KERNELS + OTHERS), FACTORS),
    # Half a byte a value, and its blocks' scales: at most another tenth of a byte.
    ("qlora", KERNELS / 2 + 2 * OTHERS, FACTORS),
    ("full", 2 * (KERNELS + OTHERS), KERNELS + OTHERS),
  ],
)
def test_a_step_has_the_arguments_of_its_method(method, base, trained):
  mesh = Mesh(DEVICES, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  run = tpu.step_on(TINY, method, mesh, 2, 16)
  slack = KERNELS / 10 if method == "qlora" else 0
  assert base <= bytes_of(run.frozen) <= base + slack
  assert sum(x.size for x in jax.tree.leaves(run.state.trainable)) == trained
  assert {x.shape for x in jax.tree.leaves(run.batch)} == {(2, 16)}


def test_the_table_has_a_row_for_each_model_and_method():
  key = {"model": "8B", "method": "lora", "memory": 16e9}
  done = [
    key | {"slice": "v5e-1", "arguments": 16.1e9},
    key | {"slice": "v5e-8", "arguments": 2e9, "peak": 6.25e9},
    key | {"slice": "v5e-16", "arguments": 2e9, "peak": 17e9},
    key | {"slice": "v5e-8", "method": "full", "arguments": 2e9, "peak": None},
  ]
  assert [tpu.outcome(each) for each in done] == [
    "no: arguments 16.1 GB",
    "yes: 6.2 GB",
    "no: 17.0 GB",
    "no: refused",
  ]
  lines = tpu.rows_of(done)
  assert lines == [
    "| model | method | v5e-1, 16.0 GB | v5e-8, 16.0 GB | v5e-16, 16.0 GB |",
    "| --- | --- | --- | --- | --- |",
    "| 8B | lora | no: arguments 16.1 GB | yes: 6.2 GB | no: 17.0 GB |",
    "| 8B | full | – | no: refused | – |",
  ]


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='needs libtpu, the compiler of TPUs: pip install "lora_jax[tpu]"',
)
@pytest.mark.parametrize("name", ["v5e-1", "v5p-64"])
def test_a_step_is_compiled_for_a_slice(name):
  devices = topologies.devices_of(tpu.SLICES[name])
  assert len(devices) == {"v5e-1": 1, "v5p-64": 32}[name]
  found = tpu.measure(TINY, "lora", devices, 1, 64)
  assert found["arguments"] < found["peak"] < found["memory"]
  assert tpu.outcome(found).startswith("yes")
