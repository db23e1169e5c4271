"""The learning-rate schedule and the optimizer, both plain optax.

    learning_rate = schedule(peak=1e-3, warmup_steps=10, total_steps=100, kind="linear")
    tx = adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    tx = optax.chain(tx, scale_rates([(".*/b", 16.0)]))         # LoRA+
    opt_state = tx.init(trainable)      # `trainable` holds None for every frozen leaf

They do not know what trains: the optimizer is initialized with the trainable part of the tree
alone, so it has no moments for other leaves and applies no weight decay to them.
"""

import math
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import optax

from lora_jax import checks, tree

_DECAYS = {
  "constant": lambda peak, steps: optax.constant_schedule(peak),
  "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
  "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}


def schedule(*, peak: float, warmup_steps: int, total_steps: int, kind: str) -> optax.Schedule:
  """A linear warm-up to `peak`, then a decay that would reach zero at `total_steps`.

  Step i of the warm-up (from 0) has the rate `peak * (i + 1) / (warmup_steps + 1)`, so that the
  first update does not have a rate of zero; step `warmup_steps` has the rate `peak`.

  Args:
    peak: the highest learning rate.
    warmup_steps: steps before the peak, 0 for none.
    total_steps: steps of the whole run, including the warm-up.
    kind: the decay: "constant", "linear" or "cosine".

  Returns:
    A function from the step to the learning rate.

  Raises:
    ValueError: for an unknown kind, a peak that is not positive and finite, or a warm-up as long as
      the run.
  """
  if kind not in _DECAYS:
    raise ValueError(f"schedule kind {kind!r} is unknown; use one of {', '.join(_DECAYS)}")
  if not 0 < peak < math.inf:
    raise ValueError(f"the peak learning rate is {peak}; it must be positive and finite")
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"warmup_steps is {warmup_steps} and total_steps {total_steps}; "
      "the warm-up must be at least 0 and shorter than the run"
    )
  decay = _DECAYS[kind](peak, total_steps - warmup_steps)
  if warmup_steps == 0:
    return decay
  warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([warmup, decay], boundaries=[warmup_steps])


def adamw(
  learning_rate: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW after a clip of the global gradient norm.

  Args:
    learning_rate: maps the step to the rate, as `schedule` returns it.
    b1: decay of the mean of the gradient, in [0, 1).
    b2: decay of the mean of its square, in [0, 1).
    eps: added to the root of the second moment; positive.
    weight_decay: decoupled, multiplied by the learning rate; 0 or more.
    clip_norm: the largest global norm of a gradient; `math.inf` does not clip.

  Raises:
    ValueError: if one of them is out of range.

  Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2; Pascanu et
  al., "On the difficulty of training recurrent neural networks", algorithm 1, for the clip.
  """
  checks.fraction("adamw: b1", b1)
  checks.fraction("adamw: b2", b2)
  checks.positive("adamw: eps", eps)
  checks.finite("adamw: weight_decay", weight_decay, least=0)
  if not clip_norm > 0:
    raise ValueError(f"clip_norm is {clip_norm}; it must be positive (math.inf does not clip)")
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )


def scale_rates(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  """Learning-rate groups: the leaves at some paths train at a multiple of the learning rate.

  Place it after the optimizer: it multiplies the whole update, including weight decay.

  Args:
    rules: ordered (pattern, factor) pairs; the first whose pattern matches a path decides, and
      paths without a match keep their rate. A pattern is a regular expression for the whole path,
      down to the part of an adapter: `block_0/attn/query/kernel/b`. So LoRA+ is `[(".*/b", 16.0)]`.
      (Haiku calls biases b too: if one of them trains in full, use `".*/w/b"`.)

  Raises:
    ValueError: at `init`, if a pattern matches nothing that trains.

  Source of LoRA+: Hayou et al. 2024, arXiv 2402.12354, section 4.
  """

  rules = checks.rules(rules, int | float, "factor", '[(".*/b", 16.0)]')
  for pattern, factor in rules:
    checks.finite(f"the factor of the pattern {pattern!r}", factor)

  def factors(paths: Collection[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pattern, factor in rules:
      hits = tree.matching(pattern, paths)
      if not hits:
        raise ValueError(
          f"the pattern {pattern!r} of learning rates matches nothing that trains; there are "
          + ", ".join(list(paths)[:5])
        )
      for path in hits:
        found.setdefault(path, factor)
    return found

  def init(params):
    factors(tree.flatten(params))
    return optax.EmptyState()

  def update(updates, state, params=None):
    of = factors(tree.flatten(updates))
    scaled = tree.map_with_path(
      lambda path, x: x * jnp.asarray(of[path], x.dtype) if path in of else x, updates
    )
    return scaled, state

  return optax.GradientTransformation(init, update)
