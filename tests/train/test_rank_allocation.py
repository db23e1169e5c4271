"""How AdaLoRA trains: the allocation of ranks against peft's, the penalty, and a whole run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from functions import normal
from jaxprs import compilations
from peers import peft, torch
from tolerances import assert_close

import lora_jax
from lora_jax import AdaLoRA, adapt, attach, init, tree
from lora_jax.train.adalora import allocate_ranks, orthogonality, with_orthogonality
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.step import completion_objective, init_state, make_train_step

KEY = jax.random.key(0)
SPEC = AdaLoRA(rank=4, alpha=6.0)
SCHEDULE = {"target_rank": 2, "total_steps": 14, "first_steps": 3, "last_steps": 4, "every": 2}
BETAS = {"beta1": 0.85, "beta2": 0.7}


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def moved(adapters, seed=0):
  """The adapters somewhere in training."""
  return jax.tree.map(lambda x: x + random(*x.shape, seed=seed), adapters)


# ---- the allocation


class TorchModel(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.up, self.down = torch.nn.Linear(11, 13), torch.nn.Linear(13, 5)


def test_importance_and_choice_are_those_of_peft_s_allocator_on_the_same_gradients():
  config = peft.AdaLoraConfig(
    init_r=4,
    target_r=2,
    lora_alpha=6,
    tinit=3,
    tfinal=4,
    deltaT=2,
    total_step=14,
    target_modules=["up", "down"],
    **BETAS,
  )
  theirs = peft.get_peft_model(TorchModel(), config).base_model
  allocator = peft.tuners.adalora.layer.RankAllocator(theirs, config, "default")
  layers = {"up": theirs.model.up, "down": theirs.model.down}
  params = {name: jnp.zeros((x.in_features, x.out_features)) for name, x in layers.items()}
  adapters = moved(init(KEY, params, dict.fromkeys(params, SPEC)))

  def torch_parts(name):
    layer = layers[name]
    return {part: getattr(layer, f"lora_{part.upper()}").default for part in "aeb"}

  def as_theirs(part, x):
    return torch.tensor(np.asarray(x)[:, None] if part == "e" else np.asarray(x).T)

  for name, adapter in adapters.items():
    for part, parameter in torch_parts(name).items():
      parameter.data = as_theirs(part, getattr(adapter, part))

  rate = 0.05
  tx = allocate_ranks(optax.sgd(rate), **SCHEDULE, **BETAS)
  state = tx.init(adapters)
  update = jax.jit(tx.update)
  left = []
  for step in range(1, 15):
    grads = jax.tree.map(lambda x, step=step: random(*x.shape, seed=step), adapters)
    for name in layers:
      for part, parameter in torch_parts(name).items():
        parameter.grad = as_theirs(part, getattr(grads[name], part))
    # As `update_and_allocate` does it, but with the importance taken before the update, as in the
    # paper's algorithm; peft is called after the optimiser, so it takes it after.
    if step < 10:
      allocator.update_ipt(theirs)
    with torch.no_grad():
      for name in layers:
        for parameter in torch_parts(name).values():
          parameter -= rate * parameter.grad
    budget, choosing = allocator.budget_schedule(step)
    if step == 10 or (choosing and step < 10):
      pattern = allocator.mask_to_budget(theirs, budget)
      assert sum(sum(kept) for kept in pattern.values()) == budget
    elif step > 10:
      allocator.mask_using_rank_pattern(theirs, pattern)

    updates, state = update(grads, state, adapters)
    adapters = optax.apply_updates(adapters, updates)
    for name, adapter in adapters.items():
      for part, parameter in torch_parts(name).items():
        np.testing.assert_allclose(
          as_theirs(part, getattr(adapter, part)),
          parameter.detach(),
          rtol=1e-5,
          atol=1e-6,
          err_msg=f"step {step}: {name}/{part}",
        )
    left.append(sum(int((x.e != 0).sum()) for x in adapters.values()))
  assert left[:3] == [8, 8, 8]
  assert left[-5:] == [4, 4, 4, 4, 4]


def test_the_layers_of_a_stack_have_ranks_of_their_own():
  """A stack does as its layers do when they are leaves of their own."""
  shape, axes = (3, 11, 13), {"w": lora_jax.Axes("sio", ())}
  stacked = moved(init(KEY, {"w": normal(*shape)}, {"w": SPEC}, axes))
  tx = allocate_ranks(optax.sgd(0.05), **SCHEDULE, **BETAS)

  def run(adapters, gradient):
    state = tx.init(adapters)
    for step in range(1, 12):
      updates, state = tx.update(gradient(step), state, adapters)
      adapters = optax.apply_updates(adapters, updates)
    return adapters

  def of_stack(step):
    return jax.tree.map(lambda x: random(*x.shape, seed=step), stacked)

  def layers(adapters):
    one = adapters["w"]
    return {str(n): jax.tree.map(lambda x, n=n: x[n], one) for n in range(3)}

  together = run(stacked, of_stack)
  apart = run(layers(stacked), lambda step: layers(of_stack(step)))
  assert_close(layers(together), apart)
  left = np.asarray((together["w"].e != 0).sum(axis=1))
  assert left.sum() == 6
  assert len(set(left.tolist())) > 1


def test_other_leaves_train_as_the_optimiser_has_it():
  params = {"w": normal(11, 13), "v": normal(5, 7), "bias": jnp.ones(3)}
  specs = {"w": SPEC, "v": lora_jax.LoRA(rank=2, alpha=1.0), "bias": lora_jax.Full()}
  adapters = moved(init(KEY, params, specs))
  grads = moved(adapters, seed=1)
  tx = optax.adam(0.1)
  plain, _ = tx.update(grads, tx.init(adapters), adapters)
  wrapped = allocate_ranks(tx, **SCHEDULE, **BETAS)
  updates, _ = wrapped.update(grads, wrapped.init(adapters), adapters)
  assert_close(updates, plain)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"last_steps": 11}, "leave no time in 14 steps"),
    ({"first_steps": -1}, "leave no time"),
    ({"every": 0}, "every 0 or target_rank 2 is below 1"),
    ({"target_rank": 0}, "target_rank 0 is below 1"),
    ({"beta1": 1.0}, "beta1 1.0 and beta2 0.7 must lie between 0 and 1"),
  ],
)
def test_a_schedule_that_cannot_be_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    allocate_ranks(optax.sgd(0.1), **(SCHEDULE | BETAS | change))


def test_what_has_no_ranks_to_allot_is_refused():
  tx = allocate_ranks(optax.sgd(0.1), **(SCHEDULE | {"target_rank": 5}), **BETAS)
  with pytest.raises(ValueError, match="target_rank 5 does not fit w of rank 4"):
    tx.init(init(KEY, {"w": normal(11, 13)}, {"w": SPEC}))
  with pytest.raises(ValueError, match="target_rank 5 does not fit what trains"):
    tx.init({"w": jnp.ones(3)})


# ---- the penalty


def test_the_penalty_is_peft_s():
  config = peft.AdaLoraConfig(
    init_r=4, target_r=2, total_step=10, target_modules=["up", "down"], orth_reg_weight=0.3
  )
  theirs = peft.get_peft_model(TorchModel(), config).base_model
  params = {"up": jnp.zeros((11, 13)), "down": jnp.zeros((13, 5))}
  adapters = moved(init(KEY, params, dict.fromkeys(params, SPEC)))
  for name, adapter in adapters.items():
    layer = getattr(theirs.model, name)
    layer.lora_A.default.data = torch.tensor(np.asarray(adapter.a).T)
    layer.lora_B.default.data = torch.tensor(np.asarray(adapter.b).T)

  class Output:
    loss = torch.tensor(2.0)

  theirs.model.forward = lambda: Output()
  with torch.no_grad():
    expected = theirs.forward().loss.item()

  def objective(weights, batch):
    return jnp.float32(2.0), jnp.float32(7.0)

  loss, tokens = with_orthogonality(objective, 0.3)(attach(params, adapters), {})
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert tokens == 7


def test_every_layer_of_a_stack_counts_as_a_matrix():
  axes = {"w": lora_jax.Axes("sio", ())}
  stacked = moved(init(KEY, {"w": normal(3, 11, 13)}, {"w": SPEC}, axes))
  layers = {str(n): jax.tree.map(lambda x, n=n: x[n], stacked["w"]) for n in range(3)}
  assert_close(orthogonality(stacked), orthogonality(layers))


def test_vectors_that_are_orthonormal_have_no_penalty_and_a_finite_gradient():
  eye = jnp.eye(6)
  adapters = {"w": lora_jax.weights.AdaLoRA(None, eye[:, :4], jnp.ones(4), eye[:4])}
  assert orthogonality(adapters) < 1e-5
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(orthogonality)(adapters)))


# ---- in a run


def make_run():
  params = tiny_run.make_weights()
  specs = lora_jax.match(params, [("(hidden|head)/kernel", SPEC)])
  weights = attach(params, init(jax.random.key(1), params, specs))
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  tx = allocate_ranks(tiny_run.make_optimizer(), **(SCHEDULE | {"total_steps": 40}), **BETAS)
  apply = adapt(tiny_run.TinyModel().apply, strict=True)
  objective = with_orthogonality(completion_objective(apply), 0.1)
  return init_state(trainable, tx), frozen, make_train_step(objective, tx)


def test_a_run_loses_ranks_as_planned_compiles_once_and_resumes_to_the_bit(tmp_path):
  def train(state, frozen, train_step, batches, steps):
    for _ in range(steps):
      state, metrics = train_step(state, frozen, next(batches))
    return state, float(metrics["loss"])

  def bits(state):
    return {path: np.asarray(x).tobytes() for path, x in tree.flatten(state).items()}

  state, frozen, train_step = make_run()
  batches = tiny_run.CountingBatches(1)
  state, first = train(state, frozen, train_step, batches, 1)
  with compilations() as events:
    whole, last = train(state, frozen, train_step, batches, 39)
  assert not events
  assert last < first
  assert (
    sum(
      int((x.e != 0).sum())
      for x in (whole.trainable["hidden"]["kernel"], whole.trainable["head"]["kernel"])
    )
    == 4
  )

  state, frozen, train_step = make_run()
  like = jax.eval_shape(lambda: state)
  batches = tiny_run.CountingBatches(1)
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    state, _ = train(state, frozen, train_step, batches, 20)
    checkpoints.save(state, batches.get_state())
  with Checkpoints(tmp_path, keep=1, fingerprint="") as checkpoints:
    restored = checkpoints.restore(like)
  batches = tiny_run.CountingBatches(1)
  batches.set_state(restored.data_state)
  resumed, _ = train(restored.state, frozen, train_step, batches, 20)
  assert bits(resumed) == bits(whole)
