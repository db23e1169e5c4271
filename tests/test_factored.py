"""Factored: a kernel that is two thin factors, alone and as the base of an adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import full_size_values
from programs import PROGRAMS
from tolerances import assert_close
from weight_table import WEIGHTS, factored, low_rank, with_weights

import lora_jax
from lora_jax import adapt, cost, materialize
from lora_jax.weights import Factored

A_FEW = (
  "jit",
  "scan over layers",
  "vmap over a stack",
  "convolution, the channels first",
  "experts by ragged_dot",
  "one of a stack, traced",
)


@pytest.mark.parametrize("name", A_FEW)
def test_a_function_of_factored_kernels_is_that_of_their_products_and_forms_none(name):
  program = PROGRAMS[name]
  params = with_weights(program.params, program.roles, WEIGHTS["factored"])
  strict = adapt(program.f, strict=True)
  assert_close(strict(params, program.x), program.f(materialize(params), program.x))
  matrices = {
    tuple(n for n, role in zip(w.shape, w.all_roles, strict=True) if role != "s")
    for w in jax.tree.leaves(params, is_leaf=lora_jax.is_weight)
    if lora_jax.is_weight(w)
  }
  assert full_size_values(strict, (params, program.x), matrices) == 0


def test_a_product_costs_the_rank_times_inputs_and_outputs():
  w = Factored(normal(11, 2), normal(2, 13))
  jaxpr = jax.make_jaxpr(adapt(lambda w, x: x @ w))(w, normal(3, 11))
  assert cost.flops(jaxpr) == 2 * 3 * 2 * (11 + 13)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_rows_are_looked_up_and_those_out_of_bounds_are_filled_as_those_of_an_array(mode):
  w = Factored(normal(17, 2), normal(2, 7))
  ids = jnp.array([[0, 16], [17, -18]])

  def look_up(w):
    return jnp.take(w, ids, axis=0, mode=mode)

  np.testing.assert_allclose(adapt(look_up)(w), look_up(w.materialize()), rtol=1e-5, atol=1e-6)


def test_a_product_has_the_type_that_the_array_s_would_have():
  w = factored(normal(11, 13).astype(jnp.bfloat16), "io")
  x = normal(3, 11)

  def f(w):
    y = x.astype(jnp.bfloat16) @ w
    return y, jnp.matmul(x, w), jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

  assert_close(adapt(f, strict=True)(w), f(w.materialize()), "bfloat16")


def test_an_adapter_on_it_trains_and_it_does_not():
  params = {"w": factored(normal(11, 13), "io")}
  specs = lora_jax.match(params, [("w", lora_jax.LoRA(rank=1, alpha=1.0))])
  weights = lora_jax.attach(params, lora_jax.init(jax.random.key(0), params, specs))
  trains, rest = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  assert [leaf.shape for leaf in jax.tree.leaves(trains)] == [(11, 1), (1, 13)]
  assert [leaf.shape for leaf in jax.tree.leaves(rest)] == [(11, 2), (2, 13)]
  healed = low_rank(params["w"], "io", seed=1)
  expected = np.float64(params["w"].a) @ np.float64(params["w"].b) + np.float64(healed.delta())
  np.testing.assert_allclose(healed.materialize(), expected, rtol=1e-5, atol=1e-6)


def test_its_factors_are_sharded_as_the_axes_that_they_have():
  specs = factored(normal(3, 11, 13), "sio").partition_specs(jax.P(None, "fsdp", "tensor"))
  assert (specs.a, specs.b) == (jax.P(None, "fsdp", None), jax.P(None, None, "tensor"))
