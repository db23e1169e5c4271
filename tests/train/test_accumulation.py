import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jaxprs import compilations, equations
from tolerances import assert_close

from lora_jax import compat
from lora_jax.train.accumulation import accumulated
from lora_jax.train.step import completion_objective, init_state, make_train_step
from lora_jax.tree import join, partition


def uneven_batch():
  """Eight rows of which some have few tokens that count, and the first of every four none."""
  batches = tiny_run.CountingBatches(1)
  rows = [next(batches) for _ in range(2)]
  batch = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
  batch["weights"] = np.array([[0, 0], [1, 0], [1, 1], [1, 1]] * 2, np.float32)
  return batch


def parts_of_model():
  weights = tiny_run.make_weights()
  return partition(weights, tiny_run.trainable_mask(weights))


def loss_of_model(frozen):
  objective = completion_objective(tiny_run.TinyModel().apply)
  return lambda trainable, batch, part: objective(join(trainable, frozen), batch)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_have_the_loss_and_the_gradient_of_the_whole_batch(parts):
  trainable, frozen = parts_of_model()
  loss_of, batch = loss_of_model(frozen), uneven_batch()
  (loss, tokens), grads = jax.jit(accumulated(loss_of, parts))(trainable, batch)
  (expected, count), expected_grads = jax.value_and_grad(loss_of, has_aux=True)(trainable, batch, 0)
  assert (tokens, count) == (10, 10)
  assert_close(loss, expected)
  assert_close(grads, expected_grads)


def test_a_mean_of_the_parts_means_would_be_another_loss():
  trainable, frozen = parts_of_model()
  loss_of, batch = loss_of_model(frozen), uneven_batch()
  whole, _ = loss_of(trainable, batch, 0)
  parts = [{name: rows[n::4] for name, rows in batch.items()} for n in range(4)]
  means = [loss_of(trainable, part, n)[0] for n, part in enumerate(parts)]
  assert abs(np.mean(means) - whole) > 0.1


def test_a_part_takes_rows_from_all_over_the_batch_and_knows_its_number():
  def loss_of(trainable, batch, part):
    return trainable * jnp.prod(batch["rows"]) * 10.0**part, jnp.float32(1)

  value_and_grad = accumulated(loss_of, 3)
  rows = jnp.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
  (loss, tokens), grad = value_and_grad(jnp.float32(1), {"rows": rows})
  expected = (2 * 7 + 10 * 3 * 11 + 100 * 5 * 13) / 3
  assert_close((loss, tokens, grad), tuple(map(jnp.float32, (expected, 3, expected))))
  jaxpr = jax.make_jaxpr(value_and_grad)(jnp.float32(1), {"rows": rows})
  assert [eqn.primitive.name for eqn in equations(jaxpr)].count("scan") == 1


def test_a_batch_in_which_nothing_counts_has_loss_zero_and_no_gradient():
  trainable, frozen = parts_of_model()
  batch = uneven_batch()
  batch["weights"] = np.zeros_like(batch["weights"])
  (loss, tokens), grads = accumulated(loss_of_model(frozen), 2)(trainable, batch)
  assert (loss, tokens) == (0, 0)
  assert not any(np.any(grad) for grad in jax.tree.leaves(grads))


def test_a_run_in_parts_is_the_run_of_whole_batches_and_compiles_once():
  trainable, frozen = parts_of_model()
  tx = tiny_run.make_optimizer()
  objective = completion_objective(tiny_run.TinyModel().apply)
  states = []
  for parts in (1, 4):
    state, train_step = init_state(trainable, tx), make_train_step(objective, tx, parts=parts)
    state, first = train_step(state, frozen, uneven_batch())
    with compilations() as compiled:
      for _ in range(5):
        state, last = train_step(state, frozen, uneven_batch())
    assert compiled == []
    states.append((state.trainable, first["loss"], last["loss"], last["loss_tokens"]))
  assert_close(states[1], states[0])
  assert states[0][2] < states[0][1]


def test_what_is_held_for_all_parts_is_one_float32_array_for_each_that_trains():
  trainable, frozen = parts_of_model()
  trainable["hidden"]["kernel"] = trainable["hidden"]["kernel"].astype(jnp.bfloat16)
  value_and_grad = accumulated(loss_of_model(frozen), 4)
  _, grads = jax.eval_shape(value_and_grad, trainable, uneven_batch())
  assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, trainable)

  jaxpr = jax.make_jaxpr(value_and_grad)(trainable, uneven_batch())
  (scan,) = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
  carry = [(v.aval.shape, v.aval.dtype) for v in scan.outvars]
  leaves = jax.tree.leaves(trainable)
  assert sorted(carry) == sorted([((), np.float32)] * 2 + [(x.shape, np.float32) for x in leaves])
  assert len(scan.outvars) == compat.scan_counts(**scan.params)[1]  # nothing is kept of any part


def test_a_step_in_parts_needs_less_memory_than_the_whole_batch():
  def temporary(parts):
    def loss_of(trainable, batch, part):
      x = batch["x"]
      for _ in range(4):
        x = jnp.sin(x @ trainable)
      return jnp.sum(x), jnp.float32(len(x))

    arguments = jnp.zeros((8, 8)), {"x": jnp.zeros((512, 8))}
    compiled = jax.jit(accumulated(loss_of, parts)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # A copy of the inputs, by which they are cut, is there at any number of parts.
  assert temporary(8) < 0.5 * temporary(1)


def test_it_composes_with_any_optimiser_and_objective():
  target = jnp.arange(3.0)

  def objective(weights, batch):
    return jnp.mean(jnp.square(batch["x"] * weights["w"] - target)), jnp.float32(len(batch["x"]))

  tx = optax.sgd(0.1)
  state = init_state({"w": jnp.ones(3)}, tx)
  batch = {"x": np.arange(12.0, dtype=np.float32).reshape(4, 3)}
  expected = jax.grad(lambda w: objective({"w": w}, batch)[0])(jnp.ones(3))
  state, _ = make_train_step(objective, tx, parts=2)(state, {"w": None}, batch)
  assert_close(state.trainable["w"], jnp.ones(3) - 0.1 * expected)


def test_rows_that_cannot_be_cut_and_less_than_one_part_are_refused():
  with pytest.raises(ValueError, match="a batch of 8 rows has no 3 equal parts"):
    accumulated(lambda *_: (0.0, 1.0), 3)(jnp.ones(2), {"x": jnp.ones((8, 2))})
  with pytest.raises(ValueError, match="parts is 0; a batch has at least 1 part"):
    accumulated(lambda *_: (0.0, 1.0), 0)
