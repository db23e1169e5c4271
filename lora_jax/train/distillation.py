"""Distillation: a student learns from a teacher's distribution of every next token, or class.

    def student(weights, batch): return apply({"params": weights}, batch["tokens"], ...)
    def teacher(weights, batch): return large({"params": weights}, batch["tokens"], ...)

    objective = distillation_objective(student, teacher, temperature=2.0, hard=0.1)
    train_step = make_train_step(objective, tx)
    state, metrics = train_step(state, frozen, batch, teacher_params)

The teacher may be the same base without the adapter, so that one copy of the base serves both. The
teacher is then `apply` on `without_adapters(weights)`, and the step takes only the batch.

Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2; for the term of hidden states
Jiao et al. 2019, TinyBERT, arXiv 1909.10351, equation 8, with states of equal width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.train.step import Batch, Objective, completion_loss
from lora_jax.weights import Adapted, Recentred, inside_mask, is_weight

PyTree = Any
Reading = jax.Array | tuple[jax.Array, jax.Array]  # logits_BCV, or with hidden_BCD


def without_adapters(weights: PyTree) -> PyTree:
  """Returns the base of a tree that `lora_jax.attach` made, without copying its arrays.

  Raises:
    ValueError: for adapters that replace the base by a residual (PiSSA, OLoRA).
  """

  def base_of(leaf):
    if isinstance(leaf, Recentred):
      raise ValueError(
        f"{leaf.path}: holds the residual that its adapter starts from and not the base; give the "
        "teacher its own parameters"
      )
    return base_of(leaf.w) if isinstance(leaf, Adapted) else leaf

  return jax.tree.map(functools.partial(inside_mask, base_of), weights, is_leaf=is_weight)


def divergence(
  student_BCV: jax.Array, teacher_BCV: jax.Array, weights_BC: jax.Array, temperature: float
) -> jax.Array:
  """The mean of T² KL(teacher || student) over the positions that count, with temperature T.

      T² Σ_v p_v (log p_v - log q_v),     p = softmax(teacher / T),  q = softmax(student / T)

  T² makes the size of the gradient independent of the temperature. In float32, in nats.

  Args:
    student_BCV: logits.
    teacher_BCV: logits, which get no gradient.
    weights_BC: 1 where a position counts, 0 where it is padding.
    temperature: T, above 0.
  """
  q_BCV = jax.nn.log_softmax(student_BCV.astype(jnp.float32) / temperature)
  teacher_BCV = jax.lax.stop_gradient(teacher_BCV).astype(jnp.float32)
  p_BCV = jax.nn.log_softmax(teacher_BCV / temperature)
  losses_BC = jnp.sum(jnp.exp(p_BCV) * (p_BCV - q_BCV), axis=-1)
  return temperature**2 * _mean(losses_BC, weights_BC)


def distillation_objective(
  student: Callable[[PyTree, Batch], Reading],
  teacher: Callable[[PyTree, Batch], Reading],
  *,
  temperature: float = 2.0,
  hard: float = 0.0,
  hidden: float = 0.0,
  answers: Callable[[Batch], tuple[jax.Array, jax.Array]] = lambda batch: (
    batch["targets"],
    batch["weights"],
  ),
) -> Objective:
  """Makes the objective of a student that learns from a teacher.

      (1 - hard) divergence + hard cross-entropy + hidden mean |h_student - h_teacher|²

  Args:
    student: `(weights, batch) -> logits_BCV`, or `(logits_BCV, hidden_BCD)` to learn from hidden
      states as well.
    teacher: likewise, called with the `teacher_weights` of the objective or, without them, with the
      student's weights.
    temperature: T, above 0, which softens both distributions.
    hard: the fraction of the loss that comes from the batch's own targets, 0 to 1.
    hidden: the weight of the hidden states' term, 0 for none.
    answers: a batch to its targets [B, C] and their weights, 1 where a position counts. The default
      is for the batches of `lora_jax.train.step.completion_objective`.

  Returns:
    `objective(weights, batch, teacher_weights=None)`.

  Raises:
    ValueError: if a number is out of range; in the step, if hidden states are required but not
      returned.
  """
  if not temperature > 0:
    raise ValueError(f"distillation: the temperature {temperature} must be above 0")
  if not 0 <= hard <= 1 or hidden < 0:
    raise ValueError(f"distillation: hard {hard} must be from 0 to 1, hidden {hidden} at least 0")

  def objective(
    weights: PyTree, batch: Batch, teacher_weights: PyTree | None = None
  ) -> tuple[jax.Array, jax.Array]:
    logits_BCV, student_BCD = _read(student(weights, batch), hidden)
    taught_by = weights if teacher_weights is None else teacher_weights
    said_BCV, teacher_BCD = _read(jax.lax.stop_gradient(teacher(taught_by, batch)), hidden)
    targets_BC, weights_BC = answers(batch)
    own, tokens = completion_loss(logits_BCV, targets_BC, weights_BC)
    soft = divergence(logits_BCV, said_BCV, weights_BC, temperature)
    loss = (1 - hard) * soft + hard * own
    if hidden:
      assert student_BCD is not None and teacher_BCD is not None  # `_read` refuses others
      squares_BC = jnp.mean(jnp.square((student_BCD - teacher_BCD).astype(jnp.float32)), axis=-1)
      loss += hidden * _mean(squares_BC, weights_BC)
    return loss, tokens

  return objective


def _read(reading: Reading, hidden: float) -> tuple[jax.Array, jax.Array | None]:
  if isinstance(reading, tuple):
    return reading
  if hidden:
    raise ValueError(
      f"distillation: hidden is {hidden}, and a model returns only its logits; let student and "
      "teacher return (logits, hidden states)"
    )
  return reading, None


def _mean(values_BC: jax.Array, weights_BC: jax.Array) -> jax.Array:
  tokens = jnp.sum(weights_BC)
  return jnp.sum(values_BC * weights_BC) / jnp.where(tokens > 0, tokens, 1)
