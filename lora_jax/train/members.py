"""Many adapters trained at once on one base: `vmap` of the training step over its members.

    adapters = stack([adapters_0, adapters_1, ...])        # of any ranks and scales
    state, frozen = init(params, adapters, settings, make_tx)
    train_step = make_train_step(objective, make_tx)
    state, metrics = train_step(state, frozen, batches)    # the batch of every member
    adapters_1 = unstack(state, frozen, 1, like=adapters_1)

Every array that belongs to a member has an axis of members first. The base has none: it is there
once, and its products are taken for the rows of all members together. What members differ in is
data of one compiled program: the learning rate of every step, the number of steps, the scale and
the rank (see `lora_jax.weights.masked`), the random key of dropout, and the batch.

A member computes what it would compute if it were trained alone, to rounding. One whose loss or
gradient is no longer finite, or that has made its own steps, stays as it is while others go on.

JAX has no `vmap` of `ragged_dot` over adapters alone. Members of a base with experts take each step
in turn, by a loop in the same program: on one base, and as long as one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.axes import Axes
from lora_jax.train import step
from lora_jax.transform import attach, detach, trainable_mask
from lora_jax.tree import join, partition
from lora_jax.weights import Adapted, LowRank, Recentred
from lora_jax.weights.masked import Masked

PyTree = Any
Adapters = Mapping[str, Adapted]
MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]


class Settings(NamedTuple):
  """What members differ in beside their adapters and batches; M members, S steps of the longest.

  Attributes:
    steps: int32 [M], how many each makes.
    rates: float32 [M, S], the learning rate of each at each of its steps.
    dropout_keys: random keys [M], as `lora_jax.train.step.make_update` takes one; None where
      nothing is dropped.
  """

  steps: jax.Array
  rates: jax.Array
  dropout_keys: jax.Array | None


class Members(NamedTuple):
  """All that a step changes.

  Attributes:
    step: int32 scalar, the steps behind all of them together.
    states: a `State` whose arrays have an axis of members first; its own `step` counts the updates
      of each.
    diverged: bool [M], whether a loss or gradient of it was not finite.
  """

  step: jax.Array
  states: step.State
  diverged: jax.Array


class Frozen(NamedTuple):
  """What a step does not change.

  Attributes:
    params: the base, shared by all.
    adapters: the parts of the adapters that do not train, with an axis of members.
    settings: of the members.
  """

  params: PyTree
  adapters: dict[str, Adapted]
  settings: Settings


def in_turn(axes: Mapping[str, Axes]) -> bool:
  """Whether members have to take each step in turn: their base has experts.

  axes: what `lora_jax.trace_axes` found.
  """
  return any("ragged_dot_general" in found.uses for found in axes.values())


def stack(members: Sequence[Adapters]) -> dict[str, Adapted]:
  """The adapters of all members in one structure, each array with an axis of members first.

  Adapters of one structure are stacked as they are. LoRAs that differ in rank or scale are made
  `Masked`, of the largest rank. (`lora_jax.stack` is for adapters that were trained: it takes their
  scales for a part of b, whose optimizer would then take other steps.)

  Args:
    members: `{path: adapter}` of each, at least one.

  Raises:
    ValueError: when members adapt different leaves, or a kind of theirs cannot be stacked.
  """
  if not members:
    raise ValueError("there are no members to train")
  for n, each in enumerate(members):
    if each.keys() != members[0].keys():
      odd = sorted(each.keys() ^ members[0].keys())
      raise ValueError(f"members 0 and {n} do not adapt the same leaves: {', '.join(odd[:5])}")
  return {path: _stacked(path, [each[path].unseal() for each in members]) for path in members[0]}


def unstack(state: Members, frozen: Frozen, member: int, like: Adapters) -> dict[str, Adapted]:
  """One member's adapters, as `lora_jax.detach` gives them after a training alone.

  Args:
    state: of a training.
    frozen: of the same training.
    member: its place.
    like: what was stacked in its place, or the shapes of it.
  """
  adapters = _adapters_of(state, frozen, member)
  return {path: _unmasked(x, like[path]).seal() for path, x in adapters.items()}


def member_weights(state: Members, frozen: Frozen, member: int) -> PyTree:
  """The tree of the base with one member's adapters; of one structure for all members."""
  return attach(frozen.params, _adapters_of(state, frozen, member))


def init(
  params: PyTree, adapters: Adapters, settings: Settings, make_tx: MakeOptimizer
) -> tuple[Members, Frozen]:
  """What is before the first step.

  Args:
    params: the base.
    adapters: as `stack` makes them.
    settings: of the members.
    make_tx: from a learning rate to the optimizer.
  """

  def one(params: PyTree, adapters: Adapters) -> tuple[step.State, PyTree]:
    # What `attach` computes of the base (DoRA's norm) is computed once, and not at each step.
    adapters = detach(attach(params, adapters), adapters)
    trainable, rest = partition(adapters, trainable_mask(adapters))
    return step.init_state(trainable, make_tx(optax.constant_schedule(0.0))), rest

  states, rest = jax.jit(jax.vmap(one, in_axes=(None, 0)))(params, adapters)
  diverged = jnp.zeros(settings.steps.shape, bool)
  return Members(jnp.zeros((), jnp.int32), states, diverged), Frozen(params, rest, settings)


def make_train_step(
  objective: step.Objective,
  make_tx: MakeOptimizer,
  *,
  parts: int = 1,
  shardings: Members | None = None,
  in_turn: bool = False,
) -> Callable:
  """Makes the jitted step `(state, frozen, batch) -> (state, metrics)`; the state is donated.

  Args:
    objective: as `lora_jax.train.step.make_update` takes it, of the whole weights of one member.
    make_tx: from a learning rate to the optimizer. It may not depend on the rate's values: within
      the step they are traced.
    parts: as in `make_update`.
    shardings: of the new state, as in `lora_jax.train.step.make_train_step`.
    in_turn: whether a step is taken by one member after another, and not by all at once.

  Returns:
    The step. Its batch is that of each member, stacked. Its metrics are arrays [M]: `loss`,
    `grad_norm` and `loss_tokens` as there, NaN for a member that was not updated, and `finite`
    (bool), False for one that has diverged at this step or before.
  """

  def one(state, diverged, adapters, settings, params, batch):
    def of_adapters(adapters: Adapters, batch: step.Batch):
      return objective(attach(params, adapters), batch)

    update = step.make_update(
      of_adapters,
      make_tx(lambda count: settings.rates[count]),
      parts=parts,
      dropout_key=settings.dropout_keys,
    )
    updated, metrics = update(state, adapters, batch)
    going_on = ~diverged & (state.step < settings.steps)
    finite = metrics.pop("finite")
    state = jax.tree.map(lambda new, old: jnp.where(going_on, new, old), updated, state)
    diverged |= going_on & ~finite
    metrics = {
      name: jnp.where(going_on & finite, value, jnp.nan) for name, value in metrics.items()
    }
    return state, diverged, metrics | {"finite": ~diverged}

  def train_step(state: Members, frozen: Frozen, batch: step.Batch):
    def of_member(own):
      return one(*own[:-1], frozen.params, own[-1])

    own = (state.states, state.diverged, frozen.adapters, frozen.settings, batch)
    each = jax.lax.map(of_member, own) if in_turn else jax.vmap(of_member)(own)
    states, diverged, metrics = each
    return Members(state.step + 1, states, diverged), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _adapters_of(state: Members, frozen: Frozen, member: int) -> dict[str, Adapted]:
  return jax.tree.map(lambda x: x[member], join(state.states.trainable, frozen.adapters))


def _stacked(path: str, adapters: Sequence[Adapted]) -> Adapted:
  """One leaf's adapters of all members."""
  for adapter in adapters:
    if isinstance(adapter, Recentred):
      raise ValueError(
        f"{path}: {type(adapter).__name__} (PiSSA, OLoRA) takes its start out of the base, so that "
        "every member has a base of its own; train these one by one, or LoRA in its place"
      )
  if len({_form(adapter) for adapter in adapters}) > 1:
    if any(type(adapter) is not LowRank for adapter in adapters):
      kinds = "; ".join(dict.fromkeys(map(_describe, adapters)))
      raise ValueError(
        f"{path}: only LoRA can be masked to a common rank and scale, and the members have {kinds};"
        " let them differ in the seed, the learning rate and the steps alone"
      )
    if len({(adapter.dropout, adapter.frozen) for adapter in adapters}) > 1:
      each = "; ".join(f"dropout {x.dropout}, frozen {x.frozen}" for x in adapters)
      raise ValueError(f"{path}: members drop and freeze alike, and these have {each}")
    rank = max(adapter.rank for adapter in adapters)
    adapters = [Masked.of(adapter, rank) for adapter in adapters]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)


def _unmasked(adapter: Adapted, like: Adapted) -> Adapted:
  """A member's adapter with the rank and the scale that it had before it was masked."""
  if not isinstance(adapter, Masked):
    return adapter
  stacks = adapter.gate.ndim - 1
  before_rank = (slice(None),) * stacks
  return LowRank(
    None,
    adapter.a[..., : like.rank],
    adapter.b[(*before_rank, slice(like.rank))],
    like.scale,
    dropout=like.dropout,
    roles=like.roles,
    frozen=like.frozen,
  )


def _form(adapter: Adapted) -> tuple:
  leaves, structure = jax.tree.flatten(adapter)
  return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def _describe(adapter: Adapted) -> str:
  shapes = " and ".join(str(tuple(part.shape)) for part in adapter.parts.values())
  return f"{type(adapter).__name__} of {shapes}"
