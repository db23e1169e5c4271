"""The effect of each kernel's error on the loss, and ranks that allocate a budget by it.

    inputs    = lora_jax.second_moments(f, params, paths, batches, axes=axes)
    gradients = sensitivity.gradient_moments(loss, params, paths, batches, axes=axes)
    whitened  = factorization.Whitened(inputs, gradients)
    losses    = factorize.tails(params, paths, whitened, axes=axes)
    costs     = {path: sensitivity.parameters(shape, axes) ...}
    ranks     = sensitivity.allocate(losses, costs, budget)

An error E of a kernel changes its results by x E. To second order, with inputs and gradients
assumed independent, it changes the loss by half of

    E[(xᵀ E g)²] = tr(Eᵀ C E G),     C = E[x xᵀ],  G = E[g gᵀ]

(Martens and Grosse 2015, K-FAC, arXiv 1503.05671, section 3). The unit is the same for all kernels,
so ranks can be compared between kernels.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax import tree
from lora_jax.axes import Axes, roles_of
from lora_jax.targets import axes_of
from lora_jax.transform import adapt
from lora_jax.weights import is_weight
from lora_jax.weights.factor_axes import part_sizes
from lora_jax.weights.gradient_probe import GradientProbe

PyTree = Any


def gradient_moments(
  loss: Callable,
  params: PyTree,
  paths: Iterable[str],
  batches: Iterable[PyTree],
  *,
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, np.ndarray]:
  """Returns `{path: the sum of g gᵀ}`, g the loss gradient by a kernel's results, in float32.

  One program is compiled for each shape of batch; it holds k² values for a kernel of k outputs.

  Args:
    loss: `loss(params, batch)`, a scalar: the sum, not the mean, of the rows' losses, so that the
      rows' gradients are independent of the batch size.
    params: the first argument of `loss`; Weights may be among the leaves.
    paths: the kernels: leaves that are used in products.
    batches: the second arguments of `loss`; each is read once.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `paths`.

  Raises:
    ValueError: if a path is not a leaf, if there is no batch, or if no gradient reaches the results
      of a kernel, or if it is used in an operation other than a product.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  paths = paths if isinstance(paths, Mapping) else tuple(paths)
  axes = axes_of(paths, axes, leaves)
  missing = sorted(set(paths) - set(leaves))
  if missing:
    raise ValueError(f"the tree has no leaf at {', '.join(missing)}, to compute gradients for")
  roles = {path: roles_of(path, leaves, axes) for path in paths}
  slots = {path: _slot(leaves[path].shape, roles[path]) for path in paths}
  probed = adapt(loss)

  @jax.jit
  def moments(params, batch):
    def result(slots):
      def probe(path, leaf):
        if path not in slots:
          return leaf
        return GradientProbe(leaf, slots[path], roles=roles[path].lstrip("s"), path=path)

      return probed(tree.map_with_path(probe, params, is_leaf=is_weight), batch)

    return jax.grad(result)(slots)

  totals = None
  for batch in batches:
    found = jax.device_get(moments(params, batch))
    totals = found if totals is None else jax.tree.map(np.add, totals, found)
  if totals is None:
    raise ValueError("there is no batch to compute the moments of gradients from")
  unseen = [path for path in paths if not totals[path].any()]
  if unseen:
    raise ValueError(
      f"no gradient reached the results of {', '.join(unseen)}: the loss does not depend on them, "
      "or not by a product that keeps their outputs apart"
    )
  return {path: _square(total) for path, total in totals.items()}


def _slot(shape, roles: str) -> jax.Array:
  stack, outputs = (part_sizes(shape, roles, role, 0) for role in "so")
  return jnp.zeros((*stack, math.prod(outputs) ** 2))


def _square(total: np.ndarray) -> np.ndarray:
  k = math.isqrt(total.shape[-1])
  return total.reshape(*total.shape[:-1], k, k)


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a kernel: dense, and as factors of a rank.

  dense: the cost of the dense kernel.
  per_rank: the cost of each rank of its factors.
  fixed: the fixed cost of two factors.
  """

  dense: float
  per_rank: float
  fixed: float = 0.0

  def at(self, rank: int | None) -> float:
    """The cost at a rank; None is the dense kernel."""
    return self.dense if rank is None else self.fixed + self.per_rank * rank


def parameters(stack: int, d: int, k: int) -> Cost:
  """The stored values of `stack` kernels of d inputs and k outputs."""
  return Cost(dense=stack * d * k, per_rank=stack * (d + k))


def flops(stack: int, d: int, k: int, rows: int) -> Cost:
  """The floating-point operations of a forward pass with `rows` rows for each kernel."""
  return Cost(dense=2 * rows * stack * d * k, per_rank=2 * rows * stack * (d + k))


def milliseconds(
  stack: int, d: int, k: int, rows: int, *, dtype: DTypeLike = jnp.float32, repeats: int = 10
) -> Cost:
  """The time of a product on this device: measured dense and at two ranks, linear in between."""
  whole = min(d, k)
  ranks = max(whole // 8, 1), max(whole // 2, 2)
  x = jnp.ones((rows, d), dtype)
  dense = _time(lambda x, w: x @ w, x, jnp.ones((d, k), dtype), repeats=repeats)
  low, high = (
    _time(
      lambda x, a, b: (x @ a) @ b,
      x,
      jnp.ones((d, r), dtype),
      jnp.ones((r, k), dtype),
      repeats=repeats,
    )
    for r in ranks
  )
  per_rank = max((high - low) / (ranks[1] - ranks[0]), 0.0)
  fixed = max(low - per_rank * ranks[0], 0.0)
  return Cost(dense=stack * dense, per_rank=stack * per_rank, fixed=stack * fixed)


def _time(f: Callable, *args, repeats: int) -> float:
  """The median time of a call, in milliseconds, without the first call."""
  run = jax.jit(f)
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(1000 * (time.perf_counter() - start))
  return float(np.median(times))


def check_budget(costs: Mapping[str, Cost], budget: float, multiple: int = 1) -> None:
  """Raises ValueError where `allocate` would, before losses are computed."""
  if multiple < 1:
    raise ValueError(f"ranks cannot be multiples of {multiple}; give 1 or more")
  least = sum(min(cost.at(multiple), cost.dense) for cost in costs.values())
  whole = sum(cost.dense for cost in costs.values())
  if not budget >= least:
    raise ValueError(
      f"the budget {budget:,.4g} cannot be met: with rank {multiple} everywhere the kernels cost "
      f"{least:,.4g}, dense {whole:,.4g}"
    )


def allocate(
  losses: Mapping[str, np.ndarray],
  costs: Mapping[str, Cost],
  budget: float,
  *,
  multiple: int = 1,
) -> dict[str, int]:
  """Allocates ranks that minimize the total loss within a budget for the total cost.

      minimize Σ loss[path][rank]   subject to   Σ cost[path](rank) ≤ budget

  Uses a price λ of the cost: each kernel takes the rank with the least loss + λ cost, and the price
  rises until the budget holds. The remaining budget goes to the ranks that gain most.

  Args:
    losses: `{path: [n + 1]}`, the loss at the ranks 0 ... n; a dense kernel has no loss.
    costs: `{path: Cost}`.
    budget: the largest total cost.
    multiple: every rank is a multiple of this, as suits 2:4 zeros (4) and the tiles of processors
      (8 to 128).

  Returns:
    `{path: rank}`, without the kernels that stay dense: dense kernels are better than factors that
    cost as much. No rank is below 1.

  Raises:
    ValueError: if even the lowest rank everywhere costs more.
  """
  check_budget(costs, budget, multiple)
  # The options of each kernel: every rank that costs less than the dense kernel, then dense.
  options = {}
  for path, loss in losses.items():
    cost = costs[path]
    ranks = [n for n in range(multiple, len(loss), multiple) if cost.at(n) < cost.dense]
    options[path] = (
      np.array([*(cost.at(rank) for rank in ranks), cost.dense]),
      np.array([*(loss[rank] for rank in ranks), 0.0]),
      [*ranks, None],
    )

  def chosen(price: float) -> dict[str, int]:
    return {path: int(np.argmin(loss + price * cost)) for path, (cost, loss, _) in options.items()}

  def total(choice: Mapping[str, int]) -> float:
    return sum(options[path][0][n] for path, n in choice.items())

  low, high = 0.0, 1.0
  while total(chosen(high)) > budget and high < 1e30:
    high *= 4
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (low, middle) if total(chosen(middle)) <= budget else (middle, high)
  choice = chosen(high)
  if total(choice) > budget:  # measured times need not decrease with the rank
    raise ValueError(
      f"the budget {budget:,.4g} cannot be met: the kernels cost {total(choice):,.4g} at the ranks "
      "that cost least"
    )
  _spend(choice, options, budget - total(choice))
  ranks = {path: options[path][2][n] for path, n in choice.items()}
  return {path: rank for path, rank in ranks.items() if rank is not None}


def _spend(choice: dict[str, int], options: Mapping[str, tuple], left: float) -> None:
  """Raises ranks one by one, those with the largest gain per cost first, while budget is left."""
  while True:
    best, gain = None, 0.0
    for path, n in choice.items():
      cost, loss, _ = options[path]
      if n + 1 < len(cost) and cost[n + 1] - cost[n] <= left:
        each = (loss[n] - loss[n + 1]) / max(cost[n + 1] - cost[n], 1e-30)
        if each > gain:
          best, gain = path, each
    if best is None:
      return
    cost = options[best][0]
    left -= cost[choice[best] + 1] - cost[choice[best]]
    choice[best] += 1
