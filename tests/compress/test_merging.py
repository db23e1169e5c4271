"""What is merged into arrays for other programs, and what stays what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from weight_table import factors, low_rank

import lora_jax
from lora_jax.compress import merging
from lora_jax.weights import Factored, Full, LowRank, Pruned, is_weight
from lora_jax.weights.quantized import Format, quantized

HALF = normal(8, 6).astype(jnp.bfloat16)
A, B = normal(8, 2), normal(2, 6)
MASK = jnp.abs(HALF) > 0.5
CODED = quantized(HALF, Format(levels="int8"), (-2,))
FACTORED = Factored(A.astype(jnp.bfloat16)[:, :1], B.astype(jnp.bfloat16)[:1])


def wide(x) -> np.ndarray:
  return np.asarray(x, np.float64)


CODES = wide(CODED.astype(jnp.float32).materialize())
CASES = {
  "array": (HALF, wide(HALF)),
  "adapted": (LowRank(HALF, A, B, 0.5), wide(HALF) + 0.5 * wide(A) @ wide(B)),
  "in full": (Full(HALF, normal(8, 6)), wide(HALF) + wide(normal(8, 6))),
  "coded": (CODED, CODES),
  "adapted codes": (LowRank(CODED, A, B), CODES + wide(A) @ wide(B)),
  "factored": (FACTORED, wide(FACTORED.a) @ wide(FACTORED.b)),
  "adapted factors": (
    LowRank(FACTORED, A, B), wide(FACTORED.a) @ wide(FACTORED.b) + wide(A) @ wide(B),
  ),
  "pruned": (Pruned.of(HALF, MASK, ""), wide(HALF) * MASK),
  "adapted inside a mask": (
    Pruned(LowRank(HALF, A, B), MASK), (wide(HALF) + wide(A) @ wide(B)) * MASK,
  ),
  "adapted codes inside a mask": (
    Pruned(LowRank(CODED, A, B), MASK), (CODES + wide(A) @ wide(B)) * MASK,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_computed_in_float32_whatever_the_base_is(name):
  weight, expected = CASES[name]
  (found,) = jax.tree.leaves(merging.to_arrays({"kernel": weight}))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert name in ("array", "pruned") or (found != found.astype(jnp.bfloat16)).any()


STAY = {name for name in CASES if "code" in name or "factor" in name}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep", [merging.absorb, merging.keep_smaller])
def test_codes_and_factors_stay_and_the_rest_becomes_an_array(name, keep):
  weight, expected = CASES[name]
  kept = keep({"kernel": weight})["kernel"]
  masked = keep is merging.absorb and name in ("pruned", "adapted inside a mask")
  assert is_weight(kept) == (masked or name in STAY)
  if masked:
    assert isinstance(kept, Pruned) and not is_weight(kept.w)
    np.testing.assert_array_equal(kept.mask, MASK)
  found, wanted = (np.asarray(lora_jax.materialize(x)) for x in (kept, weight))
  if name == "adapted factors":  # they are others, in bfloat16, of the same product
    assert kept.rank == weight.w.rank + weight.rank
    np.testing.assert_allclose(wide(found), expected, rtol=2**-7, atol=2**-6)
  else:
    np.testing.assert_array_equal(found, wanted)
    if name in STAY:
      jax.tree.map(np.testing.assert_array_equal, kept, weight)


def test_only_the_mask_of_an_array_is_left_out():
  kept = merging.without_masks({name: weight for name, (weight, _) in CASES.items()})
  changed = {name for name, weight in kept.items() if weight is not CASES[name][0]}
  assert changed == {"pruned"} and not np.asarray(kept["pruned"])[~np.asarray(MASK)].any()


def test_masks_are_left_out_of_factors_and_of_codes_that_are_zero_under_them():
  codes = quantized(jnp.where(MASK, HALF, 0), Format(levels="int8"), (-2,))
  pruned_a = Pruned.of(A, jnp.abs(A) > 0.5, "")
  tree = {
    "codes": Pruned(codes, MASK),
    "other codes": Pruned(CODED, MASK),  # not zero everywhere under the mask
    "factors": Factored(pruned_a, B),
    "below an adapter": LowRank(Factored(pruned_a, B), A, B),
  }
  kept = merging.without_masks(tree)
  assert kept["codes"] is codes and isinstance(kept["other codes"], Pruned)
  for factors_ in (kept["factors"], kept["below an adapter"].w):
    assert factors_.a is pruned_a.w and factors_.b is B
  for name, leaf in tree.items():
    np.testing.assert_array_equal(
      lora_jax.materialize(kept[name]), lora_jax.materialize(leaf), err_msg=name
    )


def test_what_is_deployed_has_codes_or_their_copy_and_no_factors_as_large_as_their_product():
  coded_a = quantized(normal(8, 2), Format(levels="int8"), (-2,))
  large = Factored(normal(8, 5), normal(5, 6))
  tree = {
    "codes": CODED,
    "factors": Factored(coded_a, B),
    "large": large,
    "array": HALF,
    "adapted": LowRank(CODED, A, B),
  }
  for resident in (False, True):
    found = merging.deployed(tree, resident=resident)
    assert not is_weight(found["large"]) and found["array"] is HALF
    kinds = found["codes"], found["factors"].a, found["adapted"]
    assert {is_weight(x) for x in kinds} == {not resident}
    for name, leaf in tree.items():
      np.testing.assert_array_equal(
        lora_jax.materialize(found[name]), lora_jax.materialize(leaf), err_msg=name
      )


@pytest.mark.parametrize(
  "roles, shape",
  [("io", (12, 10)), ("sio", (3, 12, 10)), ("ioo", (12, 2, 5)), ("iiio", (3, 3, 4, 5))],
)
def test_lora_beside_factors_becomes_more_of_them(roles, shape):
  """But factors that would have no fewer numbers than the array become the array."""
  a, b = factors(shape, roles, seed=1, rank=2)
  own = Factored(a, b, roles=roles.lstrip("s"))
  adapted = low_rank(own, roles)
  joined = merging.absorb(adapted)
  assert type(joined) is Factored and joined.rank == 4 and joined.shape == shape
  np.testing.assert_allclose(joined.materialize(), adapted.materialize(), rtol=1e-5, atol=1e-5)
  once_more = merging.absorb(low_rank(joined, roles))
  assert not is_weight(once_more)
  np.testing.assert_allclose(once_more, low_rank(joined, roles).materialize(), rtol=1e-5, atol=1e-5)


def test_coded_factors_and_other_methods_than_lora_keep_their_adapter_beside_them():
  coded = Factored(CODED, quantized(B, Format(levels="int8"), (-2,)))
  beside = LowRank(coded, A, normal(2, 6))
  assert merging.absorb(beside).w is coded
  dora = (
    lora_jax.DoRA(rank=2, alpha=2.0)
    .init(jax.random.key(0), "", FACTORED, "io")
    .attach(FACTORED, "")
  )
  assert merging.absorb(dora).w is FACTORED
  in_full = Full(FACTORED, normal(8, 6))
  np.testing.assert_array_equal(merging.absorb(in_full), in_full.materialize())
