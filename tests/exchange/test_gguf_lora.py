"""Adapters in GGUF, against the base that llama.cpp has and the `gguf` package's own reader."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import exchange, weights
from lora_jax.exchange import gguf_files
from lora_jax.io import names
from lora_jax.models import layers, llama

CONFIG = llama.LlamaConfig(
  vocab_size=40,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  max_length=64,
)
TOKENS = np.array([[5, 6, 7]])


def model(scan):
  config = llama.LlamaConfig(**{**vars(CONFIG), "scan_layers": scan})
  params = llama.Llama(CONFIG).init(jax.random.key(0), TOKENS)["params"]
  params = layers.stack_layers(params) if scan else params
  axes = lora_jax.trace_axes(
    lambda p, t: llama.Llama(config).apply({"params": p}, t), params, TOKENS
  )
  return config, params, axes


def made(params, axes, rules):
  specs = lora_jax.match(params, rules, axes)
  adapters = lora_jax.init(jax.random.key(1), params, specs, axes)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), adapters)


def permuted(kernel, path):
  """A kernel as llama.cpp's conversion stores it: (out, in), the pairs of each head together."""
  rows = np.asarray(kernel).T
  heads = {"query": CONFIG.num_heads, "key": CONFIG.num_kv_heads}.get(path.split("/")[-2])
  if heads is None:
    return rows
  return np.concatenate(
    [
      head[[n // 2 + (n % 2) * len(head) // 2 for n in range(len(head))]]
      for head in np.split(rows, heads)
    ]
  )


RULES = {
  "one scale": [("all-linear", lora_jax.LoRA(rank=2, alpha=6.0))],
  "several scales": [
    ("attention", lora_jax.LoRA(rank=2, alpha=6.0)),
    (".*/up/kernel", lora_jax.LoRA(rank=3, alpha=1.0, rslora=True)),
    ("head/kernel", lora_jax.LoRA(rank=2, alpha=5.0)),
  ],
  "pissa": [("mlp", lora_jax.PiSSA(rank=2, alpha=3.0))],
}


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_base_plus_scaled_product_is_the_permuted_merged_weight(rules, scan, tmp_path):
  config, params, axes = model(scan)
  adapters = made(params, axes, rules)
  exchange.save_gguf(tmp_path / "a.gguf", adapters, params, axes, config=config)
  file = gguf.GGUFReader(tmp_path / "a.gguf")
  fields = {key: field.contents() for key, field in file.fields.items() if "." in key}
  assert fields["general.type"] == "adapter"
  assert fields["general.architecture"] == "llama"
  assert fields["adapter.type"] == "lora"
  tensors = {tensor.name: np.array(tensor.data) for tensor in file.tensors}

  merged = lora_jax.merge(params, adapters)
  base, merged = (layers.unstack_layers(x) if scan else x for x in (params, merged))
  base, merged = lora_jax.tree.flatten(base), lora_jax.tree.flatten(merged)
  changed = [path for path in base if not np.array_equal(base[path], merged[path])]
  assert len(tensors) == 2 * len(changed) > 0
  for path, name in names.file_names(changed, names.LLAMA_GGUF).items():
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    scale = fields["adapter.lora.alpha"] / b.shape[1]
    np.testing.assert_allclose(
      permuted(base[path], path) + scale * b @ a, permuted(merged[path], path), atol=1e-5
    )


def test_an_embeddings_factor_is_stored_by_rows(tmp_path):
  config, params, axes = model(False)
  adapters = made(params, axes, [("embed/embedding", lora_jax.LoRA(rank=2, alpha=6.0))])
  exchange.save_gguf(tmp_path / "a.gguf", adapters, params, axes, config=config)
  file = gguf.GGUFReader(tmp_path / "a.gguf")
  a, b = (np.array(tensor.data) for tensor in file.tensors)
  assert (a.shape, b.shape) == ((40, 2), (16, 2))  # the rows of a are looked up
  (delta,) = (x.attach(jnp.zeros((40, 16)), "").delta() for x in adapters.values())
  np.testing.assert_allclose(3.0 * a @ b.T, delta, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_factors_may_be_halves(dtype, tolerance, tmp_path):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
  gguf_files.write(
    tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (a, b)}, alpha=4, architecture="llama", dtype=dtype
  )
  for tensor, expected in zip(gguf.GGUFReader(tmp_path / "a.gguf").tensors, (a, b), strict=True):
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_what_llama_cpp_cannot_adapt_is_refused(tmp_path):
  config, params, axes = model(False)
  path = tmp_path / "a.gguf"
  for rules, words in (
    ([("mlp", lora_jax.DoRA(rank=2, alpha=1.0))], "block_0/mlp/.* only products of two factors"),
    ([("norm", lora_jax.Full())], "scale: llama.cpp supports only products of two factors"),
  ):
    adapters = lora_jax.init(jax.random.key(0), params, lora_jax.match(params, rules, axes), axes)
    with pytest.raises(ValueError, match=words):
      exchange.save_gguf(path, adapters, params, axes, config=config)
  with pytest.raises(ValueError, match="no adapter to save"):
    exchange.save_gguf(path, {}, params, axes, config=config)
  tied = llama.LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True})
  axes = lora_jax.trace_axes(lambda p, t: llama.Llama(tied).apply({"params": p}, t), params, TOKENS)
  factor = weights.LowRank(None, jnp.ones((40, 2)), jnp.ones((2, 16)))
  with pytest.raises(ValueError, match="embed/embedding: is the head too"):
    exchange.save_gguf(path, {"embed/embedding": factor}, params, axes, config=tied)
  with pytest.raises(ValueError, match="nothing/kernel: a GGUF file of 'llama' has no such matrix"):
    exchange.save_gguf(path, {"nothing/kernel": factor}, params, axes, config=config)
  with pytest.raises(ValueError, match="alpha that is not zero"):
    gguf_files.write(path, {"x": (np.ones((2, 3)), np.ones((4, 2)))}, alpha=0, architecture="llama")
  with pytest.raises(ValueError, match=r"x: \(2, 3\) and \(4, 3\) are not"):
    gguf_files.write(path, {"x": (np.ones((2, 3)), np.ones((4, 3)))}, alpha=1, architecture="llama")
  assert not list(tmp_path.iterdir())


def test_an_adapter_that_does_nothing_is_written_as_one(tmp_path):
  config, params, axes = model(False)
  nothing = weights.LowRank(None, jnp.ones((16, 2)), jnp.ones((2, 24)), scale=0.0)
  exchange.save_gguf(
    tmp_path / "a.gguf", {"block_0/mlp/up/kernel": nothing}, params, axes, config=config
  )
  file = gguf.GGUFReader(tmp_path / "a.gguf")
  assert file.fields["adapter.lora.alpha"].contents() == 1.0
  assert not np.array(file.tensors[1].data).any()
