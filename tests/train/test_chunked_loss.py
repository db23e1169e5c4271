import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations, primitives
from tolerances import assert_close

import lora_jax
from lora_jax.models import llama
from lora_jax.train import evaluation
from lora_jax.train.chunked_loss import chunked_completion_objective
from lora_jax.train.step import completion_objective

ROWS, LENGTH, CHUNK, VOCAB = 2, 11, 4, 89  # no two sizes are alike, and 4 does not divide 11
TINY = llama.LlamaConfig(
  vocab_size=VOCAB,
  width=24,
  mlp_width=40,
  num_layers=1,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  max_length=64,
)
HEADS = {
  "untied and frozen": (False, ".*mlp/up/kernel"),
  "untied and adapted": (False, "head/kernel"),
  "tied and frozen": (True, ".*mlp/up/kernel"),
  "tied and adapted": (True, "embed/embedding"),
}


def make_batch():
  rng = np.random.default_rng(0)
  return {
    "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
    "at": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    "targets": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
    "weights": (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32),
  }


@functools.cache
def make_case(head):
  """The adapted `apply`, and the parts of the weights that train and that do not."""
  tied, target = HEADS[head]
  model = llama.Llama(dataclasses.replace(TINY, tie_embeddings=tied))
  tokens = make_batch()["tokens"]
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  specs = lora_jax.match(params, [(target, lora_jax.LoRA(rank=2, alpha=4.0))], axes)
  adapters = lora_jax.init(jax.random.key(1), params, specs, axes)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # B is zero at the start
  weights = lora_jax.attach(params, adapters)
  mask = lora_jax.trainable_mask(weights, also=["norm/scale"])
  return lora_jax.adapt(model.apply), *lora_jax.partition(weights, mask)


def value_and_grad(objective, frozen):
  def loss_of(trainable, batch):
    return objective(lora_jax.join(trainable, frozen), batch)

  return jax.value_and_grad(loss_of, has_aux=True)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_and_its_gradient_are_those_of_the_whole_logits(head):
  apply, trainable, frozen = make_case(head)
  chunked = value_and_grad(chunked_completion_objective(apply, CHUNK), frozen)
  whole = value_and_grad(completion_objective(apply), frozen)
  expected = jax.jit(whole)(trainable, make_batch())
  assert_close(jax.jit(chunked)(trainable, make_batch()), expected)
  assert all(np.any(grad) for grad in jax.tree.leaves(expected[1]))


def largest_logits(objective, head):
  """The most rows of logits that one value of the gradient's program holds."""
  _, trainable, frozen = make_case(head)
  jaxpr = jax.make_jaxpr(value_and_grad(objective, frozen))(trainable, make_batch())
  shapes = [v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars]
  # What has the vocabulary as an axis beside the width or the rank is an embedding, no logits.
  logits = [s for s in shapes if VOCAB in s and not {TINY.width, 2} & set(s[-2:])]
  return max(np.prod(shape, dtype=int) // VOCAB for shape in logits)


@pytest.mark.parametrize("head", HEADS)
def test_no_value_forward_or_backward_has_the_logits_of_more_than_a_chunk(head):
  apply, _, _ = make_case(head)
  assert largest_logits(completion_objective(apply), head) == ROWS * LENGTH
  assert largest_logits(chunked_completion_objective(apply, CHUNK), head) == ROWS * CHUNK


def test_a_head_that_trains_in_full_has_the_gradient_of_the_whole_logits():
  apply, trainable, frozen = make_case("untied and frozen")
  trainable = jax.tree.map(lambda x: x, trainable) | {"head": frozen["head"]}
  frozen = frozen | {"head": {"kernel": None}}
  (_, expected), (_, grads) = (
    jax.jit(value_and_grad(objective, frozen))(trainable, make_batch())
    for objective in (completion_objective(apply), chunked_completion_objective(apply, CHUNK))
  )
  assert_close(grads["head"], expected["head"])
  assert np.any(expected["head"]["kernel"])


def test_a_batch_in_which_nothing_counts_has_loss_zero_and_no_gradient():
  apply, trainable, frozen = make_case("tied and frozen")
  batch = make_batch() | {"weights": np.zeros((ROWS, LENGTH), np.float32)}
  objective = chunked_completion_objective(apply, CHUNK)
  (loss, tokens), grads = jax.jit(value_and_grad(objective, frozen))(trainable, batch)
  assert (loss, tokens) == (0, 0)
  assert not any(np.any(grad) for grad in jax.tree.leaves(grads))


def test_an_evaluation_in_chunks_has_the_numbers_of_one_of_the_whole_logits():
  apply, trainable, frozen = make_case("tied and adapted")
  weights, batch = lora_jax.join(trainable, frozen), make_batch()
  batch["weights"][:, 0] = 1  # a row whose first is no target only fills the batch
  choices = sorted(set(batch["targets"][:, 0].tolist()))
  whole = evaluation.evaluate(evaluation.make_eval_step(apply, choices), weights, [batch])
  step = evaluation.make_eval_step(apply, choices, CHUNK)
  assert evaluation.evaluate(step, weights, [batch]) == pytest.approx(whole, rel=1e-6)
  shapes = {
    var.aval.shape
    for equation in equations(jax.make_jaxpr(step)(weights, batch))
    for var in equation.outvars
  }
  assert (ROWS, CHUNK, VOCAB) in shapes and (ROWS, LENGTH, VOCAB) not in shapes


def test_a_chunk_that_holds_all_positions_is_the_plain_loss():
  apply, trainable, frozen = make_case("tied and frozen")
  objectives = completion_objective(apply), chunked_completion_objective(apply, LENGTH)
  plain, chunked = (
    primitives(value_and_grad(objective, frozen), trainable, make_batch())
    for objective in objectives
  )
  assert chunked == plain


def test_the_compiled_step_needs_less_memory():
  def temporary(make_objective, *options):
    config = dataclasses.replace(TINY, vocab_size=5000)
    model = llama.Llama(config)
    tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    batch = dict.fromkeys(("tokens", "at", "targets"), tokens)
    batch["weights"] = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    objective = make_objective(model.apply, *options)
    gradient = jax.jit(jax.grad(lambda norm, p, b: objective(p | {"norm": norm}, b)[0]))
    compiled = gradient.lower(params["norm"], params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 8 * 32 * 5000 * 4
  assert temporary(completion_objective) > logits
  assert temporary(chunked_completion_objective, 4) < 0.5 * logits


def test_less_than_one_position_is_refused():
  with pytest.raises(ValueError, match="chunk is 0; it must be at least 1 position"):
    chunked_completion_objective(lambda *_: None, 0)
