"""GGUF blocks against the gguf package's own dequantisation, to the bit."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from tolerances import assert_close

from lora_jax import LowRank, adapt
from lora_jax.weights.gguf_blocks import KINDS, GGUFBlocks


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
  """Every bit at random: all codes, and scales of any size, infinities and NaN among them."""
  size = blocks * KINDS[name].size
  return np.random.default_rng(0).integers(0, 256, size=(rows, size), dtype=np.uint8)


def dequantized(blocks: np.ndarray, name: str) -> np.ndarray:
  with np.errstate(all="ignore"):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", KINDS)
def test_the_numbers_are_those_of_the_gguf_package(name):
  kind = gguf.GGMLQuantizationType[name]
  assert (KINDS[name].numbers, KINDS[name].size) == gguf.GGML_QUANT_SIZES[kind]
  blocks = random_blocks(name, rows=16, blocks=8)
  weight = GGUFBlocks.of(blocks, name, (-2,), "float32")
  found = jax.jit(GGUFBlocks.materialize)(weight)
  assert weight.shape == found.shape
  np.testing.assert_array_equal(np.asarray(found).T, dequantized(blocks, name))


def sound_blocks(rows: int, columns: int) -> np.ndarray:
  data = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
  return gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_1)


def test_a_kernel_of_blocks_is_multiplied_by_and_adapted():
  blocks = sound_blocks(6, 64)
  base = GGUFBlocks.of(blocks, "Q4_1", (-2,), "float32")
  dense, x = dequantized(blocks, "Q4_1").T, normal(3, 64)
  product = jax.jit(adapt(lambda w, x: x @ w, strict=True))
  assert_close(product(base, x), x @ dense)
  weight = LowRank(base, normal(64, 2), normal(2, 6))
  assert_close(product(weight, x), x @ (dense + weight.a @ weight.b))


def test_rows_of_a_table_of_blocks_are_looked_up():
  blocks = sound_blocks(10, 64)
  table = GGUFBlocks.of(blocks, "Q4_1", (-1,), "bfloat16")
  found = jax.jit(adapt(lambda w, ids: w[ids], strict=True))(table, jnp.array([3, 9]))
  expected = dequantized(blocks, "Q4_1")[[3, 9]]
  np.testing.assert_array_equal(found, jnp.asarray(expected, jnp.bfloat16))


def test_a_kind_that_is_not_known_is_refused():
  with pytest.raises(ValueError, match="blocks of kind IQ1_S cannot be kept; known are Q4_0"):
    GGUFBlocks.of(np.zeros((2, 50), np.uint8), "IQ1_S", (-2,), "float32")
