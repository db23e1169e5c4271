"""What is merged into arrays for other programs, and what stays what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import normal

import lora_jax
from lora_jax.compress import merging
from lora_jax.weights import Factored, Full, LowRank, Pruned, is_weight
from lora_jax.weights.quantized import Format, quantized

HALF = normal(8, 6).astype(jnp.bfloat16)
A, B = normal(8, 2), normal(2, 6)
MASK = jnp.abs(HALF) > 0.5
CODED = quantized(HALF, Format(levels="int8"), (-2,))
FACTORED = Factored(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))


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


def test_codes_and_factors_stay_and_the_rest_becomes_an_array():
  kept = merging.keep_smaller({name: weight for name, (weight, _) in CASES.items()})
  stay = {name for name, weight in kept.items() if is_weight(weight)}
  assert stay == {name for name in CASES if "code" in name or "factor" in name}
  for name in stay:
    assert kept[name] is CASES[name][0]
  jax.tree.map(
    np.testing.assert_array_equal,
    lora_jax.materialize(kept),
    lora_jax.materialize({name: weight for name, (weight, _) in CASES.items()}),
  )
