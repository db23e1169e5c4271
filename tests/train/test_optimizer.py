import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers import peft, torch, transformers

import lora_jax
from lora_jax import tree
from lora_jax.train.optimizer import adamw, scale_rates, schedule


def test_the_warmup_rises_linearly_from_above_zero_to_the_peak():
  rate = schedule(peak=0.3, warmup_steps=2, total_steps=10, kind="linear")
  np.testing.assert_allclose([rate(0), rate(1), rate(2)], [0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
  "kind, peer",
  [
    ("linear", transformers.get_linear_schedule_with_warmup),
    ("cosine", transformers.get_cosine_schedule_with_warmup),
  ],
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_after_the_warmup_the_rates_are_those_of_transformers(kind, peer, warmup):
  rate = schedule(peak=0.1, warmup_steps=warmup, total_steps=20, kind=kind)
  optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
  theirs = peer(optimizer, warmup, 20)
  for step in range(20):
    if step >= warmup:
      np.testing.assert_allclose(rate(step), theirs.get_last_lr()[0], rtol=1e-5, err_msg=f"{step}")
    optimizer.step()
    theirs.step()


def test_a_constant_schedule_stays_at_its_peak():
  rate = schedule(peak=0.1, warmup_steps=1, total_steps=5, kind="constant")
  np.testing.assert_allclose([rate(1), rate(2), rate(4)], 0.1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_a_schedule_can_be_asked_for_all_steps_at_once(kind, warmup):
  rate = schedule(peak=0.1, warmup_steps=warmup, total_steps=7, kind=kind)
  at_once = jax.vmap(rate)(jnp.arange(7))
  np.testing.assert_allclose(at_once, [rate(step) for step in range(7)], rtol=1e-6)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"kind": "exponential"}, "'exponential' is unknown; use one of constant, linear, cosine"),
    ({"peak": 0.0}, "must be positive"),
    ({"peak": math.inf}, "must be positive and finite"),
    ({"peak": math.nan}, "must be positive and finite"),
    ({"warmup_steps": 10}, "shorter than the run"),
    ({"warmup_steps": -1}, "at least 0"),
  ],
)
def test_a_wrong_schedule_is_refused(change, words):
  right = {"peak": 0.1, "warmup_steps": 1, "total_steps": 10, "kind": "linear"}
  with pytest.raises(ValueError, match=words):
    schedule(**right | change)


def test_a_clip_norm_that_is_not_positive_is_refused():
  with pytest.raises(ValueError, match=r"math\.inf does not clip"):
    adamw(optax.constant_schedule(0.1), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=0.0)


@pytest.mark.parametrize("clip_norm", [0.5, math.inf])
def test_updates_agree_with_pytorchs_adamw_behind_its_clip(clip_norm):
  rng = np.random.default_rng(0)
  start = rng.normal(size=(4, 3)).astype(np.float32)
  gradients = rng.normal(size=(5, 4, 3)).astype(np.float32)

  theirs = torch.nn.Parameter(torch.tensor(start))
  optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
  tx = adamw(
    optax.constant_schedule(0.01), b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=clip_norm
  )
  ours, opt_state = jnp.array(start), tx.init(jnp.array(start))
  for gradient in gradients:
    theirs.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([theirs], clip_norm)
    optimizer.step()
    updates, opt_state = tx.update(jnp.array(gradient), opt_state, ours)
    ours = optax.apply_updates(ours, updates)
  np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def random(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def test_what_a_pattern_matches_trains_at_its_multiple_of_the_rate():
  params = {"x": {"a": jnp.ones(3), "b": jnp.ones(3)}, "head": jnp.ones(2), "rest": jnp.ones(2)}
  rules = [("x/b", 16.0), ("head", 0.5), ("x/.*|head", 2.0)]
  tx = optax.chain(optax.sgd(0.1), scale_rates(rules))
  updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params))
  factors = jax.tree.map(lambda x: float(x[0] / -0.1), updates)
  wanted = {"x/a": 2.0, "x/b": 16.0, "head": 0.5, "rest": 1.0}
  assert tree.flatten(factors) == pytest.approx(wanted)


def test_a_pattern_of_rates_that_matches_nothing_is_refused_with_what_there_is():
  with pytest.raises(ValueError, match=r"'.\*/b' of learning rates matches nothing .* x/a"):
    scale_rates([(".*/b", 16.0)]).init({"x": {"a": jnp.ones(3)}})


def test_the_rates_keep_the_dtype_of_an_update():
  updates = {"b": jnp.ones(3, jnp.bfloat16)}
  scaled, _ = scale_rates([("b", 0.5)]).update(updates, optax.EmptyState())
  assert scaled["b"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_lora_plus_trains_as_peft_s_optimizer_does():
  x, y = random(16, 6), random(16, 5)
  base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
  theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
  layer = theirs.base_model.model[0]
  params = {"w": jnp.asarray(layer.base_layer.weight.detach().numpy().T)}
  adapters = lora_jax.init(jax.random.key(0), params, {"w": lora_jax.LoRA(rank=2, alpha=4.0)})
  layer.lora_A.default.weight.data = torch.tensor(np.asarray(adapters["w"].a).T)
  optimizer = peft.optimizers.create_loraplus_optimizer(
    theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
  )

  def loss(adapters):
    predict = lora_jax.adapt(lambda p, x: x @ p["w"])
    return jnp.mean((predict(lora_jax.attach(params, adapters), x) - y) ** 2)

  tx = optax.chain(
    adamw(
      optax.constant_schedule(1e-2),
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      weight_decay=0.1,
      clip_norm=math.inf,
    ),
    scale_rates([(".*/b", 16.0)]),
  )
  state = tx.init(adapters)
  for _ in range(5):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(theirs(torch.tensor(x)), torch.tensor(y)).backward()
    optimizer.step()
    updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
    adapters = optax.apply_updates(adapters, updates)
  for part, module in [(adapters["w"].a, layer.lora_A), (adapters["w"].b, layer.lora_B)]:
    np.testing.assert_allclose(part, module.default.weight.detach().numpy().T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"b1": 1.0}, r"b1 1\.0 is not in \[0, 1\)"),
    ({"b2": 2}, r"b2 2 is not in \[0, 1\)"),
    ({"b2": 1 - 1e-12}, r"b2 .* is not in \[0, 1\)"),  # which float32 rounds to 1
    ({"b2": math.nan}, "b2 nan is not finite"),
    ({"eps": 0.0}, r"eps 0\.0 is not above 0"),
    ({"eps": 1e-50}, "eps 1e-50 is not above 0 in float32"),
    ({"eps": math.inf}, "eps inf is not finite"),
    ({"weight_decay": -0.1}, r"weight_decay -0\.1 is below 0"),
    ({"weight_decay": math.nan}, "weight_decay nan is not finite"),
    ({"clip_norm": math.nan}, "clip_norm is nan"),
  ],
)
def test_an_optimiser_with_a_number_out_of_its_range_is_refused(change, words):
  right = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}
  with pytest.raises(ValueError, match=words):
    adamw(optax.constant_schedule(0.1), **right | change)
