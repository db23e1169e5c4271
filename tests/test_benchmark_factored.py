"""The benchmark of factors: what it builds and what it times."""

import jax.numpy as jnp
import pytest
from functions import normal
from main_programs import imported

import lora_jax
from lora_jax.compress import report


@pytest.fixture(scope="module")
def program():
  return imported("benchmarks.factored")


def test_kernels_get_factors_of_a_share_of_their_numbers_and_the_head_stays_dense(program):
  params = {"mlp": {"up": {"kernel": normal(3, 64, 96)}}, "head": {"kernel": normal(64, 7)}}
  found = program.factored(params, 0.5)
  kernel = found["mlp"]["up"]["kernel"]
  assert kernel.shape == (3, 64, 96) and kernel.rank == round(0.5 * 64 * 96 / 160)
  assert report.count_parameters(kernel) == pytest.approx(0.5 * 3 * 64 * 96, rel=0.03)
  assert found["head"]["kernel"] is params["head"]["kernel"]


def test_every_candidate_is_timed(program):
  params = {"w": normal(4, 4)}
  apply = lora_jax.adapt(lambda variables, x: x @ variables["params"]["w"])
  found = program.timed(apply, {"dense": params, "other": params}, jnp.ones((2, 4)), 2)
  assert set(found) == {"dense", "other"} and min(found.values()) > 0
