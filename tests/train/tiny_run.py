"""A whole run of a tiny Linen model, for the tests: `python tiny_run.py WORKDIR SECONDS_A_STEP`.

The base (embedding and head) is frozen; the hidden layer trains.
"""

import pathlib
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.run.metrics import MetricsWriter, read_metrics
from lora_jax.run.progress import Progress
from lora_jax.run.workdir import fingerprint, open_workdir
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.evaluation import evaluate, make_eval_step
from lora_jax.train.loop import fit
from lora_jax.train.optimizer import adamw, schedule
from lora_jax.train.step import completion_objective, init_state, make_train_step
from lora_jax.tree import flatten, join, map_with_path, partition

VOCAB, WIDTH, BATCH, LENGTH = 13, 8, 4, 6
CONFIG = {"steps": 40, "seed": 3}
RATES = {"peak": 0.05, "warmup_steps": 2, "total_steps": 40, "kind": "linear"}
ADAMW = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}


class TinyModel(nn.Module):
  """Predicts a token from the tokens before it; logits at the asked positions only."""

  @nn.compact
  def __call__(self, tokens_BT, at_BC):
    x_BTD = nn.Embed(VOCAB, WIDTH, name="embed")(tokens_BT).cumsum(axis=1)
    x_BTD = x_BTD + nn.Dense(WIDTH, name="hidden")(nn.tanh(x_BTD))
    x_BCD = jnp.take_along_axis(x_BTD, at_BC[:, :, None], axis=1)
    return nn.Dense(VOCAB, name="head")(x_BCD)


class CountingBatches:
  """Endless batches, each a pure function of its position: the sum of a row modulo VOCAB."""

  def __init__(self, seed: int, seconds: float = 0.0):
    self.position, self.seed, self.seconds = 0, seed, seconds

  def __iter__(self):
    return self

  def __next__(self):
    time.sleep(self.seconds)
    self.position += 1
    tokens = np.random.default_rng([self.seed, self.position]).integers(1, 4, (BATCH, LENGTH))
    at = np.tile(np.array([2, 5]), (BATCH, 1))
    return {
      "tokens": tokens.astype(np.int32),
      "at": at.astype(np.int32),
      "targets": (np.take_along_axis(tokens.cumsum(axis=1), at, axis=1) % VOCAB).astype(np.int32),
      "weights": np.ones((BATCH, 2), np.float32),
    }

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


def make_weights():
  batch = next(CountingBatches(0))
  return TinyModel().init(jax.random.key(0), batch["tokens"], batch["at"])["params"]


def trainable_mask(weights):
  return map_with_path(lambda path, leaf: path.startswith("hidden/"), weights)


def make_optimizer():
  return adamw(schedule(**RATES), **ADAMW)


def make_run():
  """Returns (state, frozen, train_step) of a fresh run."""
  weights = make_weights()
  trainable, frozen = partition(weights, trainable_mask(weights))
  tx = make_optimizer()
  objective = completion_objective(TinyModel().apply)
  return init_state(trainable, tx), frozen, make_train_step(objective, tx)


def run(path, seconds=0.0, batches=None, **changes):
  """Trains, or goes on training, in a workdir; returns (state, frozen)."""
  options = {"steps": 40, "log_every": 1, "checkpoint_every": 5, "evaluate_every": 10} | changes
  batches = batches or CountingBatches(CONFIG["seed"], seconds)
  state, frozen, train_step = make_run()
  eval_step = make_eval_step(TinyModel().apply, choices=())
  held_out = [next(CountingBatches(99))]
  with (
    open_workdir(path, CONFIG) as workdir,
    Checkpoints(workdir.checkpoints, keep=2, fingerprint=fingerprint(CONFIG)) as checkpoints,
  ):
    restored = checkpoints.restore(state)
    if restored:
      state = restored.state
      batches.set_state(restored.data_state)
    start = int(state.step)
    with (
      MetricsWriter(workdir.metrics, workdir.tensorboard, step=start) as writer,
      Progress(start=start, total=options["steps"]) as progress,
    ):
      state = fit(
        state,
        frozen,
        train_step,
        batches,
        learning_rate=schedule(**RATES),
        evaluate=lambda state, frozen: evaluate(eval_step, join(state.trainable, frozen), held_out),
        checkpoints=checkpoints,
        writer=writer,
        progress=progress,
        **options,
      )
  return state, frozen


def log_lines(folder):
  """The lines of a run's log without what depends on the clock."""
  lines = read_metrics(folder / "metrics.jsonl")
  return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same_run(state, folder, uninterrupted):
  """Asserts that a run has ended in the state and with the lines of another, bit for bit."""
  wanted_state, wanted_lines = uninterrupted
  ours, wanted = flatten(state), flatten(wanted_state)
  assert ours.keys() == wanted.keys()
  for path in wanted:
    assert np.asarray(ours[path]).tobytes() == np.asarray(wanted[path]).tobytes(), path
  assert log_lines(folder) == wanted_lines


if __name__ == "__main__":
  run(pathlib.Path(sys.argv[1]), seconds=float(sys.argv[2]))
