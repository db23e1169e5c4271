"""The benchmark of quantisation on a tiny Llama: its rows, and what it says of their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from main_programs import imported

import lora_jax
from lora_jax.models import llama

compression = imported("benchmarks.compression")


@pytest.fixture(scope="module")
def case():
  config = llama.LlamaConfig(
    vocab_size=61,
    width=64,
    mlp_width=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_length=64,
    tie_embeddings=True,
    scan_layers=True,
  )
  model = llama.Llama(config)
  tokens = np.random.default_rng(0).integers(0, 61, size=(20, 32)).astype(np.int32)
  params = model.init(jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  return compression.Case("", model, params, axes, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "share"),
  [
    ("dense", 2.0),
    ("int8", 0.54),
    ("nf4-plain", 0.29),
    ("nf4", 0.33),
    pytest.param("nf4-gptq", 0.33, marks=pytest.mark.slow),
  ],
)
def test_a_row_is_the_model_at_its_share_of_the_bytes(case, name, share):
  params = compression.ROWS[name](case)
  assert compression.kernel_bytes(case, params)[1] <= share
  apply = lora_jax.adapt(case.model.apply, strict=True)
  found = apply({"params": params}, case.calibration[:2])
  expected = case.model.apply({"params": case.params}, case.calibration[:2])
  assert jnp.linalg.norm(found - expected) < 0.3 * jnp.linalg.norm(expected)


def test_the_table_has_a_line_for_each_row():
  lines = compression.format_table([("int8", 49.8, 107.0, 0.5034, 3.2)])
  assert lines[-1] == "| int8 | 49.80 | 107.0 | 0.503 | 3 |"
