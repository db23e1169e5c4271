"""Run by `test_sharding.py` in a process of its own, which has eight devices.

Each function without arguments is one statement about a Llama with adapters that is trained on a
mesh: `python sharding_worker.py STATEMENT...` prints the names of those that hold.
"""

import dataclasses
import functools
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import lora_jax
from lora_jax import compress, families, sharding, tree
from lora_jax.hlo import collectives, moved
from lora_jax.io import shards
from lora_jax.models import bert, gemma4, gpt2, llama
from lora_jax.tasks.pooled_classification import PooledClassification
from lora_jax.train import optimizer, parallel, step

# No two kernels have the same axes, whole or cut in 2, 4 or 8.
CONFIG = llama.LlamaConfig(
  vocab_size=112,
  width=64,
  mlp_width=160,
  num_layers=2,
  num_heads=12,
  num_kv_heads=4,
  head_dim=8,
  max_length=32,
  scan_layers=True,
  tie_embeddings=True,
)
STEPS, ROWS, LENGTH, TARGETS, RANK = 20, 16, 12, 4, 4
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False, scan_layers=False)
# What the relatives of Llama have, all at once.
RELATIVE = dataclasses.replace(
  CONFIG,
  qkv_bias=True,
  qk_norm=True,
  window=5,
  local_layers=(True, False),
  local_rope_theta=500.0,
  activation="gelu_tanh",
  unit_offset=True,
  post_norms=True,
  scale_embeddings=True,
  query_divisor=12.0,
  attn_softcap=20.0,
  logit_softcap=10.0,
)
EXPERTS = dataclasses.replace(
  CONFIG,
  qk_norm=True,
  experts=llama.ExpertConfig(num_experts=6, per_token=2, width=80, normalized=True),
)
OF_EXPERTS = {(6, 64, 160), (6, 80, 64), (6, 64, 80), (6, 160, 64)}
FUSED = dataclasses.replace(
  CONFIG,
  fused=True,
  rotary_dim=6,
  rotated_layers=(True, False),
  pre_norms=False,
  post_norms=True,
  residual_multiplier=0.5,
  query_growth=0.1,
  query_length=4,
)
OLMO = dataclasses.replace(
  CONFIG,
  pre_norms=False,
  post_norms=True,
  qk_norm=True,
  whole_qk_norm=True,
  window=5,
  local_layers=(True, False),
)
GPT_OSS = dataclasses.replace(
  CONFIG,
  qkv_bias=True,
  out_bias=True,
  attn_sinks=True,
  window=5,
  local_layers=(True, False),
  experts=llama.ExpertConfig(num_experts=6, per_token=2, width=80, clamped=True, biases=True),
)
GPT2 = gpt2.GPT2Config(
  vocab_size=112,
  width=64,
  mlp_width=160,
  num_layers=2,
  num_heads=8,
  head_dim=8,
  max_length=32,
  scan_layers=True,
)
# Two layers have keys and values, two see theirs; MLPs of two widths.
GEMMA4 = gemma4.Gemma4Config(
  vocab_size=112,
  width=64,
  mlp_width=160,
  num_layers=4,
  num_heads=12,
  num_kv_heads=4,
  head_dim=8,
  full_kv_heads=4,
  full_head_dim=16,
  rotary_dim=4,
  max_length=32,
  window=5,
  shared_layers=2,
  local_layers=(True, False, True, False),
  wide_shared_mlp=True,
  per_layer_width=24,
  per_layer_vocab=112,
  logit_softcap=10.0,
)
BERT = bert.BertConfig(
  vocab_size=112,
  width=64,
  mlp_width=160,
  num_layers=2,
  num_heads=8,
  head_dim=8,
  max_length=32,
  scan_layers=True,
  classes=("even", "odd"),
)
BERT_KERNELS = {(64, 64), (64, 160)}
KERNELS = {(64, 96), (32, 64), (64, 160), (64, 112)}
GEMMA4_KERNELS = KERNELS | {(64, 192), (64, 320), (24, 64)}
GPT2_KERNELS = {(64, 192), (64, 64), (64, 160), (64, 112)}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)]


def batch(number: int):
  """Rows with different numbers of tokens that count; the tokens to predict depend on others."""
  rng = np.random.default_rng(number)
  tokens = rng.integers(0, 112, (ROWS, LENGTH)).astype(np.int32)
  at = np.tile(np.arange(LENGTH - TARGETS, LENGTH, dtype=np.int32), (ROWS, 1))
  weights = rng.random((ROWS, TARGETS)) < np.linspace(0.3, 1, ROWS)[:, None]
  targets = np.take_along_axis(tokens, at - 1, axis=1) % 7
  return {"tokens": tokens, "at": at, "targets": targets, "weights": weights.astype(np.float32)}


def texts(number: int):
  """Texts of different lengths, and which of two their first token is; some rows do not count."""
  rng = np.random.default_rng(number)
  odd_B = rng.integers(0, 2, ROWS)
  tokens = rng.integers(0, 112, (ROWS, LENGTH))
  tokens[:, 0] = odd_B
  return {
    "tokens": tokens.astype(np.int32),
    "mask": np.arange(LENGTH) < rng.integers(3, LENGTH + 1, ROWS)[:, None],
    "types": (np.arange(LENGTH) > 4) * np.ones((ROWS, 1), np.int32),
    "targets": odd_B.astype(np.int32)[:, None],
    "weights": (np.arange(ROWS) % 5 > 0).astype(np.float32)[:, None],
  }


def batches(config):
  """`number -> batch` of the task that a model is trained on."""
  return texts if config.family == "bert" else batch


@functools.cache
def adapted(config, format=None):
  """The weights, with adapters on every linear layer and full norms, and the mask.

  With a format the base of every linear layer is quantised so.
  """
  tokens = jnp.zeros((1, 2), jnp.int32)
  model = families.family_of(config).make_model(config)
  params = model.init(jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  if format:
    formats = lora_jax.match(params, [("all-linear", format)], axes)
    params = compress.quantize(params, formats, axes)
  lora = lora_jax.LoRA(rank=RANK, alpha=8.0)
  rules = [("all-linear", lora), ("(embed_)?norm/scale", lora_jax.Full())]
  if config.classes:
    rules.append(("head/.*", lora_jax.Full()))
  specs = lora_jax.match(params, rules, axes)
  weights = lora_jax.attach(params, lora_jax.init(jax.random.key(1), params, specs, axes))
  return weights, lora_jax.trainable_mask(weights)


def make_optimizer():
  rate = optimizer.schedule(peak=1e-2, warmup_steps=2, total_steps=STEPS, kind="linear")
  return optimizer.adamw(rate, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01, clip_norm=1.0)


def start(config, format=None, mesh=None):
  """(state, frozen, train_step) on one device, or laid out on a mesh."""
  weights, mask = adapted(config, format)
  tx, places = make_optimizer(), None
  if mesh is None:
    trainable, frozen = lora_jax.partition(weights, mask)
    state = step.init_state(trainable, tx)
  else:
    layout = sharding.lay_out(weights, mesh, families.family_of(config).sharding)
    trainable, frozen = lora_jax.partition(jax.device_put(weights, layout.shardings), mask)
    state = step.init_state(trainable, tx)
    places = layout.follow(state)
    state = jax.device_put(state, places)
    config = dataclasses.replace(config, constrain=sharding.keep_rows(mesh))
  model = families.family_of(config).make_model(config)
  apply = lora_jax.adapt(model.apply, strict=True)
  if config.family == "bert":
    how = {"text": "", "pair": "", "label": "", "max_length": LENGTH, "buckets": (LENGTH,)}
    objective = PooledClassification(**how, labels=config.classes).objective(apply)
  else:
    objective = step.completion_objective(apply)
  return state, frozen, step.make_train_step(objective, tx, shardings=places)


@functools.cache
def losses_on_one_device(config, format=None):
  state, frozen, train_step = start(config, format)
  losses = []
  for number in range(STEPS):
    state, metrics = train_step(state, frozen, batches(config)(number))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.5  # it learns
  return np.array(losses)


@functools.cache
def trained(sizes, config=CONFIG, format=None):
  """(losses, shardings of the state before and after, the program's collectives) on a mesh."""
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
  state, frozen, train_step = start(config, format, mesh)
  program = train_step.lower(state, frozen, sharding.put_rows(batches(config)(0), mesh)).compile()
  before = jax.tree.map(lambda x: x.sharding, state)
  losses = []
  for number in range(STEPS):
    state, metrics = program(state, frozen, sharding.put_rows(batches(config)(number), mesh))
    losses.append(float(metrics["loss"]))
  after = jax.tree.map(lambda x: x.sharding, state)
  return np.array(losses), before, after, collectives(program.as_text())


def assert_same_losses(sizes, config=CONFIG, format=None):
  losses, before, after, _ = trained(sizes, config, format)
  np.testing.assert_allclose(losses, losses_on_one_device(config, format), rtol=0, atol=1e-5)
  assert tree.flatten(before) == tree.flatten(after)  # the next step compiles nothing


def the_losses_of_pmap_are_those_of_one_device():
  weights, mask = adapted(CONFIG)
  trainable, frozen = lora_jax.partition(weights, mask)
  tx = make_optimizer()
  objective = step.completion_objective(lora_jax.adapt(llama.Llama(CONFIG).apply, strict=True))
  train_step = parallel.make_pmap_train_step(objective, tx)
  state, frozen = parallel.replicate((step.init_state(trainable, tx), frozen))
  losses = []
  for number in range(STEPS):
    state, metrics = train_step(state, frozen, parallel.split(batch(number)))
    losses.append(float(parallel.first(metrics)["loss"]))
    assert parallel.first(metrics)["loss_tokens"] == batch(number)["weights"].sum()
  np.testing.assert_allclose(losses, losses_on_one_device(CONFIG), rtol=0, atol=1e-5)
  assert parallel.first(state).step == STEPS
  with pytest.raises(ValueError, match="12 rows cannot be divided over 8 devices"):
    parallel.split({"tokens": np.zeros((12, 3))})


def gathered(ops):
  """The shapes of what is gathered, their axes sorted, those of size one left out."""
  return {
    tuple(sorted(n for n in shape if n > 1))
    for op in ops
    if op.kind == "all-gather"
    for shape in op.shapes
  }


def the_losses_over_data_are_those_of_one_device():
  assert_same_losses((8, 1, 1))


def the_losses_over_fsdp_are_those_of_one_device():
  assert_same_losses((1, 8, 1))


def the_losses_over_two_devices_on_tensor_are_those_of_one_device():
  assert_same_losses((4, 1, 2))
  *_, ops = trained((4, 1, 2))
  assert not gathered(ops) & KERNELS


def the_losses_over_four_devices_on_tensor_are_those_of_one_device():
  assert_same_losses((2, 1, 4))


def the_losses_of_a_relative_of_llama_are_those_of_one_device():
  assert_same_losses((2, 2, 2), RELATIVE)
  *_, ops = trained((2, 1, 4), RELATIVE)
  assert not gathered(ops) & KERNELS


def the_losses_of_a_model_with_experts_are_those_of_one_device():
  assert_same_losses((2, 2, 2), EXPERTS)
  assert_same_losses((2, 1, 4), EXPERTS)
  *_, ops = trained((2, 1, 4), EXPERTS)
  assert not gathered(ops) & (KERNELS | OF_EXPERTS)
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=4)
  _, frozen, _ = start(EXPERTS, mesh=mesh)
  shards = {path: x.addressable_shards[0].data.shape for path, x in tree.flatten(frozen).items()}
  assert shards["blocks/mlp/experts/gate_up/kernel/w"] == (2, 6, 64, 40)
  assert shards["blocks/mlp/experts/down/kernel/w"] == (2, 6, 20, 64)


def the_losses_with_fused_kernels_are_those_of_one_device():
  assert_same_losses((2, 2, 2), FUSED)
  *_, ops = trained((2, 1, 4), FUSED)
  assert not gathered(ops) & {(64, 96), (64, 160), (64, 320)}  # out, down, qkv and gate_up


def the_losses_of_a_model_with_norms_over_all_heads_are_those_of_one_device():
  assert_same_losses((2, 2, 2), OLMO)
  assert_same_losses((2, 1, 4), OLMO)
  *_, ops = trained((2, 1, 4), OLMO)
  assert not gathered(ops) & KERNELS


def the_losses_of_a_model_with_sinks_and_biased_experts_are_those_of_one_device():
  assert_same_losses((2, 2, 2), GPT_OSS)
  assert_same_losses((2, 1, 4), GPT_OSS)
  *_, ops = trained((2, 1, 4), GPT_OSS)
  assert not gathered(ops) & (KERNELS | OF_EXPERTS)


def the_losses_of_gpt_2_are_those_of_one_device():
  assert_same_losses((2, 2, 2), GPT2)
  *_, ops = trained((2, 1, 4), GPT2)
  assert not gathered(ops) & GPT2_KERNELS
  *_, ops = trained((1, 8, 1), GPT2)
  assert (64, 192) in gathered(ops)  # else the line above could not fail


def the_losses_of_gemma_4_are_those_of_one_device():
  assert_same_losses((2, 2, 2), GEMMA4)
  *_, ops = trained((2, 1, 4), GEMMA4)
  assert not gathered(ops) & GEMMA4_KERNELS
  *_, ops = trained((1, 8, 1), GEMMA4)
  assert {(64, 192), (64, 320), (24, 64)} <= gathered(ops)  # else the line above could not fail


def the_losses_of_an_encoder_are_those_of_one_device():
  assert_same_losses((2, 2, 2), BERT)
  *_, ops = trained((2, 1, 4), BERT)
  assert not gathered(ops) & BERT_KERNELS
  *_, ops = trained((1, 8, 1), BERT)
  assert (64, 160) in gathered(ops)


def the_losses_over_all_three_axes_are_those_of_one_device():
  assert_same_losses((2, 2, 2))


def data_parallel_training_moves_the_gradient_of_the_adapters_and_nothing_else():
  weights, mask = adapted(CONFIG)
  trainable, _ = lora_jax.partition(weights, mask)
  adapters = sum(x.nbytes for x in jax.tree.leaves(trainable))
  *_, ops = trained((8, 1, 1))
  assert moved(ops).keys() == {"all-reduce"}
  scalars = moved(ops)["all-reduce"] - adapters  # the loss, and how many tokens it is a mean of
  assert 0 < scalars <= 16
  # Over fsdp too, where the base is gathered; the norm of the gradient is then one of its parts.
  *_, ops = trained((1, 8, 1))
  assert moved(ops).keys() == {"all-reduce", "all-gather"}
  assert 0 < moved(ops)["all-reduce"] - adapters <= 100


def on_no_mesh_is_anything_of_a_kernels_size_reduced():
  for sizes in MESHES:
    *_, ops = trained(sizes)
    reduced = [op for op in ops if op.kind in ("all-reduce", "reduce-scatter")]
    matrices = {shape for op in reduced for shape in op.shapes if len(shape) == 2}
    # The factors' gradients, and what they make of activations that are cut over tensor.
    assert matrices and all(RANK in shape for shape in matrices), (sizes, matrices)


def over_tensor_no_kernel_is_gathered():
  *_, ops = trained((2, 1, 4))
  assert not gathered(ops) & KERNELS
  smallest = min(4 * a * b for a, b in KERNELS)
  assert all(op.bytes < smallest for op in ops if op.kind == "all-gather")


def over_fsdp_kernels_are_gathered_for_use_over_that_axis_alone():
  *_, ops = trained((1, 8, 1))
  assert {(64, 96), (32, 64), (64, 160)} <= gathered(ops)  # else the test above could not fail
  *_, ops = trained((2, 2, 2))
  assert {(48, 64), (16, 64), (64, 80)} <= gathered(ops)
  assert not gathered(ops) & KERNELS


def base_adapters_and_moments_lie_where_the_rules_say():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  state, frozen, _ = start(CONFIG, mesh=mesh)
  leaves = tree.flatten(frozen) | tree.flatten(state)
  for path, shape in {
    "blocks/attn/query/kernel/w": (2, 32, 48),
    "blocks/attn/out/kernel/w": (2, 48, 32),
    "embed/embedding": (56, 64),
    "trainable/blocks/attn/query/kernel/a": (2, 32, 4),
    "trainable/blocks/attn/query/kernel/b": (2, 4, 48),
    "opt_state/1/0/mu/blocks/attn/query/kernel/a": (2, 32, 4),
    "opt_state/1/0/nu/blocks/mlp/down/kernel/a": (2, 80, 4),
    "opt_state/1/0/count": (),
  }.items():
    assert leaves[path].addressable_shards[0].data.shape == shape, path


def the_losses_of_layers_apart_and_a_head_of_its_own_are_those_of_one_device():
  assert_same_losses((2, 2, 2), UNTIED)
  *_, ops = trained((2, 2, 2), UNTIED)
  assert not gathered(ops) & KERNELS


def the_losses_on_a_quantised_base_are_those_of_one_device():
  assert_same_losses((2, 2, 2), format=compress.NF4)
  assert_same_losses((2, 1, 4), format=compress.INT8)
  _, frozen, _ = start(CONFIG, compress.INT8, sharding.make_mesh(data=2, fsdp=1, tensor=4))
  shards = {path: x.addressable_shards[0].data.shape for path, x in tree.flatten(frozen).items()}
  assert shards["blocks/mlp/up/kernel/w/codes"] == (2, 40, 64)  # of 160 outputs
  assert shards["blocks/mlp/up/kernel/w/scale"] == (2, 40, 1)


def pieces_are_read_once_and_each_device_gets_its_own_part():
  values = np.arange(3 * 8 * 10, dtype=np.float32).reshape(3, 8, 10)
  reads = []

  def reader(i):
    reads.append(i)
    return values[i]

  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  place = jax.sharding.NamedSharding(mesh, jax.P(None, "tensor", "fsdp"))
  pieces = [functools.partial(reader, i) for i in range(3)]
  array = shards.assemble((3, 8, 10), np.dtype(np.float32), pieces, place)
  assert reads == [0, 1, 2]
  assert array.sharding == place
  assert {x.data.shape for x in array.addressable_shards} == {(3, 4, 5)}
  np.testing.assert_array_equal(array, values)
  layers = jax.sharding.NamedSharding(mesh, jax.P("data"))
  stacked = shards.assemble((2, 8, 10), np.dtype(np.float32), pieces[:2], layers)
  assert {x.data.shape for x in stacked.addressable_shards} == {(1, 8, 10)}
  np.testing.assert_array_equal(stacked, values[:2])
  sixth = SingleDeviceSharding(jax.devices()[5])
  half = shards.assemble((8, 10), np.dtype(jnp.bfloat16), [lambda: values[1]], sixth)
  assert half.devices() == {jax.devices()[5]}
  np.testing.assert_array_equal(half, values[1].astype(jnp.bfloat16))


if __name__ == "__main__":
  assert jax.device_count() == 8, jax.devices()
  for name in sys.argv[1:]:
    try:
      vars()[name]()
    except Exception:
      traceback.print_exc()
    else:
      print(name, flush=True)
