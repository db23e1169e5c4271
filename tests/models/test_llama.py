"""The model by itself: small random Llamas against slow twins and against their own other forms."""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import transformers

from lora_jax import families
from lora_jax.models import layers, llama, rope

TINY = llama.LlamaConfig(
  vocab_size=61,
  width=24,
  mlp_width=40,
  num_layers=2,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  max_length=64,
)
TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9)))
ATOL = 2e-5  # logits of order one, float32, sums taken in another order


@functools.cache
def init(config: llama.LlamaConfig) -> dict:
  return jax.jit(llama.Llama(config).init)(jax.random.key(0), TOKENS_BT)["params"]


@functools.partial(jax.jit, static_argnums=0)
def logits(config: llama.LlamaConfig, params: dict, tokens_BT=TOKENS_BT, **options):
  return llama.Llama(config).apply({"params": params}, tokens_BT, **options)


def paths(tree: dict) -> dict:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def test_the_parameters_have_the_documented_paths_and_shapes():
  shapes = families.param_shapes(dataclasses.replace(TINY, num_layers=1))
  assert shapes == {
    "embed/embedding": (61, 24),
    "block_0/attn_norm/scale": (24,),
    "block_0/attn/query/kernel": (24, 24),
    "block_0/attn/key/kernel": (24, 8),
    "block_0/attn/value/kernel": (24, 8),
    "block_0/attn/out/kernel": (24, 24),
    "block_0/mlp_norm/scale": (24,),
    "block_0/mlp/gate/kernel": (24, 40),
    "block_0/mlp/up/kernel": (24, 40),
    "block_0/mlp/down/kernel": (40, 24),
    "norm/scale": (24,),
    "head/kernel": (24, 61),
  }


def test_scanned_layers_are_one_block_with_a_leading_axis():
  shapes = families.param_shapes(dataclasses.replace(TINY, scan_layers=True, tie_embeddings=True))
  assert shapes["blocks/attn/query/kernel"] == (2, 24, 24)
  assert shapes["blocks/mlp_norm/scale"] == (2, 24)
  assert "head/kernel" not in shapes
  assert not [path for path in shapes if path.startswith("block_")]


def test_stacking_and_unstacking_layers_are_inverse():
  params = init(TINY)
  stacked = layers.stack_layers(params)
  expected = families.param_shapes(dataclasses.replace(TINY, scan_layers=True))
  assert {path: leaf.shape for path, leaf in paths(stacked).items()} == expected
  back = layers.unstack_layers(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_every_layer_starts_from_its_own_random_numbers_under_scan():
  kernel = init(dataclasses.replace(TINY, scan_layers=True))["blocks"]["mlp"]["up"]["kernel"]
  assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("tie_embeddings", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scanned_layers_give_the_logits_and_gradients_of_unrolled_ones(tie_embeddings):
  config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
  scanned = dataclasses.replace(config, scan_layers=True)
  params = init(config)

  def loss(params, config):
    return jnp.sum(jax.nn.log_softmax(logits(config, params))[..., 7])

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  value, gradient = grad(params, config)
  other, other_gradient = grad(layers.stack_layers(params), scanned)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  unstacked = layers.unstack_layers(other_gradient)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), unstacked, gradient)


@pytest.mark.parametrize(
  ("policy", "scan_layers"),
  [
    ("nothing_saveable", True),
    ("dots_with_no_batch_dims_saveable", False),
    pytest.param("nothing_saveable", False, marks=pytest.mark.slow),
    pytest.param("dots_with_no_batch_dims_saveable", True, marks=pytest.mark.slow),
  ],
)
def test_rematerialised_layers_give_the_same_gradient_and_compute_more(policy, scan_layers):
  plain = dataclasses.replace(TINY, scan_layers=scan_layers)
  remat = dataclasses.replace(plain, remat_policy=getattr(jax.checkpoint_policies, policy))
  params = init(plain)

  def gradient(config):
    return jax.jit(jax.grad(lambda params: jnp.sum(logits(config, params)[..., 7])))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    gradient(remat)(params),
    gradient(plain)(params),
  )
  products = [str(gradient(c).trace(params).jaxpr).count("dot_general") for c in (plain, remat)]
  assert products[1] > products[0]


def test_a_token_depends_on_itself_and_on_what_is_before_it_alone():
  params = init(TINY)
  embedding_VD = params["embed"]["embedding"]
  tokens_1T = jnp.arange(9)[None]  # each token once, so that a row of the embedding is a position

  def logit_at(position, embedding_VD):
    changed = params | {"embed": {"embedding": embedding_VD}}
    return jnp.sum(logits(TINY, changed, tokens_1T)[0, position] ** 2)

  gradient = jax.jit(jax.grad(logit_at, argnums=1))
  for position in (0, 4, 8):
    gradient_VD = gradient(position, embedding_VD)
    seen = np.any(np.asarray(gradient_VD) != 0, axis=1)
    assert seen[: position + 1].all()
    assert not seen[position + 1 :].any()


def test_grouped_queries_attend_as_a_slow_einsum_does():
  block = paths(init(TINY)["block_0"])
  x_BTD = jax.random.normal(jax.random.key(1), (2, 9, TINY.width))
  positions_BT = jnp.broadcast_to(jnp.arange(9), (2, 9))
  turn = llama.rotation(TINY, positions_BT, 9)
  params = {name: {"kernel": block[f"attn/{name}/kernel"]} for name in ("query", "key", "value")}
  params["out"] = {"kernel": block["attn/out/kernel"]}
  fast_BTD, _ = llama.Attention(TINY).apply(
    {"params": params}, x_BTD, positions_BT, turn, None, None
  )

  def heads(name):
    return (x_BTD @ params[name]["kernel"]).reshape(2, 9, -1, TINY.head_dim)

  groups = TINY.num_heads // TINY.num_kv_heads
  query_BTNH = llama.rotate(heads("query"), turn)
  key_BTNH = jnp.repeat(llama.rotate(heads("key"), turn), groups, axis=2)
  value_BTNH = jnp.repeat(heads("value"), groups, axis=2)
  scores_BNTS = jnp.einsum("btnh,bsnh->bnts", query_BTNH, key_BTNH) / np.sqrt(TINY.head_dim)
  scores_BNTS = jnp.where(np.tril(np.ones((9, 9), bool)), scores_BNTS, -jnp.inf)
  out_BTNH = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores_BNTS), value_BTNH)
  slow_BTD = out_BTNH.reshape(2, 9, -1) @ params["out"]["kernel"]
  np.testing.assert_allclose(fast_BTD, slow_BTD, atol=ATOL)


def test_logits_at_chosen_positions_are_a_slice_of_all_logits():
  params = init(TINY)
  at_BC = jnp.asarray([[0, 8, 3], [5, 5, 1]])
  chosen_BCV = logits(TINY, params, at_BC=at_BC)
  all_BTV = logits(TINY, params)
  expected_BCV = np.take_along_axis(np.asarray(all_BTV), np.asarray(at_BC)[..., None], axis=1)
  np.testing.assert_allclose(chosen_BCV, expected_BCV, atol=ATOL)


def test_the_head_is_computed_at_the_chosen_positions_only():
  trace = jax.make_jaxpr(lambda params: logits(TINY, params, at_BC=jnp.zeros((2, 1), int)))
  text = str(trace(init(TINY)))
  assert "f32[2,1,61]" in text
  assert "f32[2,9,61]" not in text


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_texts_that_share_a_row_have_the_logits_and_gradients_that_they_have_alone(scan_layers):
  config = dataclasses.replace(TINY, scan_layers=scan_layers)
  lengths = [4, 5, 3]
  alone_BT = TOKENS_BT[:, :5].repeat(2, axis=0)[:3]
  places = [(row, column) for row, length in enumerate(lengths) for column in range(length)]
  rows, columns = np.array(places).T
  together_1T = jnp.pad(alone_BT[rows, columns][None], ((0, 0), (0, 2)))
  segments_1T = jnp.pad(jnp.asarray(rows + 1)[None], ((0, 0), (0, 2)))

  def score(params, tokens_BT, where, **segments):
    chosen = logits(config, params, tokens_BT, **segments)[where]
    return jnp.sum(jax.nn.log_softmax(chosen)[:, 7]), chosen

  gradient = jax.jit(jax.grad(score, has_aux=True))
  grads, chosen = gradient(init(config), alone_BT, (rows, columns))
  where = np.zeros(12, int), np.arange(12)
  other_grads, other = gradient(init(config), together_1T, where, segments_BT=segments_1T)
  np.testing.assert_allclose(other, chosen, atol=ATOL)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other_grads, grads)


def test_a_token_depends_on_no_other_text_of_its_row():
  params = init(TINY)
  tokens_1T = jnp.arange(9)[None]  # each token once, so that a row of the embedding is a position
  segments_1T = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0]])

  def logit_at(embedding_VD):
    changed = params | {"embed": {"embedding": embedding_VD}}
    return jnp.sum(logits(TINY, changed, tokens_1T, segments_BT=segments_1T)[0, 5] ** 2)

  gradient_VD = jax.jit(jax.grad(logit_at))(params["embed"]["embedding"])
  seen = np.any(np.asarray(gradient_VD) != 0, axis=1)
  assert list(np.flatnonzero(seen)) == [3, 4, 5]


def test_a_cache_with_texts_that_share_a_row_is_refused():
  with pytest.raises(ValueError, match="segments_BT: a cache holds one text a row"):
    logits(TINY, init(TINY), cache=llama.init_cache(TINY, 2, 9), segments_BT=jnp.ones((2, 9), int))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_logits_are_the_head_of_what_is_hidden(tie_embeddings):
  config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
  variables = {"params": init(config)}
  model = llama.Llama(config)
  at_BC = jnp.asarray([[0, 8], [5, 1]])
  hidden_BCD = model.apply(variables, TOKENS_BT, at_BC=at_BC, method="hidden")
  assert hidden_BCD.shape == (2, 2, TINY.width)
  head = params_of_head(config, variables["params"])
  expected = logits(config, variables["params"], at_BC=at_BC)
  np.testing.assert_allclose(hidden_BCD @ head, expected, atol=ATOL)
  np.testing.assert_allclose(
    model.apply(variables, hidden_BCD, method="logits"), expected, atol=ATOL
  )


def params_of_head(config, params):
  return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


@pytest.mark.parametrize(
  ("chunks", "scan_layers"),
  [
    ([4, 5], True),
    ([1] * 9, False),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (([9], True), ([9], False), ([4, 5], False), ([1] * 9, True))
    ),
  ],
)
def test_the_cache_gives_the_logits_of_the_whole_text(chunks, scan_layers):
  config = dataclasses.replace(TINY, scan_layers=scan_layers)
  params = init(config)
  cache = llama.init_cache(config, 2, 12)
  pieces, start = [], 0
  for length in chunks:
    positions_BT = jnp.broadcast_to(jnp.arange(start, start + length), (2, length))
    piece, cache = logits(
      config, params, TOKENS_BT[:, start : start + length], positions_BT=positions_BT, cache=cache
    )
    pieces.append(piece)
    start += length
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), logits(config, params), atol=ATOL)


def test_rows_of_different_length_decode_together_each_at_its_own_position():
  params = init(TINY)
  lengths = (4, 7)
  padded_BT = jnp.where(jnp.arange(9) < jnp.asarray(lengths)[:, None], TOKENS_BT, 0)
  last_B1 = jnp.asarray(lengths)[:, None] - 1
  cache = llama.init_cache(TINY, 2, 12)
  _, cache = logits(TINY, params, padded_BT, at_BC=last_B1, cache=cache)
  together = []
  for step in (1, 2):
    new_B1 = jnp.take_along_axis(TOKENS_BT, last_B1 + step, axis=1)
    out, cache = logits(TINY, params, new_B1, positions_BT=last_B1 + step, cache=cache)
    together.append(out[:, 0])
  for row, length in enumerate(lengths):
    alone_1TV = logits(TINY, params, TOKENS_BT[row : row + 1, : length + 2])
    for step in (0, 1):
      np.testing.assert_allclose(together[step][row], alone_1TV[0, length + step], atol=ATOL)


def test_a_second_step_of_decoding_compiles_nothing():
  params = init(TINY)
  traces = []

  @jax.jit
  def step(cache, token, at):
    traces.append(at)
    return logits(TINY, params, token, positions_BT=at, cache=cache)

  cache = llama.init_cache(TINY, 2, 12)
  for position in range(3):
    _, cache = step(cache, jnp.ones((2, 1), int), jnp.full((2, 1), position))
  assert len(traces) == 1


def test_the_cache_is_stored_in_the_dtype_that_was_asked_for():
  params = init(TINY)
  cache = llama.init_cache(TINY, 2, 9, jnp.bfloat16)
  cached, cache = logits(TINY, params, cache=cache)
  assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
  assert cached.dtype == jnp.float32
  np.testing.assert_allclose(cached, logits(TINY, params), atol=0.1)


def test_arithmetic_and_parameters_have_the_dtypes_of_the_config():
  config = dataclasses.replace(TINY, dtype=jnp.bfloat16, param_dtype=jnp.float32)
  params = init(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  low = logits(config, params)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), logits(TINY, params), atol=0.1)
  halved = llama.Llama(dataclasses.replace(TINY, param_dtype=jnp.bfloat16))
  half = jax.eval_shape(halved.init, jax.random.key(0), TOKENS_BT)
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
  ("scaling", "fields"),
  [
    (None, {"rope_type": "default"}),
    (rope.LinearRope(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    (
      rope.Llama3Rope(factor=32.0),
      {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
    ),
  ],
)
def test_rotary_angles_are_those_of_transformers(scaling, fields):
  config = dataclasses.replace(TINY, head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
  turn = llama.rotation(config, jnp.asarray([[1]]), 2)
  peer = transformers.LlamaConfig(
    hidden_size=64 * 6, num_attention_heads=6, rope_parameters={"rope_theta": 500000.0, **fields}
  )
  if scaling is None:
    frequencies = 500000.0 ** -(np.arange(0, 64, 2) / 64)
  else:
    frequencies = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[fields["rope_type"]](
      peer, "cpu"
    )[0].numpy()
  np.testing.assert_allclose(turn.sin_BTR[0, 0], np.sin(frequencies), rtol=1e-5)
  np.testing.assert_allclose(turn.cos_BTR[0, 0], np.cos(frequencies), rtol=1e-5)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"num_layers": 0}, "num_layers must be a positive integer, not 0"),
    ({"width": 24.0}, "width must be a positive integer, not 24.0"),
    ({"rope_theta": "high"}, "rope_theta must be a number from 1.0 to .*, not 'high'"),
    ({"num_kv_heads": 4}, "num_heads 6 is not a multiple of num_kv_heads 4"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
  ],
)
def test_a_config_whose_numbers_do_not_fit_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(TINY, **change)
