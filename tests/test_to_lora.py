"""to_lora: any adapter's change as the nearest plain LoRA of a rank, and what is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.method_table import KERNELS, METHODS
from functions import normal
from jaxprs import full_size_values
from tolerances import assert_close
from weight_table import factors

import lora_jax
from lora_jax import LoRA, LowRank, to_lora

KEY = jax.random.key(0)
SHAPES = {
  "matrix": ((11, 13), "io"),
  "layers": ((3, 11, 13), "sio"),
  "heads": ((11, 3, 5), "ioo"),
  "heads back": ((3, 5, 11), "iio"),
  "convolution": ((3, 3, 5, 13), "iiio"),
  "head": ((13, 11), "oi"),
  "experts on a middle axis": ((11, 3, 13), "iso"),
}
shapes = pytest.mark.parametrize(("shape", "roles"), SHAPES.values(), ids=SHAPES)


def low_rank(shape, roles: str, rank: int, scale: float = 0.5) -> LowRank:
  a, b = factors(shape, roles, seed=1, rank=rank)
  return LowRank(None, a, b, scale, roles=roles.lstrip("s"))


def moved(adapters):
  """The adapters somewhere in training."""
  train, frozen = lora_jax.partition(adapters, lora_jax.trainable_mask(adapters))
  leaves, treedef = jax.tree.flatten(train)
  noise = [0.2 * normal(n + 1, *x.shape)[n] for n, x in enumerate(leaves)]
  leaves = [x + y for x, y in zip(leaves, noise, strict=True)]
  return lora_jax.join(jax.tree.unflatten(treedef, leaves), frozen)


def change(adapters, params) -> dict[str, np.ndarray]:
  merged = lora_jax.merge(params, adapters)
  return {path: np.asarray(merged[path] - params[path], np.float64) for path in adapters}


def matrices(delta: np.ndarray, roles: str) -> np.ndarray:
  """[stack, inputs, outputs] of a change."""
  order = [n for role in "sio" for n, each in enumerate(roles) if each == role]
  sizes = [
    int(np.prod([size for size, each in zip(delta.shape, roles, strict=True) if each == role]))
    for role in "sio"
  ]
  return delta.transpose(order).reshape(sizes)


def nearest(delta: np.ndarray, roles: str, rank: int) -> tuple[np.ndarray, float]:
  """The nearest matrices of a rank, [stack, inputs, outputs], and the relative error."""
  u, s, vt = np.linalg.svd(matrices(delta, roles), full_matrices=False)
  found = np.einsum("sdr,sr,srk->sdk", u[:, :, :rank], s[:, :rank], vt[:, :rank])
  return found, np.linalg.norm(s[:, rank:]) / np.linalg.norm(s)


@shapes
def test_a_larger_lora_is_cut_to_the_nearest_of_a_rank(shape, roles, rank=3):
  adapters = {"w": low_rank(shape, roles, rank=5)}
  params = {"w": jnp.zeros(shape)}
  expected, error = nearest(change(adapters, params)["w"], roles, rank)
  found, errors = to_lora(adapters, rank=rank)
  assert found["w"].rank == rank
  assert_close(jnp.asarray(matrices(change(found, params)["w"], roles)), jnp.asarray(expected))
  np.testing.assert_allclose(errors["w"], error, rtol=1e-5)


def test_a_lora_that_fits_is_returned_as_it_is():
  adapters = {"w": low_rank((11, 13), "io", rank=3)}
  found, errors = to_lora(adapters, rank=3)
  assert_close(found, adapters)
  assert errors["w"] == 0


def test_a_pissa_adapter_becomes_a_lora_of_twice_its_rank_on_the_original_base():
  params = {"w": normal(3, 11, 13)}
  axes = {"w": lora_jax.Axes("sio", ("dot_general",))}
  fresh = lora_jax.init(KEY, params, {"w": lora_jax.PiSSA(rank=2, alpha=2.0)}, axes)
  adapters = moved(fresh)
  found, errors = to_lora(adapters, rank=4)
  assert found["w"].rank == 4 and errors["w"] == 0
  assert_close(lora_jax.merge(params, found), lora_jax.merge(params, adapters))
  _, errors = to_lora(adapters, rank=2)
  _, error = nearest(change(adapters, params)["w"], "sio", 2)
  np.testing.assert_allclose(errors["w"], error, rtol=1e-4)


@pytest.mark.parametrize("name", ["layers", "heads back", "experts on a middle axis"])
def test_a_dora_adapter_is_converted_by_its_change_of_the_base(name):
  shape, roles = SHAPES[name]
  params = {"w": normal(*shape)}
  axes = {"w": lora_jax.Axes(roles, ("dot_general",))}
  adapters = moved(lora_jax.init(KEY, params, {"w": lora_jax.DoRA(rank=2, alpha=3.0)}, axes))
  expected, error = nearest(change(adapters, params)["w"], roles, 3)
  found, errors = to_lora(adapters, params, rank=3)
  zeros = {"w": jnp.zeros(shape)}
  assert_close(jnp.asarray(matrices(change(found, zeros)["w"], roles)), jnp.asarray(expected))
  assert 0.01 < error < 1
  np.testing.assert_allclose(errors["w"], error, rtol=1e-4)


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_a_lora_of_the_full_rank_keeps_the_change_of_every_method(row):
  # Leaves that train in full have no roles, by which layers are known.
  is_matrix = "layers" in row.undefined or isinstance(row.spec, lora_jax.Full)
  kernel = KERNELS["matrix" if is_matrix else "layers"]
  params = {"w": normal(*kernel.shape)}
  axes = {"w": lora_jax.Axes(kernel.roles, ("dot_general",))}
  adapters = moved(lora_jax.init(KEY, params, {"w": row.spec}, axes))
  found, errors = to_lora(adapters, params, rank=11)
  assert errors["w"] < 1e-5
  assert_close(lora_jax.merge(params, found), lora_jax.merge(params, adapters))


def test_the_change_of_a_bfloat16_base_is_not_rounded_to_it():
  params = {"w": normal(11, 13).astype(jnp.bfloat16)}
  wide = {"w": params["w"].astype(jnp.float32)}
  adapters = moved(lora_jax.init(KEY, wide, {"w": lora_jax.DoRA(rank=2, alpha=3.0)}))
  found, errors = to_lora(adapters, params, rank=11)
  assert errors["w"] < 1e-6
  assert_close(lora_jax.merge(wide, found), lora_jax.merge(wide, adapters))


def test_leaves_trained_in_full_become_loras_where_they_are_matrices():
  params = {"w": normal(11, 13)}
  adapters = moved(lora_jax.init(KEY, params, {"w": lora_jax.Full()}))
  found, errors = to_lora(adapters, params, rank=13)
  assert found["w"].rank == 11 and errors["w"] < 1e-6
  assert_close(lora_jax.merge(params, found), lora_jax.merge(params, adapters))


def test_an_adapter_that_changes_nothing_loses_nothing():
  params = {"w": normal(11, 13)}
  for spec in (LoRA(rank=4, alpha=1.0), lora_jax.Full()):
    fresh = lora_jax.init(KEY, params, {"w": spec})
    found, errors = to_lora(fresh, params, rank=2)
    assert errors["w"] == 0
    assert_close(lora_jax.merge(params, found), params)


def test_both_factors_of_the_result_are_of_one_size_to_train_on():
  found, _ = to_lora({"w": low_rank((11, 13), "io", rank=5)}, rank=2)
  a, b = np.asarray(found["w"].a), np.asarray(found["w"].b)
  np.testing.assert_allclose(np.sum(a**2, axis=0), np.sum(b**2, axis=1), rtol=1e-4)


def test_cutting_a_lora_forms_no_matrix():
  adapters = {"w": low_rank((11, 13), "io", rank=5)}
  assert full_size_values(lambda x: to_lora(x, rank=2), (adapters,), {(11, 13)}) == 0


@pytest.mark.parametrize(
  ("params", "words"),
  [
    (None, "w: Full has no low-rank form of its own; pass the params"),
    ({"v": normal(13)}, "w: Full has no low-rank form of its own; pass the params"),
    ({"w": normal(13)}, r"w: Full marks no axis of \(13,\) as an input"),
  ],
)
def test_what_cannot_be_converted_is_refused_with_the_remedy(params, words):
  adapters = lora_jax.init(KEY, {"w": normal(13)}, {"w": lora_jax.Full()})
  with pytest.raises(ValueError, match=words):
    to_lora(adapters, params, rank=2)


def test_a_rank_below_one_is_refused():
  with pytest.raises(ValueError, match="rank 0 is below 1"):
    to_lora({"w": low_rank((11, 13), "io", rank=5)}, rank=0)
