"""Distillation against its formula in float64, and a student that shares the teacher's base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import lora_jax
from lora_jax.compress import pruning
from lora_jax.train import distillation, step

rng = np.random.default_rng(0)
STUDENT, TEACHER = (rng.standard_normal((2, 3, 5)) for _ in range(2))
WEIGHTS = np.array([[1.0, 1, 0], [1, 0, 0]])
TARGETS = rng.integers(0, 5, (2, 3))
BATCH = {"targets": jnp.asarray(TARGETS), "weights": jnp.asarray(WEIGHTS, jnp.float32)}


def kl(student, teacher, temperature):
  p, q = special.softmax(teacher / temperature, -1), special.softmax(student / temperature, -1)
  losses = special.rel_entr(p, q).sum(-1)
  return temperature**2 * (losses * WEIGHTS).sum() / WEIGHTS.sum()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_the_softened_distributions_where_positions_count(temperature):
  found = distillation.divergence(
    jnp.asarray(STUDENT, jnp.float32),
    jnp.asarray(TEACHER, jnp.float32),
    BATCH["weights"],
    temperature,
  )
  assert float(found) == pytest.approx(kl(STUDENT, TEACHER, temperature), rel=1e-5)


def test_the_objective_weighs_teacher_targets_and_hidden_states():
  states = rng.standard_normal((2, 2, 3, 4))
  objective = distillation.distillation_objective(
    lambda w, batch: (w["student"], states[0]),
    lambda w, batch: (w["teacher"], states[1]),
    temperature=2.0,
    hard=0.25,
    hidden=0.5,
  )
  weights = {"student": jnp.asarray(STUDENT), "teacher": jnp.asarray(TEACHER)}
  loss, tokens = objective(weights, BATCH)
  own = -np.take_along_axis(special.log_softmax(STUDENT, -1), TARGETS[..., None], -1)[..., 0]
  squares = ((states[0] - states[1]) ** 2).mean(-1)
  expected = (
    0.75 * kl(STUDENT, TEACHER, 2.0)
    + 0.25 * (own * WEIGHTS).sum() / 3
    + 0.5 * (squares * WEIGHTS).sum() / 3
  )
  assert (float(loss), float(tokens)) == (pytest.approx(expected, rel=1e-5), 3)
  gradient = jax.grad(lambda w: objective(w, BATCH)[0])(weights)
  assert gradient["student"].any() and not gradient["teacher"].any()


def test_a_student_learns_from_the_base_that_it_shares_with_its_teacher():
  """The teacher is the base without the adapter, which a step away from it finds back to it."""
  params = {"w": jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)}
  x = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
  adapters = lora_jax.init(jax.random.key(0), params, {"w": lora_jax.LoRA(rank=2, alpha=2.0)})
  moved = jax.tree.map(
    lambda leaf: leaf + jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), adapters
  )
  weights = lora_jax.attach(params, moved)
  assert distillation.without_adapters(weights)["w"] is params["w"]
  apply = lora_jax.adapt(lambda p: x @ p["w"])
  objective = distillation.distillation_objective(
    lambda weights, batch: apply(weights),
    lambda weights, batch: apply(distillation.without_adapters(weights)),
  )
  tx = optax.adam(3e-2)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  state = step.init_state(trainable, tx)
  train_step = step.make_train_step(objective, tx)
  losses = []
  for _ in range(100):
    state, metrics = train_step(state, frozen, BATCH)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.05 * losses[0]


def test_the_base_of_a_pruned_leaf_stays_pruned():
  params = {"w": jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)}
  params = pruning.prune(params, ["w"], pruning.magnitude, pruning.n_of_m(2, 4))
  adapters = lora_jax.init(jax.random.key(0), params, {"w": lora_jax.LoRA(rank=2, alpha=2.0)})
  found = distillation.without_adapters(lora_jax.attach(params, adapters))
  assert jax.tree.structure(found) == jax.tree.structure(params)
  np.testing.assert_array_equal(found["w"].materialize(), params["w"].materialize())


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda f: distillation.distillation_objective(f, f, temperature=0.0), "must be above 0"),
    (lambda f: distillation.distillation_objective(f, f, hard=2.0), "from 0 to 1"),
    (
      lambda f: distillation.distillation_objective(f, f, hidden=1.0)(None, BATCH),
      "only its logits",
    ),
    (
      lambda f: distillation.without_adapters(
        lora_jax.attach(
          {"w": jnp.eye(4)},
          lora_jax.init(
            jax.random.key(0), {"w": jnp.eye(4)}, {"w": lora_jax.PiSSA(rank=1, alpha=1.0)}
          ),
        )
      ),
      "w: holds the residual",
    ),
  ],
)
def test_what_cannot_be_distilled_is_refused_with_the_reason(make, words):
  with pytest.raises(ValueError, match=words):
    make(lambda weights, batch: jnp.zeros((2, 3, 5)))
