"""AdaLoRA's weight and how it starts; how it trains is tests/train/test_rank_allocation.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from tolerances import assert_close

import lora_jax
from lora_jax import AdaLoRA, init

KEY = jax.random.key(0)
SPEC = AdaLoRA(rank=4, alpha=6.0)


def test_it_starts_as_in_peft_with_small_vectors_and_no_singular_values():
  adapter = init(KEY, {"w": jnp.zeros((400, 300))}, {"w": SPEC})["w"]
  assert not adapter.e.any()
  assert adapter.scale == 1.5
  for part in (adapter.a, adapter.b):
    np.testing.assert_allclose(part.std(), 0.02, rtol=0.05)
  assert abs(np.corrcoef(adapter.a[:300, 0], adapter.b[0])[0, 1]) < 0.3


@pytest.mark.parametrize("shape", [(11, 13), (3, 11, 13)])
def test_the_plain_lora_of_it_has_the_ranks_that_are_left_and_the_same_change(shape):
  params, axes = {"w": normal(*shape)}, {"w": lora_jax.Axes("sio"[-len(shape) :], ())}
  adapter = init(KEY, params, {"w": SPEC}, axes)["w"]
  adapter = jax.tree.map(lambda x: x + normal(*x.shape), adapter)
  pattern = np.array([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])[: 1 if len(shape) == 2 else 3]
  pruned = dataclasses.replace(adapter, e=adapter.e * pattern.reshape(adapter.e.shape))
  plain = pruned.as_low_rank()
  assert isinstance(plain, lora_jax.LowRank)
  assert plain.rank == 2
  assert_close(plain.attach(params["w"], "w").delta(), pruned.attach(params["w"], "w").delta())


def test_a_matrix_without_any_rank_left_is_a_lora_of_rank_one_that_changes_nothing():
  plain = init(KEY, {"w": normal(11, 13)}, {"w": SPEC})["w"].as_low_rank()
  assert plain.rank == 1
  assert not plain.attach(normal(11, 13), "w").delta().any()
