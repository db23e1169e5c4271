"""Channels and heads that go: a smaller dense model, fitted to what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import families, tree
from lora_jax.compress import structured_pruning
from lora_jax.models import llama
from lora_jax.weights.probe import Moments

CONFIG = llama.LlamaConfig(
  vocab_size=32,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  max_length=32,
  tie_embeddings=True,
)
TOKENS = jnp.arange(10).reshape(2, 5)


def apply(config, params, tokens=TOKENS):
  return llama.Llama(config).apply({"params": params}, tokens)


def model(**silent):
  """Random parameters, of which some columns by path are zero, so that nothing reads them."""
  params = llama.Llama(CONFIG).init(jax.random.key(0), TOKENS)["params"]
  return tree.map_with_path(
    lambda path, x: (
      x.at[:, silent[path.split("/")[-2]]].set(0) if path.split("/")[-2] in silent else x
    ),
    params,
  )


def moments_of(params, name):
  paths = [path for path in tree.flatten(params) if path.endswith(f"/{name}/kernel")]
  batches = jax.random.randint(jax.random.key(1), (4, 2, 16), 0, 32)
  return lora_jax.second_moments(lambda p, t: apply(CONFIG, p, t), params, paths, batches)


def test_channels_that_give_nothing_go_and_nothing_changes():
  params = model(up=np.array([0, 5, 7, 23]))
  small, config = structured_pruning.prune_channels(params, CONFIG, 20, moments_of(params, "down"))
  assert config.mlp_width == 20
  assert {p: x.shape for p, x in tree.flatten(small).items()} == families.param_shapes(config)
  np.testing.assert_allclose(apply(config, small), apply(CONFIG, params), rtol=1e-3, atol=1e-4)


def test_a_head_that_gives_nothing_goes_with_the_queries_that_attend_to_it():
  params = model(value=np.arange(4))  # the first of two key/value heads
  small, config = structured_pruning.prune_heads(params, CONFIG, 1, moments_of(params, "out"))
  assert (config.num_heads, config.num_kv_heads) == (2, 1)
  np.testing.assert_array_equal(
    small["block_0"]["attn"]["query"]["kernel"], params["block_0"]["attn"]["query"]["kernel"][:, 8:]
  )
  np.testing.assert_allclose(apply(config, small), apply(CONFIG, params), rtol=1e-3, atol=1e-4)


def test_what_stays_is_fitted_to_what_went():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8))
  w = rng.standard_normal((8, 3))
  moments = {"w": Moments(x.T @ x, np.float32(len(x)))}
  kept, fitted = structured_pruning._fewer_inputs("w", jnp.asarray(w), 5, 1, moments, 1e-9)
  scores = [np.sum((x[:, [n]] @ w[[n]]) ** 2) for n in range(8)]
  assert set(kept) == set(np.argsort(scores)[3:])
  expected = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
  np.testing.assert_allclose(fitted, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("width", "rows", "words"),
  [(24, 50, "mlp_width is 24 and is to be 24"), (20, 5, "have 5 rows for its 24 inputs")],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(width, rows, words):
  params = model()
  moments = {f"block_{i}/mlp/down/kernel": Moments(np.eye(24), np.float32(rows)) for i in range(2)}
  with pytest.raises(ValueError, match=words):
    structured_pruning.prune_channels(params, CONFIG, width, moments)
