"""The training step: it changes one donated `State` and leaves `frozen` unchanged.

    trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
    state = init_state(trainable, tx)
    train_step = make_train_step(completion_objective(lora_jax.adapt(model.apply)), tx)
    state, metrics = train_step(state, frozen, batch)

Only the mask says what trains. The gradient is taken with respect to `trainable` alone, and the
optimizer state is made from it alone. `frozen` is an argument, not a closure: a base that is closed
over would be a constant of the compiled program.

Shapes: B rows of a batch, T tokens of a row, C positions of a row where the loss is taken,
V entries of the vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.attachment import with_dropout
from lora_jax.train.accumulation import accumulated
from lora_jax.tree import join

PyTree = Any
Batch = dict[str, Any]
Objective = Callable[..., tuple[jax.Array, jax.Array]]  # of `(weights, batch, *beside)`


class State(NamedTuple):
  """All that a training step changes.

  Attributes:
    step: int32 scalar, the number of updates made.
    trainable: the weights with None in place of every frozen leaf.
    opt_state: the optimizer's state for `trainable`.
  """

  step: jax.Array
  trainable: PyTree
  opt_state: PyTree


def init_state(trainable: PyTree, tx: optax.GradientTransformation) -> State:
  """Returns the state before the first step.

  `trainable` is copied, since the step donates its state and the caller keeps the arrays.
  """
  trainable = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trainable)
  return State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def completion_loss(
  logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the mean cross-entropy, in nats, over the positions that count, and their number.

      loss = Σ weights · (logsumexp(logits) − logits[target]) / Σ weights

  Args:
    logits_BCV: any float type; the log-softmax is computed in float32.
    targets_BC: integer ids in 0..V-1.
    weights_BC: 1 where a position counts, 0 where it is padding.

  Returns:
    (loss, tokens), two float32 scalars; without a position that counts the loss is 0.
  """
  losses_BC = optax.softmax_cross_entropy_with_integer_labels(
    logits_BCV.astype(jnp.float32), targets_BC
  )
  tokens = jnp.sum(weights_BC)
  return jnp.sum(losses_BC * weights_BC) / jnp.where(tokens > 0, tokens, 1), tokens


def shape_of(batch: Batch) -> tuple[int, ...]:
  """The rows and the tokens of a row of a language model's batch, after the number of members."""
  return batch["tokens"].shape


def model_options(batch: Batch) -> dict[str, jax.Array]:
  """A language model's further inputs from a batch, by the names of its arguments."""
  packed = {"segments_BT": batch["segments"]} if "segments" in batch else {}
  return {"at_BC": batch["at"]} | packed


def completion_objective(apply: Callable) -> Objective:
  """Makes the objective of a language model on batches of prompts and completions.

  Args:
    apply: `apply({"params": weights}, tokens_BT, at_BC=positions) -> logits_BCV`, the adapted
      `model.apply`.

  Returns:
    `objective(weights, batch) -> (mean loss, tokens)`, for batches with the keys `tokens` (B, T),
    `at`, `targets` and `weights` (B, C), and for packed ones, with `segments` (B, T), which go to
    the model as `segments_BT`.
  """

  def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits_BCV = apply({"params": weights}, batch["tokens"], **model_options(batch))
    return completion_loss(logits_BCV, batch["targets"], batch["weights"])

  return objective


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  parts: int = 1,
  dropout_key: jax.Array | None = None,
  shardings: State | None = None,
) -> Callable:
  """Makes the jitted step `(state, frozen, batch, *beside) -> (state, metrics)`.

  The state is donated: its buffers are gone after the call. A step whose loss or gradient is not
  finite returns the given state, including the counter, and reports it in its metrics. Further
  arguments, such as a teacher's weights, are passed on to the objective.

  Args:
    objective: as in `make_update`.
    tx: as in `make_update`.
    parts: as in `make_update`.
    dropout_key: as in `make_update`.
    shardings: a State with a sharding in place of every array, for the new state; None leaves it to
      the compiler.

  Returns:
    The step. Its metrics are scalars: `loss` (the objective before the update), `grad_norm` (the
    global norm before any clip), `loss_tokens` (the number of tokens in the mean), `finite` (bool).
  """
  update = make_update(objective, tx, parts=parts, dropout_key=dropout_key)
  return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def make_update(
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  parts: int = 1,
  dropout_key: jax.Array | None = None,
  axis_name: str | None = None,
) -> Callable:
  """Makes the step itself, without compiling it; see `make_train_step`.

  Args:
    objective: `(weights, batch, *beside) -> (mean loss, tokens)`, as `completion_objective` returns
      it (without `beside`).
    tx: the optimizer.
    parts: the number of parts of a batch's rows, whose gradients are summed before the update; see
      `lora_jax.train.accumulation`.
    dropout_key: the key of the adapters' dropout, combined with the number of the step and of the
      part, so that a resumed run drops the same inputs; None for no dropout.
    axis_name: the axis of a `pmap` or `shard_map` over which the rows of a batch are sharded; None
      if the step sees the whole batch, as under `jit`.
  """

  def step(
    state: State, frozen: PyTree, batch: Batch, *beside: PyTree
  ) -> tuple[State, dict[str, jax.Array]]:
    def loss_of(trainable: PyTree, batch: Batch, part: jax.Array) -> tuple[jax.Array, jax.Array]:
      weights = join(trainable, frozen)
      if dropout_key is not None:
        key = jax.random.fold_in(dropout_key, state.step)
        key = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        weights = with_dropout(weights, jax.random.fold_in(key, part))
      return objective(weights, batch, *beside)

    (loss, tokens), grads = accumulated(loss_of, parts)(state.trainable, batch)
    if axis_name is not None:
      loss, tokens, grads = _mean_over_devices(axis_name, loss, tokens, grads)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    updated = State(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    metrics = {"loss": loss, "grad_norm": grad_norm, "loss_tokens": tokens, "finite": finite}
    return state, metrics

  return step


def _mean_over_devices(axis_name: str, loss: jax.Array, tokens: jax.Array, grads: PyTree):
  """The loss, tokens and gradient over all devices' rows, with devices weighted by their tokens."""
  total = jax.lax.psum(tokens, axis_name)
  share = tokens / jnp.where(total > 0, total, 1)
  loss, grads = jax.lax.psum(
    jax.tree.map(lambda x: (share * x).astype(x.dtype), (loss, grads)), axis_name
  )
  return loss, total, grads
