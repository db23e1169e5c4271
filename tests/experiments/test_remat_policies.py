"""The policies that `config.model.remat` names, on an adapted Llama."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

import lora_jax
from experiments.parts import REMAT_POLICIES
from lora_jax.models import llama
from lora_jax.train.step import completion_objective

BATCH = {
  "tokens": np.arange(4 * 32, dtype=np.int32).reshape(4, 32) % 61,
  "at": np.full((4, 1), 31, np.int32),
  "targets": np.arange(4, dtype=np.int32)[:, None],
  "weights": np.ones((4, 1), np.float32),
}


@functools.cache
def compiled(remat):
  """The gradient of an adapted model's loss under a policy, compiled, and its arguments."""
  config = llama.LlamaConfig(
    vocab_size=61,
    width=32,
    mlp_width=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=32,
    scan_layers=True,
    remat_policy=REMAT_POLICIES[remat],
  )
  model = llama.Llama(config)
  params = jax.jit(model.init)(jax.random.key(0), BATCH["tokens"])["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, BATCH["tokens"])
  specs = lora_jax.match(params, [("mlp", lora_jax.LoRA(rank=2, alpha=4.0))], axes)
  weights = lora_jax.attach(params, lora_jax.init(jax.random.key(1), params, specs, axes))
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  trainable = jax.tree.map(lambda x: x + 0.01, trainable)  # B is zero at the start
  objective = completion_objective(lora_jax.adapt(model.apply))

  def loss_of(trainable, frozen):
    return objective(lora_jax.join(trainable, frozen), jax.tree.map(jnp.asarray, BATCH))

  gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
  return gradient.lower(trainable, frozen).compile(), (trainable, frozen)


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat",
  [name for name in REMAT_POLICIES if name != "none"],
)
def test_a_policy_leaves_the_loss_and_the_gradient_as_they_are(remat):
  results = []
  for name in ("none", remat):
    program, arguments = compiled(name)
    results.append(program(*arguments))
  assert_close(results[1], results[0])
  assert all(np.any(grad) for grad in jax.tree.leaves(results[0][1]))


@pytest.mark.slow
def test_the_less_a_policy_keeps_the_less_memory_the_compiled_step_needs():
  temporary = {
    name: compiled(name)[0].memory_analysis().temp_size_in_bytes for name in REMAT_POLICIES
  }
  assert temporary["nothing"] < 0.8 * temporary["dots"]
  assert temporary["dots"] < 0.8 * temporary["none"]
  assert temporary["everything"] == pytest.approx(temporary["none"], rel=0.1)
