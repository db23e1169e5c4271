"""The training room with the real transform and the real data pipeline."""

import json

import jax
import numpy as np
import tiny_run

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


def make_run():
  params = tiny_run.make_weights()
  specs = lora_jax.match(params, [("(hidden|head)/kernel", lora_jax.LoRA(rank=2, alpha=4.0))])
  weights = lora_jax.attach(params, lora_jax.init(jax.random.key(1), params, specs))
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  tx = tiny_run.make_optimizer()
  objective = completion_objective(lora_jax.adapt(tiny_run.TinyModel().apply))
  return init_state(trainable, tx), frozen, make_train_step(objective, tx)


def train(state, frozen, train_step, batches, steps):
  for _ in range(steps):
    state, _ = train_step(state, frozen, next(batches))
  return state


def bits(tree):
  return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


def test_adapters_train_the_base_keeps_its_bits_and_a_resumed_run_is_the_same_run(tmp_path):
  state, frozen, train_step = make_run()
  start, base = bits(state.trainable), bits(frozen)
  assert len(start) == 4  # a and b of two kernels
  whole = train(state, frozen, train_step, make_batches(), steps=8)
  assert bits(frozen) == base
  assert all(leaf != start[path] for path, leaf in bits(whole.trainable).items())

  state, frozen, train_step = make_run()
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
