"""Many adapters in one program, against each of them trained alone by the plain step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA
from lora_jax.models.experts import ExpertConfig, Experts
from lora_jax.train import members, optimizer, step
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.tree import flatten

TARGETS = "(hidden|head)/kernel"
STEPS = 8


class Member(NamedTuple):
  """What one member is trained with, alone or among others."""

  spec: lora_jax.adapters.Method
  seed: int = 0
  peak: float = 0.05
  steps: int = STEPS

  @property
  def schedule(self):
    return optimizer.schedule(peak=self.peak, warmup_steps=2, total_steps=self.steps, kind="linear")

  @property
  def dropout_key(self):
    return jax.random.key(self.seed) if getattr(self.spec, "dropout", 0) else None

  def start(self):
    params = tiny_run.make_weights()
    specs = lora_jax.match(params, [(TARGETS, self.spec)])
    return lora_jax.init(jax.random.key(self.seed), params, specs)


DIFFERENT = (
  Member(LoRA(rank=1, alpha=2.0), seed=3),
  Member(LoRA(rank=4, alpha=3.0), seed=1, peak=0.01),
  Member(LoRA(rank=2, alpha=4.0, rslora=True), seed=2, steps=5),
  Member(LoRA(rank=4, alpha=3.0), seed=1, peak=0.02),
)


def make_tx(learning_rate):
  return optimizer.adamw(learning_rate, **tiny_run.ADAMW)


def objective():
  return step.completion_objective(lora_jax.adapt(tiny_run.TinyModel().apply))


def batches(seed, count=STEPS):
  endless = tiny_run.CountingBatches(seed)
  return [next(endless) for _ in range(count)]


def settings_of(each):
  rates = [np.array(jax.vmap(m.schedule)(jnp.arange(m.steps))) for m in each]
  longest = max(m.steps for m in each)
  keys = [m.dropout_key for m in each]
  return members.Settings(
    steps=jnp.array([m.steps for m in each], jnp.int32),
    rates=jnp.array([np.pad(r, (0, longest - len(r))) for r in rates]),
    dropout_keys=None if keys[0] is None else jnp.stack(keys),
  )


def start_of(each):
  starts = [m.start() for m in each]
  state, frozen = members.init(
    tiny_run.make_weights(), members.stack(starts), settings_of(each), make_tx
  )
  return state, frozen, starts


def stacked_batches(each):
  streams = [batches(m.seed) for m in each]
  return [
    jax.tree.map(lambda *xs: np.stack(xs), *at_step) for at_step in zip(*streams, strict=True)
  ]


@functools.cache
def train_together(each, parts=1):
  """Returns (state, frozen, starts, the metrics of every step)."""
  state, frozen, starts = start_of(each)
  train_step = members.make_train_step(objective(), make_tx, parts=parts)
  found = []
  for batch in stacked_batches(each):
    state, metrics = train_step(state, frozen, batch)
    found.append(jax.device_get(metrics))
  return state, frozen, starts, found


def train_alone(member, parts=1):
  """Returns (adapters, the metrics of every step)."""
  params, start = tiny_run.make_weights(), member.start()
  weights = lora_jax.attach(params, start)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  tx = make_tx(member.schedule)
  train_step = step.make_train_step(objective(), tx, parts=parts, dropout_key=member.dropout_key)
  state, found = step.init_state(trainable, tx), []
  for batch in batches(member.seed)[: member.steps]:
    state, metrics = train_step(state, frozen, batch)
    found.append(jax.device_get(metrics))
  return lora_jax.detach(lora_jax.join(state.trainable, frozen), start), found


def assert_as_alone(each, parts=1):
  state, frozen, starts, together = train_together(each, parts)
  for n, member in enumerate(each):
    adapters, alone = train_alone(member, parts)
    mine = members.unstack(state, frozen, n, like=starts[n])
    assert_close(mine, adapters)
    for name in ("loss", "grad_norm", "loss_tokens"):
      found = [metrics[name][n] for metrics in together[: member.steps]]
      np.testing.assert_allclose(found, [metrics[name] for metrics in alone], rtol=1e-5)


def test_members_of_different_rank_alpha_rate_seed_and_steps_are_what_each_is_alone():
  assert_as_alone(DIFFERENT)


@pytest.mark.parametrize(
  "specs",
  [
    pytest.param(
      (LoRA(rank=1, alpha=2.0, dropout=0.3), LoRA(rank=3, alpha=1.0, dropout=0.3)),
      id="dropout",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      (LoRA(rank=1, alpha=2.0, train_a=False), LoRA(rank=3, alpha=1.0, train_a=False)),
      id="LoRA-FA",
      marks=pytest.mark.slow,
    ),
    pytest.param((lora_jax.DoRA(rank=2, alpha=3.0),) * 2, id="DoRA", marks=pytest.mark.slow),
    pytest.param((lora_jax.VeRA(rank=4),) * 2, id="VeRA", marks=pytest.mark.slow),
    pytest.param((lora_jax.LoKr(rank=2, alpha=3.0),) * 2, id="LoKr", marks=pytest.mark.slow),
    pytest.param((lora_jax.Full(),) * 2, id="full", marks=pytest.mark.slow),
  ],
)
def test_members_of_other_methods_are_what_each_is_alone(specs):
  each = (Member(spec, seed=n, peak=0.03 + 0.01 * n) for n, spec in enumerate(specs))
  assert_as_alone(tuple(each))


@pytest.mark.slow
def test_members_accumulate_gradients_as_each_does_alone():
  assert_as_alone(DIFFERENT[:2], parts=2)


def test_what_fills_a_rank_up_stays_exactly_zero():
  state, *_ = train_together(DIFFERENT)
  ((path, a), *_) = [(p, x) for p, x in flatten(state.states.trainable).items() if p.endswith("/a")]
  assert a.shape[0] == 4 and a.shape[-1] == 4, path
  assert np.any(a[0, ..., 0]) and not np.any(a[0, ..., 1:])
  moments = [x for p, x in flatten(state.states.opt_state).items() if p.endswith(path)]
  assert len(moments) == 2 and not any(np.any(x[0, ..., 1:]) for x in moments)


def test_a_member_that_made_its_own_steps_keeps_its_bits_while_others_go_on():
  each = DIFFERENT[1:3]
  state, frozen, _, metrics = train_together(each)
  np.testing.assert_array_equal(state.states.step, [8, 5])
  updated = [list(np.isfinite(m["loss"])) for m in metrics]
  assert updated == [[True, True]] * 5 + [[True, False]] * 3
  assert all(np.all(m["finite"]) for m in metrics)
  state, frozen, _ = start_of(each)
  train_step = members.make_train_step(objective(), make_tx)
  for n, batch in enumerate(stacked_batches(each)):
    if n == 5:
      before = bits_of(state, 1), bits_of(state, 0)
    state, _ = train_step(state, frozen, batch)
  assert bits_of(state, 1) == before[0]
  assert bits_of(state, 0) != before[1]


def bits_of(state, member):
  return {path: np.asarray(x[member]).tobytes() for path, x in flatten(state.states).items()}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_member_that_diverges_is_frozen_for_good_and_the_others_never_notice(value):
  each = [Member(LoRA(rank=2, alpha=4.0), seed=n) for n in range(3)]
  train_step = members.make_train_step(objective(), make_tx)
  ends = {}
  for poisoned in (False, True):
    state, frozen, _ = start_of(each)
    for n, batch in enumerate(stacked_batches(each)):
      if poisoned and n == 3:
        before = bits_of(state, 1)
        batch["weights"][1, 0, 0] = value
      state, metrics = train_step(state, frozen, batch)
    ends[poisoned] = state
  np.testing.assert_array_equal(state.diverged, [False, True, False])
  np.testing.assert_array_equal(metrics["finite"], [True, False, True])
  np.testing.assert_array_equal(np.isnan(metrics["loss"]), [False, True, False])
  np.testing.assert_array_equal(state.states.step, [8, 3, 8])
  assert bits_of(state, 1) == before
  for member in (0, 2):
    assert bits_of(ends[True], member) == bits_of(ends[False], member)


def test_a_second_step_compiles_nothing_and_the_base_is_an_argument_without_an_axis_of_members():
  state, frozen, _ = start_of(DIFFERENT)
  base = {path: leaf.shape for path, leaf in flatten(tiny_run.make_weights()).items()}
  assert {path: leaf.shape for path, leaf in flatten(frozen.params).items()} == base
  traces = []

  def counted(weights, batch):
    traces.append(batch)
    return objective()(weights, batch)

  train_step = members.make_train_step(counted, make_tx)
  first, *rest = stacked_batches(DIFFERENT)
  jaxpr = jax.make_jaxpr(train_step)(state, frozen, first)
  assert sum(np.size(constant) for constant in jaxpr.consts) < tiny_run.WIDTH
  state, _ = train_step(state, frozen, first)
  once = len(traces)
  for batch in rest:
    state, _ = train_step(state, frozen, batch)
  assert len(traces) == once


def test_a_sweep_that_is_saved_and_restored_is_the_same_sweep(tmp_path):
  whole, frozen, _, _ = train_together(DIFFERENT)
  train_step = members.make_train_step(objective(), make_tx)
  state, frozen, _ = start_of(DIFFERENT)
  for batch in stacked_batches(DIFFERENT)[:6]:
    state, _ = train_step(state, frozen, batch)
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    checkpoints.save(state, {})
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    state = checkpoints.restore(start_of(DIFFERENT)[0]).state
  for batch in stacked_batches(DIFFERENT)[6:]:
    state, _ = train_step(state, frozen, batch)
  ours, wanted = flatten(state), flatten(whole)
  assert ours.keys() == wanted.keys()
  for path in wanted:
    assert np.asarray(ours[path]).tobytes() == np.asarray(wanted[path]).tobytes(), path


def test_the_weights_of_a_member_are_the_base_with_its_adapters():
  state, frozen, starts, _ = train_together(DIFFERENT)
  for n in range(len(DIFFERENT)):
    mine = members.unstack(state, frozen, n, like=starts[n])
    merged = lora_jax.merge(tiny_run.make_weights(), mine)
    assert_close(lora_jax.materialize(members.member_weights(state, frozen, n)), merged)


@pytest.mark.slow
def test_members_of_a_base_with_experts_take_turns_and_are_what_each_is_alone():
  module = Experts(ExpertConfig(num_experts=4, per_token=2, width=6))
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, STEPS, 3, 5, 8)).astype(np.float32)
  params = module.init(jax.random.key(0), x[0])["params"]
  axes = lora_jax.trace_axes(lambda p, x: module.apply({"params": p}, x), params, x[0])
  assert members.in_turn(axes)
  apply = lora_jax.adapt(module.apply, strict=True)

  def squares(weights, batch):
    x, y = batch
    return jnp.mean((apply({"params": weights}, x) - y) ** 2), jnp.float32(y.size)

  each = [
    Member(LoRA(rank=2, alpha=4.0), seed=1),
    Member(LoRA(rank=3, alpha=1.0), seed=2, steps=5),
  ]
  starts = [
    lora_jax.init(
      jax.random.key(m.seed), params, lora_jax.match(params, [("all-linear", m.spec)], axes), axes
    )
    for m in each
  ]
  batches = [(np.stack([x[i], -x[i]]), np.stack([y[i], y[i]])) for i in range(STEPS)]
  state, frozen = members.init(params, members.stack(starts), settings_of(each), make_tx)
  train_step, losses = members.make_train_step(squares, make_tx, in_turn=True), []
  for batch in batches:
    state, metrics = train_step(state, frozen, batch)
    losses.append(metrics["loss"])
  assert train_step._cache_size() == 1
  for n, m in enumerate(each):
    weights = lora_jax.attach(params, starts[n])
    trainable, rest = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
    tx, alone = make_tx(m.schedule), []
    one, alone_step = step.init_state(trainable, tx), step.make_train_step(squares, tx)
    for x_, y_ in batches[: m.steps]:
      one, metrics = alone_step(one, rest, (x_[n], y_[n]))
      alone.append(metrics["loss"])
    np.testing.assert_allclose([x[n] for x in losses[: m.steps]], alone, rtol=1e-5)
    assert_close(
      members.unstack(state, frozen, n, like=starts[n]),
      lora_jax.detach(lora_jax.join(one.trainable, rest), starts[n]),
    )
  assert not members.in_turn(
    lora_jax.trace_axes(lambda params, x: x @ params["w"][0], {"w": jnp.ones((2, 8, 3))}, x[0])
  )


def test_members_in_turn_are_those_together():
  together = train_together(DIFFERENT)[0]
  train_step = members.make_train_step(objective(), make_tx, in_turn=True)
  state, frozen, _ = start_of(DIFFERENT)
  for batch in stacked_batches(DIFFERENT):
    state, _ = train_step(state, frozen, batch)
  assert_close(state.states.trainable, together.states.trainable)


def test_what_cannot_be_stacked_is_refused_with_the_reason():
  def starts(*specs):
    return [Member(spec).start() for spec in specs]

  with pytest.raises(ValueError, match="no members"):
    members.stack([])
  with pytest.raises(ValueError, match=r"kernel: only LoRA can be masked .* DoRA of .*seed"):
    members.stack(starts(lora_jax.DoRA(rank=2, alpha=1.0), lora_jax.DoRA(rank=3, alpha=1.0)))
  with pytest.raises(ValueError, match=r"kernel: Recentred .* a base of its own"):
    members.stack(starts(*[lora_jax.PiSSA(rank=2, alpha=1.0)] * 2))
  one, other = starts(LoRA(rank=2, alpha=1.0), LoRA(rank=2, alpha=1.0))
  other.pop("head/kernel")
  with pytest.raises(ValueError, match="members 0 and 1 do not adapt the same leaves: head/kernel"):
    members.stack([one, other])
  with pytest.raises(ValueError, match=r"alike.* dropout 0\.0, .* dropout 0\.5"):
    members.stack(starts(LoRA(rank=1, alpha=1.0), LoRA(rank=2, alpha=1.0, dropout=0.5)))
