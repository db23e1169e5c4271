"""Patterns and presets to specs: what is adapted, and what is said when it cannot be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax
from lora_jax import LoRA, match

SPEC = LoRA(rank=2, alpha=4.0)


def kernel(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def block():
  return {
    "attn": {
      "query": {"kernel": kernel(32, 48), "bias": kernel(48)},
      "out": {"kernel": kernel(48, 32)},
    },
    "mlp": {"up": {"kernel": kernel(32, 96)}, "router": {"kernel": kernel(32, 4)}},
    "norm": {"scale": kernel(32)},
  }


PARAMS = {
  "embed": {"embedding": kernel(100, 32)},
  "block_0": block(),
  "block_1": block(),
  "positions": kernel(64, 32, dtype=jnp.int32),
  "head": {"kernel": kernel(32, 100)},
}


def test_a_pattern_matches_whole_paths_and_the_result_is_in_the_tree_s_order():
  specs = match(PARAMS, [(r".*/attn/(query|out)/kernel", SPEC)])
  assert list(specs) == [
    "block_0/attn/out/kernel",
    "block_0/attn/query/kernel",
    "block_1/attn/out/kernel",
    "block_1/attn/query/kernel",
  ]
  with pytest.raises(ValueError, match="matches no leaf; it must match a whole path"):
    match(PARAMS, [("attn/query", SPEC)])


def test_the_first_pattern_that_matches_a_leaf_decides():
  other = LoRA(rank=4, alpha=4.0)
  specs = match(PARAMS, [(r"block_1/.*", None), (r".*/query/kernel", other), ("attention", SPEC)])
  assert specs == {"block_0/attn/out/kernel": SPEC, "block_0/attn/query/kernel": other}


def test_a_pattern_all_of_whose_leaves_are_taken_is_no_error():
  assert match(PARAMS, [(r"block_.*", None), (r".*/query/kernel", SPEC)]) == {}


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
  with pytest.raises(ValueError, match=r"no leaf.*nearest paths: .*block_0/attn/query/kernel"):
    match(PARAMS, [(r"block_0/attention/query/kernel", SPEC)])


def test_a_pattern_that_is_no_regular_expression_says_so():
  with pytest.raises(ValueError, match=r"'block_\(' is no regular expression: missing \)"):
    match(PARAMS, [("block_(", SPEC)])


def test_a_leaf_with_one_axis_cannot_be_adapted():
  with pytest.raises(
    ValueError,
    match=r"matches block_0/attn/query/bias, which cannot be adapted: its shape \(48,\) has fewer "
    r"than two axes; narrow the pattern",
  ):
    match(PARAMS, [(r".*/query/.*", SPEC)])


def test_a_leaf_of_integers_cannot_be_adapted():
  with pytest.raises(ValueError, match="positions, which cannot be adapted: its dtype int32"):
    match(PARAMS, [("positions", SPEC)])


def test_a_leaf_that_cannot_be_adapted_may_be_left_out_before():
  specs = match(PARAMS, [(r".*/bias", None), (r"block_0/attn/query/.*", SPEC)])
  assert list(specs) == ["block_0/attn/query/kernel"]


def test_all_linear_leaves_embeddings_heads_routers_and_norms_out():
  assert list(match(PARAMS, [("all-linear", SPEC)])) == [
    f"block_{n}/{path}/kernel" for n in (0, 1) for path in ("attn/out", "attn/query", "mlp/up")
  ]


def test_the_presets_attention_and_mlp_are_the_parts_of_all_linear_in_such_blocks():
  attention, mlp = (set(match(PARAMS, [(preset, SPEC)])) for preset in ("attention", "mlp"))
  assert attention | mlp == set(match(PARAMS, [("all-linear", SPEC)]))
  assert mlp == {"block_0/mlp/up/kernel", "block_1/mlp/up/kernel"}


@pytest.mark.parametrize(
  ("path", "preset"),
  [
    ("encoder/layer/0/attention/self/query/kernel", "attention"),
    ("model/layers/3/self_attn/q_proj/kernel", "attention"),
    ("decoder/cross_attention/key/kernel", "attention"),
    ("encoderblock_1/MultiHeadDotProductAttention_0/out/kernel", "attention"),
    ("transformer/h/0/attn/c_attn/kernel", "attention"),
    ("transformer/h/0/mlp/c_fc/kernel", "mlp"),
    ("model/layers/3/mlp/gate_proj/kernel", "mlp"),
    ("encoder/layers/2/feed_forward/intermediate_dense/kernel", "mlp"),
    ("encoder/layer/0/intermediate/dense/kernel", "mlp"),
    ("block/MlpBlock_0/Dense_1/kernel", "mlp"),
  ],
)
def test_blocks_are_known_by_the_names_that_models_give_them(path, preset):
  params = {path: kernel(8, 8), "other/kernel": kernel(8, 8)}
  assert list(match(params, [(preset, SPEC)])) == [path]


@pytest.mark.parametrize(
  "path",
  [
    "wte/embedding",
    "lm_head/kernel",
    "word_embeddings/kernel",
    "patch_embed/kernel",
    "mlp/router/w",
  ],
)
def test_what_reads_in_reads_out_or_routes_is_no_linear_layer_of_the_body(path):
  params = {path: kernel(8, 8), "dense/kernel": kernel(8, 8)}
  assert list(match(params, [("all-linear", SPEC)])) == ["dense/kernel"]


def test_with_traced_axes_the_presets_take_what_the_model_contracts_whatever_its_name():
  params = {"mixing": jnp.ones((4, 6)), "kernel": jnp.ones((2, 6)), "norm": jnp.ones(4)}

  def f(p, x):
    return (x * p["norm"]) @ p["mixing"] + p["kernel"].sum(0)

  axes = lora_jax.trace_axes(f, params, jnp.ones((3, 4)))
  assert list(match(params, [("all-linear", SPEC)])) == ["kernel"]
  assert list(match(params, [("all-linear", SPEC)], axes=axes)) == ["mixing"]


def test_a_leaf_that_is_no_array_is_passed_over_by_the_presets():
  params = {"dense": {"kernel": kernel(4, 4)}, "rate": 0.1, "key": jax.random.key(0), "none": None}
  assert list(match(params, [("all-linear", SPEC)])) == ["dense/kernel"]


def test_a_bare_pattern_for_everything_names_the_first_leaf_that_cannot_be_adapted():
  with pytest.raises(ValueError, match="bias, which cannot be adapted"):
    match(nn.Dense(3).init(jax.random.key(0), np.ones(2)), [(".*", SPEC)])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_any_text_as_a_pattern_gives_specs_or_a_value_error_that_quotes_it(pattern):
  try:
    specs = match(PARAMS, [(pattern, SPEC)])
  except ValueError as error:
    assert repr(pattern) in str(error)
  else:
    assert specs
