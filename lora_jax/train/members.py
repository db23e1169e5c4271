"""Many adapters trained at once on one base: `vmap` of the training step over its members.

    adapters = stack([adapters_0, adapters_1, ...])        # of any ranks and scales
    state, frozen = init(params, adapters, settings, make_tx)
    train_step = make_train_step(objective, make_tx)
    state, metrics = train_step(state, frozen, batches)    # one batch for each member
    adapters_1 = unstack(state, frozen, 1, like=adapters_1)

Every array of the members has a leading axis of members. The base has none: there is one copy, and
its products are computed for the rows of all members together. The differences between members are
data of one compiled program: the learning rate of every step, the number of steps, the scale and
the rank (see `lora_jax.weights.masked`), the random key of dropout, and the batch.

A member computes the same as if it were trained alone, up to rounding. A member whose loss or
gradient is no longer finite, or that has done all its steps, stays unchanged while others continue.

JAX has no `vmap` of `ragged_dot` over adapters alone. Members of a base with experts therefore take
turns in each step, by a loop in the same program: on one base, and in the time of separate runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.attachment import attach, detach, trainable_mask
from lora_jax.axes import Axes
from lora_jax.train import step
from lora_jax.train.step import State
from lora_jax.tree import join, partition
from lora_jax.weights import Adapted, LowRank, Recentred
from lora_jax.weights.masked import Masked

PyTree = Any
Adapters = Mapping[str, Adapted]
MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]


class Settings(NamedTuple):
  """The settings that differ between members; M members, S steps of the longest.

  Attributes:
    steps: int32 [M], the number of steps of each.
    rates: float32 [M, S], the learning rate of each at each of its steps.
    dropout_keys: random keys [M], as `lora_jax.train.step.make_update` takes one; None without
      dropout.
  """

  steps: jax.Array
  rates: jax.Array
  dropout_keys: jax.Array | None


class Members(NamedTuple):
  """All that a step changes.

  Attributes:
    step: int32 scalar, the number of common steps so far.
    states: a `State` whose arrays have a leading axis of members; its own `step` counts the updates
      of each.
    diverged: bool [M], True for a member with a loss or gradient that was not finite.
  """

  step: jax.Array
  states: State
  diverged: jax.Array


class Frozen(NamedTuple):
  """All that a step does not change.

  Attributes:
    params: the base, shared by all members.
    adapters: the parts of the adapters that do not train, with a leading axis of members.
    settings: the members' settings.
  """

  params: PyTree
  adapters: dict[str, Adapted]
  settings: Settings


def in_turn(axes: Mapping[str, Axes]) -> bool:
  """True if members must take turns in each step, since their base has experts.

  axes: the result of `lora_jax.trace_axes`.
  """
  return any("ragged_dot_general" in found.uses for found in axes.values())


def stack(members: Sequence[Adapters]) -> dict[str, Adapted]:
  """Stacks the adapters of all members in one structure, with a leading axis of members.

  Adapters of one structure are stacked unchanged. LoRAs that differ in rank or scale become
  `Masked`, of the largest rank. (`lora_jax.stack` is for trained adapters: it multiplies scales
  into b, with which an optimizer would take other steps.)

  Args:
    members: `{path: adapter}` of each, at least one.

  Raises:
    ValueError: if members adapt different leaves, or one of their kinds cannot be stacked.
  """
  if not members:
    raise ValueError("there are no members to train")
  for n, each in enumerate(members):
    if each.keys() != members[0].keys():
      odd = sorted(each.keys() ^ members[0].keys())
      raise ValueError(f"members 0 and {n} do not adapt the same leaves: {', '.join(odd[:5])}")
  return {path: _stacked(path, [each[path].unseal() for each in members]) for path in members[0]}


def unstack(state: Members, frozen: Frozen, member: int, like: Adapters) -> dict[str, Adapted]:
  """Returns one member's adapters, as `lora_jax.detach` returns them after training it alone.

  Args:
    state: the state of the members.
    frozen: their frozen part.
    member: the member's index.
    like: the adapters that were stacked at that index, or their shapes.
  """
  adapters = _adapters_of(state, frozen, member)
  return {path: _unmasked(x, like[path]).seal() for path, x in adapters.items()}


def member_weights(state: Members, frozen: Frozen, member: int) -> PyTree:
  """The tree of the base with one member's adapters; the structure is the same for all members."""
  return attach(frozen.params, _adapters_of(state, frozen, member))


def init(
  params: PyTree, adapters: Adapters, settings: Settings, make_tx: MakeOptimizer
) -> tuple[Members, Frozen]:
  """Returns the state before the first step, and the frozen part.

  Args:
    params: the base.
    adapters: the result of `stack`.
    settings: the members' settings.
    make_tx: maps a learning rate to the optimizer.
  """

  def one(params: PyTree, adapters: Adapters) -> tuple[step.State, PyTree]:
    # The part of `attach` that depends on the base alone (DoRA's norm) is computed only once.
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
    objective: as in `lora_jax.train.step.make_update`, on the whole weights of one member.
    make_tx: maps a learning rate to the optimizer. It must not depend on the rate's value, which is
      traced in the step.
    parts: as in `make_update`.
    shardings: of the new state, as in `lora_jax.train.step.make_train_step`.
    in_turn: True for one member after another in a step, instead of all at once.

  Returns:
    The step. Its batch is that of each member, stacked. Its metrics are arrays [M]: `loss`,
    `grad_norm` and `loss_tokens` as in `make_train_step` of `lora_jax.train.step`, NaN for a member
    without an update, and `finite` (bool), False for a member that has diverged by this step.
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
      states, diverged, adapters, settings, batch = own
      return one(states, diverged, adapters, settings, frozen.params, batch)

    own = (state.states, state.diverged, frozen.adapters, frozen.settings, batch)
    each = jax.lax.map(of_member, own) if in_turn else jax.vmap(of_member)(own)
    states, diverged, metrics = each
    return Members(state.step + 1, states, diverged), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _adapters_of(state: Members, frozen: Frozen, member: int) -> dict[str, Adapted]:
  return jax.tree.map(lambda x: x[member], join(state.states.trainable, frozen.adapters))


def _stacked(path: str, adapters: Sequence[Adapted]) -> Adapted:
  """The adapters of one leaf in all members, stacked."""
  for adapter in adapters:
    if isinstance(adapter, Recentred):
      raise ValueError(
        f"{path}: {type(adapter).__name__} (PiSSA, OLoRA) takes its start out of the base, so that "
        "every member has a base of its own; train these one by one, or use LoRA instead"
      )
  if len({_form(adapter) for adapter in adapters}) > 1:
    plain = [adapter for adapter in adapters if type(adapter) is LowRank]
    if len(plain) < len(adapters):
      kinds = "; ".join(dict.fromkeys(map(_describe, adapters)))
      raise ValueError(
        f"{path}: only LoRA can be masked to a common rank and scale, and the members have {kinds};"
        " let them differ only in the seed, the learning rate and the steps"
      )
    if len({(adapter.dropout, adapter.frozen) for adapter in plain}) > 1:
      each = "; ".join(f"dropout {x.dropout}, frozen {x.frozen}" for x in plain)
      raise ValueError(f"{path}: members must drop and freeze alike, and these have {each}")
    rank = max(adapter.rank for adapter in plain)
    adapters = [Masked.of(adapter, rank) for adapter in plain]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)


def _unmasked(adapter: Adapted, like: Adapted) -> Adapted:
  """A member's adapter with its rank and scale from before masking."""
  if not isinstance(adapter, Masked):
    return adapter
  assert isinstance(like, LowRank)  # only these are masked
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
