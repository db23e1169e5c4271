"""The training room with the real transform and the real data pipeline."""

import json

import jax
import numpy as np
import pytest
import tiny_run
from jaxprs import primitives

import lora_jax
from lora_jax.data.batches import train_batches
from lora_jax.data.examples import Example
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.step import completion_objective, init_state, make_train_step
from lora_jax.tree import flatten


def make_batches():
  tokens = np.random.default_rng(0).integers(1, tiny_run.VOCAB, (20, 6)).tolist()
  examples = [Example(tokens=tuple(row), prompt_length=4, cut=0) for row in tokens]
  return iter(train_batches(examples, batch_size=4, buckets=(8,), seed=0, pad_id=0))


def make_run(dropout=0.0, dropout_key=None):
  params = tiny_run.make_weights()
  spec = lora_jax.LoRA(rank=2, alpha=4.0, dropout=dropout)
  specs = lora_jax.match(params, [("(hidden|head)/kernel", spec)])
  weights = lora_jax.attach(params, lora_jax.init(jax.random.key(1), params, specs))
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  tx = tiny_run.make_optimizer()
  objective = completion_objective(lora_jax.adapt(tiny_run.TinyModel().apply))
  train_step = make_train_step(objective, tx, dropout_key=dropout_key)
  return init_state(trainable, tx), frozen, train_step


def train(state, frozen, train_step, batches, steps):
  for _ in range(steps):
    state, _ = train_step(state, frozen, next(batches))
  return state


def bits(tree):
  return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_train_the_base_keeps_its_bits_and_a_resumed_run_is_the_same_run(
  tmp_path, dropout
):
  state, frozen, train_step = make_run(dropout, jax.random.key(5))
  start, base = bits(state.trainable), bits(frozen)
  assert len(start) == 4  # a and b of two kernels
  whole = train(state, frozen, train_step, make_batches(), steps=8)
  assert bits(frozen) == base
  assert all(leaf != start[path] for path, leaf in bits(whole.trainable).items())

  state, frozen, train_step = make_run(dropout, jax.random.key(5))
  like, batches = jax.eval_shape(lambda: state), make_batches()
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    checkpoints.save(train(state, frozen, train_step, batches, steps=5), batches.get_state())
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    restored = checkpoints.restore(like)
  batches = make_batches()
  batches.set_state(restored.data_state)
  resumed = train(restored.state, frozen, train_step, batches, steps=3)
  assert bits(resumed) == bits(whole)
  assert json.dumps(restored.data_state)


def test_every_step_drops_other_inputs_by_the_number_of_the_step_alone():
  batch = next(make_batches())

  # B is zero at the start, so the mask is seen in the gradient alone.
  def gradient_norm_at(step, key):
    state, frozen, train_step = make_run(0.5, jax.random.key(key))
    _, metrics = train_step(state._replace(step=state.step + step), frozen, batch)
    return float(metrics["grad_norm"])

  norms = [gradient_norm_at(step, key) for step, key in [(0, 1), (1, 1), (0, 2), (0, 1)]]
  assert norms[0] == norms[3]
  assert len(set(norms)) == 3


def test_a_step_without_dropout_traces_no_random_number():
  for dropout, key, expected in [(0.5, None, False), (0.5, jax.random.key(1), True)]:
    state, frozen, train_step = make_run(dropout, key)
    traced = primitives(train_step, state, frozen, next(make_batches()))
    assert any(name.startswith("random_bits") for name in traced) == expected
