"""Casts that cannot hold their values are refused, wherever a file is written or read so."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

import lora_jax
from lora_jax import exchange, families, weights
from lora_jax.compress import storage
from lora_jax.exchange import gguf_files, peft_files
from lora_jax.io import casting, export, gguf_model, names, pretrained
from lora_jax.models import llama

CONFIG = llama.LlamaConfig(
  vocab_size=49152,
  width=8,
  mlp_width=32,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  max_length=64,
  tie_embeddings=True,
)
UP = "block_0/mlp/up/kernel"


def parameters(**others):
  shapes = families.param_shapes(CONFIG)
  flat = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
  for path, value in others.items():
    flat[path][0, 0] = value
  return flat, traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def words():
  return pretrained.inspect(pretrained.DEFAULT).tokenizer


@pytest.mark.parametrize("make", [np.array, jnp.array])
@pytest.mark.parametrize(
  ("dtype", "most", "beyond"),
  [
    (np.float16, 65504.0, 65520.0),
    (ml_dtypes.float8_e4m3fn, 448.0, 480.0),
    (ml_dtypes.bfloat16, 3.3895e38, 3.4e38),
  ],
)
def test_what_a_dtype_cannot_hold_is_refused_by_name_and_what_it_can_is_cast(
  make, dtype, most, beyond
):
  array = make([-most, 1.5], np.float32)
  found = casting.cast({"a": array}, dtype)["a"]
  assert found.dtype == dtype
  np.testing.assert_array_equal(np.asarray(found, np.float32)[1], 1.5)
  assert np.isfinite(np.asarray(found, np.float32)).all()
  with pytest.raises(ValueError, match=r"values of 1 tensors are beyond: far \(.*; use .*float32"):
    casting.cast({"near": array, "far": make([-beyond], np.float32)}, dtype)


def test_values_that_were_not_finite_before_the_cast_are_told_apart():
  with pytest.raises(
    ValueError, match=r"1 tensors hold values that are not finite: w; .* diverged"
  ):
    casting.cast({"w": np.array([np.nan], np.float32)}, np.float16)


def test_a_model_in_float16_that_overflows_is_not_loaded(tmp_path, words):
  _, params = parameters(**{UP: 7e4})
  export.save(tmp_path / "model", params, CONFIG, words)
  with pytest.raises(ValueError, match=rf"float16 ends at 65504, .*up_proj.* -> {UP} \(7e\+04\)"):
    pretrained.load(tmp_path / "model", dtype=jnp.float16)
  assert pretrained.load(tmp_path / "model", dtype=jnp.bfloat16).params


def test_a_compressed_model_in_float16_that_overflows_is_not_loaded(tmp_path, words):
  flat, _ = parameters()
  a, b = np.ones((8, 2), np.float32), np.full((2, 32), 7e4, np.float32)
  flat[UP] = weights.Factored(a=jnp.asarray(a), b=jnp.asarray(b), roles="io")
  params = traverse_util.unflatten_dict(flat, sep="/")
  storage.save(tmp_path / "model", params, CONFIG, words)
  with pytest.raises(ValueError, match=rf"float16 ends at 65504, .*{UP}"):
    storage.load(tmp_path / "model", dtype=jnp.float16)
  assert storage.load(tmp_path / "model").params


def not_finite(tmp_path, words):
  """Ways to write values that are not finite, by what is written."""
  flat, params = parameters(**{UP: np.inf})
  shapes = {path: np.ones(x.shape, np.float16) for path, x in flat.items()}
  low = weights.LowRank(w=None, a=np.ones((8, 2)), b=np.full((2, 32), np.nan), scale=1.0)
  return {
    "merged": lambda: export.save(tmp_path / "out", params, CONFIG, words),
    "compressed": lambda: storage.save(tmp_path / "out", params, CONFIG, words),
    "gguf": lambda: gguf_model.save(tmp_path / "out", params, CONFIG, words),
    "peft": lambda: peft_files.write(tmp_path / "out", {}, {"x.lora_B.weight": low.b}),
    "gguf adapter": lambda: gguf_files.write(
      tmp_path / "out", {"x": (low.a.T, low.b.T)}, alpha=2.0, architecture="llama"
    ),
    "half": lambda: export.save(
      tmp_path / "out",
      traverse_util.unflatten_dict(shapes | {UP: shapes[UP] * np.float16(np.inf)}, sep="/"),
      CONFIG,
      words,
    ),
  }


@pytest.mark.parametrize("what", ["merged", "compressed", "gguf", "peft", "gguf adapter", "half"])
def test_nothing_is_written_that_is_not_finite(what, tmp_path, words):
  with pytest.raises(ValueError, match="not finite"):
    not_finite(tmp_path, words)[what]()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "value"), [("float16", 7e4), ("bfloat16", 3.4e38)])
def test_adapters_and_models_for_llama_cpp_are_refused_where_they_overflow(
  dtype, value, tmp_path, words
):
  a, b = np.ones((2, 8), np.float32), np.full((32, 2), value, np.float32)
  with pytest.raises(ValueError, match=rf"{dtype} ends at .*blk.0.ffn_up.weight.lora_b"):
    gguf_files.write(
      tmp_path / "out.gguf",
      {"blk.0.ffn_up.weight": (a, b)},
      alpha=2.0,
      architecture="llama",
      dtype=dtype,
    )
  _, params = parameters(**{UP: value})
  with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight"):
    gguf_model.save(tmp_path / "out.gguf", params, CONFIG, words, dtype=dtype)
  assert not list(tmp_path.iterdir())


def test_an_adapter_that_diverged_is_not_saved_over_one_that_did_not(tmp_path):
  flat, params = parameters()
  axes = {
    path: lora_jax.Axes("io", ("dot_general",))
    if path.endswith("kernel")
    else lora_jax.Axes("", ())
    for path in flat
  }
  adapter = weights.LowRank(w=None, a=jnp.ones((8, 2)), b=jnp.ones((2, 32)), scale=1.0)
  said = {"base_model": "tiny", "table": names.LLAMA_HF}
  exchange.save(tmp_path / "adapter", {UP: adapter}, params, axes, **said)
  before = {x.name: x.read_bytes() for x in (tmp_path / "adapter").iterdir()}
  broken = dataclasses.replace(adapter, b=adapter.b * jnp.inf)
  with pytest.raises(ValueError, match=r"not finite: .*up_proj.lora_B.weight"):
    exchange.save(tmp_path / "adapter", {UP: broken}, params, axes, **said)
  assert {x.name: x.read_bytes() for x in (tmp_path / "adapter").iterdir()} == before
