import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from lora_jax.train.optimizer import adamw, schedule


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
    ({"warmup_steps": 10}, "shorter than the run"),
    ({"warmup_steps": -1}, "at least 0"),
  ],
)
def test_a_wrong_schedule_is_refused(change, words):
  right = {"peak": 0.1, "warmup_steps": 1, "total_steps": 10, "kind": "linear"}
  with pytest.raises(ValueError, match=words):
    schedule(**right | change)


def test_a_clip_norm_that_is_not_positive_is_refused():
  with pytest.raises(ValueError, match=r"math\.inf clips nothing"):
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
