"""The training of AdaLoRA: a budget of ranks, allocated to the matrices by importance.

    tx = allocate_ranks(tx, target_rank=8, total_steps=1000, first_steps=100, last_steps=300,
                        every=10, beta1=0.85, beta2=0.85)
    objective = with_orthogonality(objective, weight=0.1)

The allocation is part of the optimizer's update, inside the jitted step. The statistics of the
triplets are part of the optimizer's state, so checkpoints hold them, and a change of the budget
does not recompile.

Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, sections 3.1 to 3.3.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import tree
from lora_jax.train.step import Batch, Objective
from lora_jax.weights import AdaLoRA

PyTree = Any


class AllocationState(NamedTuple):
  """Statistics of the triplets, and the optimizer's state.

  Attributes:
    step: int32 scalar, the number of updates made.
    sensitivity: `{path: {part: array}}`, the smoothed |θ · ∂L/∂θ| of every parameter.
    uncertainty: the same structure, its smoothed absolute deviation from the mean.
    kept: `{path: bool [*stack, rank]}`, the triplets within the last budget.
    inner: the state of the wrapped optimizer.
  """

  step: jax.Array
  sensitivity: dict[str, dict[str, jax.Array]]
  uncertainty: dict[str, dict[str, jax.Array]]
  kept: dict[str, jax.Array]
  inner: PyTree


def allocate_ranks(
  tx: optax.GradientTransformation,
  *,
  target_rank: int,
  total_steps: int,
  first_steps: int,
  last_steps: int,
  every: int,
  beta1: float,
  beta2: float,
) -> optax.GradientTransformation:
  """Wraps an optimizer so that it also sets singular values to zero, down to a budget of triplets.

  With the sensitivity I = |θ · ∂L/∂θ| of every parameter, before its update,

      Ī ← β₁ Ī + (1 − β₁) I        Ū ← β₂ Ū + (1 − β₂) |I − Ī|        s = Ī · Ū

  a triplet scores s(E_i) + the mean of s over P's column + the mean of s over Q's row. The triplets
  with the highest scores, over all layers of all matrices, keep their value of E after the update.
  Their number decreases from the first rank to the target with the cube of the remaining time. A
  value that was set to zero may return until the last steps begin.

  Args:
    tx: the optimizer of everything that trains.
    target_rank: the average rank of a matrix at the end.
    total_steps: the steps of the run.
    first_steps: the steps before the budget begins to decrease.
    last_steps: the steps at the end with a fixed choice of triplets.
    every: the steps between two choices.
    beta1: the decay of the sensitivity's mean; 0.85 in the authors' code.
    beta2: the decay of the uncertainty's mean; 0.85 in the authors' code.

  Raises:
    ValueError: if the steps leave no time for the decrease, or another argument is out of range; at
      `init`, if no AdaLoRA trains or the target exceeds its rank.

  Source: equations 8 to 12 and algorithm 1.
  """
  last_choice = total_steps - last_steps
  if not (0 <= first_steps < last_choice <= total_steps and every >= 1 and target_rank >= 1):
    raise ValueError(
      f"AdaLoRA: first_steps {first_steps} and last_steps {last_steps} leave no time in "
      f"{total_steps} steps, or every {every} or target_rank {target_rank} is below 1"
    )
  if not (0 < beta1 < 1 and 0 < beta2 < 1):
    raise ValueError(f"AdaLoRA: beta1 {beta1} and beta2 {beta2} must lie between 0 and 1")

  def budgets(first: int, last: int) -> np.ndarray:
    """The number of triplets to keep, by step."""
    left = 1 - (np.arange(total_steps + 1) - first_steps) / (last_choice - first_steps)
    return (last + (first - last) * np.clip(left, 0, 1) ** 3).astype(np.int32)

  def init(params: PyTree) -> AllocationState:
    parts = _triplets(params)
    if not parts or any(target_rank > x["e"].shape[-1] for x in parts.values()):
      found = ", ".join(f"{path} of rank {x['e'].shape[-1]}" for path, x in parts.items())
      raise ValueError(f"AdaLoRA: target_rank {target_rank} does not fit {found or 'what trains'}")
    zeros = jax.tree.map(jnp.zeros_like, parts)
    kept = {path: jnp.ones(x["e"].shape, bool) for path, x in parts.items()}
    return AllocationState(
      jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), kept, tx.init(params)
    )

  def update(
    updates: PyTree, state: optax.OptState, params: PyTree | None = None
  ) -> tuple[PyTree, AllocationState]:
    assert isinstance(state, AllocationState)
    if params is None:
      raise ValueError("AdaLoRA: the update needs the parameters, tx.update(grads, state, params)")
    grads = updates
    updates, inner = tx.update(grads, state.inner, params)
    step, parts = state.step + 1, _triplets(params)
    now = jax.tree.map(lambda x, g: jnp.abs(x * g), parts, _triplets(grads))
    learning = step < last_choice

    def smoothed(decay, mean, new):
      return jnp.where(learning, decay * mean + (1 - decay) * new, mean)

    sensitivity = jax.tree.map(lambda m, x: smoothed(beta1, m, x), state.sensitivity, now)
    uncertainty = jax.tree.map(
      lambda m, x, s: smoothed(beta2, m, jnp.abs(x - s)), state.uncertainty, now, sensitivity
    )
    scores = {
      path: _scores(jax.tree.map(jnp.multiply, sensitivity[path], uncertainty[path]))
      for path in parts
    }
    matrices = sum(math.prod(x.shape[:-1]) for x in scores.values())
    triplets = sum(x.size for x in scores.values())
    budget = jnp.asarray(budgets(triplets, target_rank * matrices))[jnp.minimum(step, total_steps)]
    shrinking = (step > first_steps) & (step < last_choice) & (step % every == 0)
    choosing = shrinking | (step == last_choice)
    chosen = _highest(scores, budget)
    kept = {path: jnp.where(choosing, chosen[path], state.kept[path]) for path in parts}
    zeroed = {path: (choosing | (step > last_choice)) & ~kept[path] for path in parts}

    def with_zeros(path, update):
      if path not in parts:
        return update
      # The update that makes the value exactly zero.
      e = jnp.where(zeroed[path], -parts[path]["e"], update.e)
      return dataclasses.replace(update, e=e)

    updates = tree.map_with_path(with_zeros, updates, is_leaf=_is_adalora)
    return updates, AllocationState(step, sensitivity, uncertainty, kept, inner)

  return optax.GradientTransformation(init, update)


def orthogonality(weights: PyTree) -> jax.Array:
  """The mean of ‖PᵀP − 1‖ and ‖QQᵀ − 1‖ over all matrices: zero if P and Q are orthogonal.

  The norm is Frobenius'. It is not squared, as in the authors' code and in PEFT; equation 4 of the
  paper squares it and sums.

  Args:
    weights: a tree with at least one AdaLoRA weight; other leaves are ignored.
  """
  distances = []
  for x in _triplets(weights).values():
    stacks = x["e"].shape[:-1]
    count, rank = math.prod(stacks), x["e"].shape[-1]
    columns = jnp.swapaxes(x["a"].reshape(count, -1, rank), 1, 2)
    for rows in (columns, x["b"].reshape(count, rank, -1)):
      squares = jnp.square(rows @ jnp.swapaxes(rows, 1, 2) - jnp.eye(rank)).sum(axis=(1, 2))
      # The root has no gradient at zero.
      distances.append(jnp.sqrt(jnp.maximum(squares, 1e-12)))
  return jnp.concatenate(distances).mean()


def with_orthogonality(objective: Objective, weight: float) -> Objective:
  """Returns the objective with `weight` times `orthogonality` added to its loss."""

  def penalized(weights: PyTree, batch: Batch, *beside: PyTree) -> tuple[jax.Array, jax.Array]:
    loss, tokens = objective(weights, batch, *beside)
    return loss + weight * orthogonality(weights), tokens

  return penalized


def _is_adalora(x: Any) -> bool:
  return isinstance(x, AdaLoRA)


def _triplets(weights: PyTree) -> dict[str, dict[str, jax.Array]]:
  """`{path: {part: array}}` for the AdaLoRA weights of a tree."""
  leaves = tree.flatten(weights, is_leaf=_is_adalora)
  return {path: x.parts for path, x in leaves.items() if _is_adalora(x)}


def _scores(of: dict[str, jax.Array]) -> jax.Array:
  """The scores [*stack, rank] of triplets, from those of their parameters."""
  stacks = of["e"].ndim - 1
  of_a = of["a"].mean(axis=tuple(range(stacks, of["a"].ndim - 1)))
  of_b = of["b"].mean(axis=tuple(range(stacks + 1, of["b"].ndim)))
  return of["e"] + of_a + of_b


def _highest(scores: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
  """True for the `count` highest scores of all, the first of equal ones; bools in their shapes."""
  joined = jnp.concatenate([x.ravel() for x in scores.values()])
  places = jnp.argsort(jnp.argsort(-joined, stable=True))
  chosen = iter(jnp.split(places < count, np.cumsum([x.size for x in scores.values()])[:-1]))
  return {path: next(chosen).reshape(x.shape) for path, x in scores.items()}
