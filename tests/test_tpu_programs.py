"""What the compiler of TPUs makes of a training step, for four chips that nobody has here.

A small Llama whose every dimension is another number, so that a shape tells what an array is.
"""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

import lora_jax
from experiments import planning, topologies
from lora_jax import compress, families, hlo, sharding
from lora_jax.models import llama
from lora_jax.models.attention import attend
from lora_jax.models.attention_kernels import Choice
from lora_jax.train import step

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu, the compiler of TPUs: pip install "lora_jax[tpu]"',
  ),
]

LAYERS, ROWS, LENGTH, RANK = 7, 6, 160, 8
CONFIG = llama.LlamaConfig(
  vocab_size=1000,
  width=256,
  mlp_width=640,
  num_layers=LAYERS,
  num_heads=6,
  num_kv_heads=2,
  head_dim=64,
  max_length=256,
  scan_layers=True,
  dtype=jnp.bfloat16,
  param_dtype=jnp.bfloat16,
)
KERNELS = {(256, 384), (256, 128), (256, 640), (384, 256), (640, 256)}
# What a device has of one where two devices share its inputs or its outputs.
CUT = {(a // x, b // y) for a, b in KERNELS for x in (1, 2) for y in (1, 2)}


def either_way(shapes):
  """Shapes and their transposes."""
  return shapes | {shape[::-1] for shape in shapes}


def products(program):
  """The shapes of what matrix products give, axes of one left out, in fusions too."""
  found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:convolution|dot)\(", program)
  return {tuple(int(n) for n in each.split(",") if n and n != "1") for each in found}


def compiled(*, mesh=None, full=False, quantized=False):
  """The text of a step's program: of a mesh of two by two, or of one chip."""
  devices = topologies.devices_of("v5e:2x2")
  model = llama.Llama(dataclasses.replace(CONFIG, attention=Choice(platform="tpu")))
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  if quantized:
    formats = lora_jax.match(params, [("all-linear", compress.NF4)], axes)
    params = compress.quantize(params, formats, axes)
  method = lora_jax.Full() if full else lora_jax.LoRA(rank=RANK, alpha=16.0)
  specs = lora_jax.match(params, [("all-linear", method)], axes)
  adapters = jax.eval_shape(lambda p: lora_jax.init(jax.random.key(0), p, specs, axes), params)
  weights = lora_jax.attach(params, adapters)
  tx = optax.adamw(1e-3)

  if mesh is None:
    everywhere = SingleDeviceSharding(devices[0])
    follow = lambda tree: jax.tree.map(lambda _: everywhere, tree)  # noqa: E731
    weights, rows = planning.placed(weights, follow(weights)), everywhere
  else:
    axis_types = (AxisType.Auto,) * 3
    mesh = Mesh(np.array(devices).reshape(mesh), sharding.AXES, axis_types=axis_types)
    layout = sharding.lay_out(weights, mesh, families.DECODER_SHARDING)
    weights, follow = planning.placed(weights, layout.shardings), layout.follow
    rows = NamedSharding(mesh, sharding.ROWS)
    model = llama.Llama(dataclasses.replace(model.config, constrain=sharding.keep_rows(mesh)))
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  state = jax.eval_shape(lambda x: step.init_state(x, tx), trainable)
  state = planning.placed(state, follow(state))
  at = jax.ShapeDtypeStruct((ROWS, 3), jnp.int32)
  batch = {"tokens": tokens, "at": at, "targets": at, "weights": at.update(dtype=jnp.float32)}
  batch = planning.placed(batch, jax.tree.map(lambda _: rows, batch))
  objective = step.completion_objective(lora_jax.adapt(model.apply))
  return step.make_train_step(objective, tx).lower(state, frozen, batch).compile().as_text()


@pytest.fixture(scope="module")
def on_a_mesh():
  return compiled(mesh=(1, 2, 2))


def test_no_product_has_a_kernels_size(on_a_mesh):
  assert not products(on_a_mesh) & either_way(KERNELS | CUT)
  # The gradients of kernels, where they train themselves, are found by the same search.
  assert products(compiled(full=True)) & either_way(KERNELS)


def test_no_kernel_is_gathered_over_tensor_and_gradients_are_of_adapters_alone(on_a_mesh):
  operations = hlo.collectives(on_a_mesh)

  def shapes(*kinds):
    found = {shape for op in operations if op.kind in kinds for shape in op.shapes}
    return {tuple(n for n in shape if n != 1) for shape in found}

  gathered = shapes("all-gather", "collective-permute")
  assert gathered & either_way(CUT - KERNELS), "the base is gathered over fsdp"
  assert not gathered & either_way(KERNELS)
  reduced = shapes("all-reduce", "reduce-scatter")
  assert not reduced & either_way(KERNELS | CUT)
  assert any(RANK in shape for shape in reduced), "those of the adapters are"
  stacked = {(LAYERS, *shape) for shape in KERNELS | CUT}
  assert not {shape for shape in reduced if len(shape) == 3} & stacked


def floats(program):
  """How many values the arrays of floats have, arguments included."""
  found = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", program)
  return {math.prod(int(n) for n in each.split(",")) for each in found}


def test_one_layer_is_dequantized_at_a_time():
  stacks = {LAYERS * math.prod(shape) for shape in KERNELS}
  assert not floats(compiled(quantized=True)) & stacks
  assert floats(compiled()) & stacks  # of a dense base they are arguments


def test_slices_are_known_by_name_and_so_is_the_memory_of_their_chips():
  for name, count, gigabytes in (("v5e:1x1", 1, 16), ("v6e:2x2", 4, 32), ("v5p:2x2x1", 4, 95)):
    devices = topologies.devices_of(name)
    assert len(devices) == count
    assert topologies.memory_of(devices[0]) == gigabytes * 2**30
  for name in ("v9:2x2", "v5e:3x3", "nonsense"):
    with pytest.raises(ValueError, match=rf"--topology={name}: libtpu knows no such slice"):
      topologies.devices_of(name)


@pytest.mark.parametrize("name", ["splash", "blockwise"])
def test_attentions_memory_grows_linearly_on_a_tpu(name):
  place = SingleDeviceSharding(topologies.devices_of("v5e:1x1")[0])
  choice = Choice(name, "tpu")

  def temporaries(length):
    shapes = [
      jax.ShapeDtypeStruct((8, length, heads, 64), jnp.bfloat16, sharding=place)
      for heads in (8, 4, 4)
    ]
    attention = functools.partial(attend, is_causal=True, choice=choice)
    gradient = jax.jit(jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2)))
    memory = gradient.lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes

  # Shorter ones fit in the core's own memory in part.
  before, found = (temporaries(length) for length in (16384, 32768))
  assert 0 < before < found < 2.3 * before
  assert found < 32768 * 32768 * 8 * 8 / 8  # an eighth of a byte a score
