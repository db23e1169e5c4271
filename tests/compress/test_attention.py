"""Pairs of projections factored together, on attention without and with rotary positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import families
from lora_jax.compress import attention
from lora_jax.models import llama

rng = np.random.default_rng(0)
D, H, N, T = 6, 3, 2, 5
OF_RANK_TWO = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
WIDEN = rng.standard_normal((D, 3)), rng.standard_normal((3, D))


def normal(*shape):
  return rng.standard_normal(shape)


def attend(x, query, key, value, out):
  """Attention of several query heads to one key/value head, without positions."""
  scores = np.einsum("td,ndh,eh,se->nts", x, query, key, x) / np.sqrt(H)
  share = np.exp(scores - scores.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  return np.einsum("nts,sd,dh,nhe->te", share, x, value, out)


def test_heads_whose_products_have_a_smaller_rank_are_shrunk_to_it_exactly():
  x = normal(T, D)
  # Wv Wo_n and Wq_n Wkᵀ of rank two, in heads of three features
  value, out = WIDEN[0] @ OF_RANK_TWO, np.stack([WIDEN[1], 2 * WIDEN[1]])
  key, query = WIDEN[0] @ OF_RANK_TWO, normal(N, D, H)
  small_value, small_out = attention.value_output(value, out, 2)
  small_query, small_key = attention.query_key(query, key, 2)
  assert small_value.shape == (D, 2) and small_out.shape == (N, 2, D)
  assert small_query.shape == (N, D, 2) and small_key.shape == (D, 2)
  expected = attend(x, query, key, value, out)
  found = attend(x, small_query, small_key, small_value, small_out)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_truncation_is_the_nearest_of_its_rank_weighed_by_the_inputs():
  value, out, rows = normal(D, H), normal(N, H, D), normal(40, D) @ normal(D, D)
  root = np.linalg.cholesky(rows.T @ rows)
  small_value, small_out = attention.value_output(value, out, 2, root)
  products = np.concatenate([value @ each for each in out], axis=1)
  found = np.concatenate([small_value @ each for each in small_out], axis=1)
  optimal = np.linalg.svd(rows @ products, compute_uv=False)[2]
  assert np.linalg.norm(rows @ (products - found)) == pytest.approx(optimal, rel=1e-6)


CONFIG = llama.LlamaConfig(
  vocab_size=32,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_length=16,
  tie_embeddings=True,
)
TOKENS = jnp.arange(10).reshape(2, 5)


def of_value_rank(rank):
  """A Llama whose value heads use `rank` of their features."""
  params = llama.Llama(CONFIG).init(jax.random.key(0), TOKENS)["params"]
  for i in range(CONFIG.num_layers):
    kernel = params[f"block_{i}"]["attn"]["value"]["kernel"].reshape(16, 2, 8)
    mixed = jnp.einsum("dkr,rh->dkh", kernel[..., :rank], jnp.asarray(normal(rank, 8), jnp.float32))
    params[f"block_{i}"]["attn"]["value"]["kernel"] = mixed.reshape(16, 16)
  return params


@pytest.mark.parametrize("whitened", [False, True])
def test_a_llama_with_values_of_a_smaller_rank_is_the_same_with_smaller_heads_and_cache(whitened):
  params = of_value_rank(3)
  moments = None
  if whitened:
    paths = [f"block_{i}/attn/value/kernel" for i in range(2)]
    batches = jax.random.randint(jax.random.key(1), (4, 2, 16), 0, 32)
    moments = lora_jax.second_moments(
      lambda p, t: llama.Llama(CONFIG).apply({"params": p}, t), params, paths, batches
    )
  small, config = attention.shrink_values(params, CONFIG, 3, moments)
  expected = llama.Llama(CONFIG).apply({"params": params}, TOKENS)
  np.testing.assert_allclose(
    llama.Llama(config).apply({"params": small}, TOKENS), expected, rtol=1e-3, atol=1e-4
  )
  cache = llama.init_cache(config, 2, 8)
  assert cache["block_0"].value_BSKG.shape == (2, 8, 2, 3)
  assert cache["block_0"].key_BSKH.shape == (2, 8, 2, 8)
  cached, _ = llama.Llama(config).apply({"params": small}, TOKENS, cache=cache)
  np.testing.assert_allclose(cached, expected, rtol=1e-3, atol=1e-4)
  shapes = {path: leaf.shape for path, leaf in lora_jax.tree.flatten(small).items()}
  assert shapes == families.param_shapes(config)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda p: attention.shrink_values(p, CONFIG, 9), "a head of 8 features .* not 9"),
    (
      lambda p: attention.shrink_values(p, dataclasses.replace(CONFIG, scan_layers=True), 4),
      "scan_layers=False",
    ),
    (lambda p: attention.refuse_rotary(), "rotary positions: a rotation is between"),
    (lambda p: dataclasses.replace(CONFIG, value_dim=9), "value_dim 9 must be from 1 to head_dim"),
  ],
)
def test_what_cannot_be_shrunk_is_refused_with_the_reason(make, words):
  with pytest.raises(ValueError, match=words):
    make({"block_0": {"attn": {"value": {"kernel": jnp.zeros((16, 16))}}}})
