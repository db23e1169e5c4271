"""Patterns and presets to specs: what is adapted, and what is said when it cannot be."""

import copy
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_jax
from lora_jax import LoRA, loftq, match
from lora_jax.compress import factorization, gptq, pruning, sensitivity
from lora_jax.compress.quantization import quantize
from lora_jax.compress.quantized_training import straight_through
from lora_jax.weights.quantized import NF4

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


@pytest.mark.parametrize(
  ("written", "meant"),
  [("all_linear", "all-linear"), ("all-liner", "all-linear"), ("atention", "attention")],
)
def test_a_mistyped_preset_is_answered_with_the_preset(written, meant):
  with pytest.raises(ValueError, match=f"matches no leaf.*The preset '{meant}' has a similar name"):
    match(PARAMS, [(written, SPEC)])


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
    ("down/attentions_0/block/attn1/to_q/kernel", "attention"),
    ("down/attentions_0/block/ff/net_0/proj/kernel", "mlp"),
    ("down/attentions_0/block/ff/net_2/kernel", "mlp"),
    ("down/attentions_0/proj_in/kernel", "attention"),
    ("attention_block/mlp_0/up/kernel", "mlp"),
    ("mlp_mixer/block_0/self_attn/query/kernel", "attention"),
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
    "patch_embed/proj/kernel",
    "embeddings/patch_embeddings/projection/kernel",
    "head/kernel",
    "head/dense/kernel",
    "mlm_head/layers_0/kernel",
    "shared/embed/weight",
    "lm_head/kernel/value",
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
  with pytest.warns(UserWarning, match="kernel: not followed: reduce_sum"):
    specs = match(params, [("all-linear", SPEC)], axes=axes)
  assert list(specs) == ["mixing"]


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


@pytest.mark.parametrize(
  "path",
  [
    "multi_head/query/kernel",
    "block/multi_head/kernel",
    "self_attention_head/value/kernel",
    "time_embed/dense/kernel",
    "time_embedding/linear_1/kernel",
    "label_embed/mlp/0/kernel",
    "attn/value/kernel",
    "dense/kernel/value",
    "layers/0/linear/weight",
    "gru/w_h",
    "cell/weight_ih",
  ],
)
def test_a_layer_below_an_embedding_or_of_many_heads_is_one_of_the_body(path):
  assert list(match({path: kernel(8, 8)}, [("all-linear", SPEC)])) == [path]


def test_boxed_leaves_are_found_by_name_by_every_preset():
  box = lambda *shape: nn.Partitioned(kernel(*shape), names=(None,) * len(shape))  # noqa: E731
  params = {"mlp": {"kernel": box(4, 6), "bias": box(6)}, "norm": {"scale": box(4)}}
  assert list(match(params, [("mlp", SPEC)])) == ["mlp/kernel/value"]
  full = lora_jax.Full()
  assert list(match(params, [("bias", full)])) == ["mlp/bias/value"]
  assert list(match(params, [("norm", full)])) == ["norm/scale/value"]


VARIABLES = {
  "params": {"dense": {"kernel": kernel(8, 6), "bias": kernel(6)}},
  "batch_stats": {"dense": {"kernel": {"u": kernel(1, 6)}, "bias": kernel(6)}},
  "cache": {"kernel": kernel(8, 6)},
}


def test_other_collections_than_the_parameters_hold_no_kernels():
  def f(v, x):
    u = v["batch_stats"]["dense"]["kernel"]["u"]
    sigma = jnp.vdot(u @ v["params"]["dense"]["kernel"].T, u @ v["cache"]["kernel"].T)
    return x @ (v["params"]["dense"]["kernel"] / sigma)

  axes = lora_jax.trace_axes(f, VARIABLES, kernel(3, 8))
  for found in (match(VARIABLES, [("all-linear", SPEC)], each) for each in (None, axes)):
    assert list(found) == ["params/dense/kernel"]
    assert "collection 'cache'" in found.left_out["cache/kernel"]
  assert "batch_stats/dense/kernel/u" in found.left_out
  assert list(match(VARIABLES, [("bias", lora_jax.Full())])) == ["params/dense/bias"]


@pytest.mark.parametrize("of", ["match", "init", "summary"])
def test_axes_of_another_tree_are_refused_with_both_trees_first_paths(of):
  params = {"dense": {"kernel": jnp.ones((8, 6))}}
  axes = lora_jax.trace_axes(
    lambda v, x: x @ v["params"]["dense"]["kernel"], {"params": params}, jnp.ones((3, 8))
  )
  specs = {"dense/kernel": SPEC}
  call = {
    "match": lambda: match(params, [(".*", SPEC)], axes),
    "init": lambda: lora_jax.init(jax.random.key(0), params, specs, axes),
    "summary": lambda: lora_jax.summary(params, specs, axes),
  }[of]
  with pytest.raises(
    ValueError,
    match=r"another tree.*'params/dense/kernel'.*'dense/kernel'.*trace_axes with the same",
  ):
    call()


LOST = {
  "kernel": jnp.ones((4, 6)),
  "table": jnp.ones((3, 6)),
  "dense": {"kernel": jnp.ones((4, 6))},
}


def lossy(p, x):
  scattered = jnp.zeros((2, 4, 6)).at[0].set(p["kernel"])[0]
  return x @ scattered + x @ p["dense"]["kernel"] + p["table"]


def test_kernels_that_cannot_be_followed_are_a_warning_that_names_them_and_says_why():
  axes = lora_jax.trace_axes(lossy, LOST, jnp.ones((3, 4)))
  with pytest.warns(UserWarning, match=r"1 that look like kernels.*kernel: not followed: scatter"):
    specs = match(LOST, [("all-linear", SPEC)], axes)
  assert list(specs) == ["dense/kernel"]
  assert specs.left_out == {"kernel": "not followed: scatter"}


@pytest.mark.parametrize(
  "rules",
  [
    [("kernel", None), ("all-linear", SPEC)],
    [("kernel|dense/kernel", SPEC)],
    [("mlp", None)],
  ],
)
def test_what_a_rule_decides_is_no_warning(rules):
  params = LOST | {"mlp": {"kernel": jnp.ones((4, 6))}}
  axes = lora_jax.trace_axes(
    lambda p, x: lossy(p, x) + x @ p["mlp"]["kernel"], params, jnp.ones((3, 4))
  )
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert match(params, rules, axes).left_out == {}


def test_a_preset_that_finds_nothing_says_what_it_left_out():
  with pytest.raises(
    ValueError, match="matches no leaf of these parameters: head/kernel: its path"
  ):
    match({"head": {"kernel": kernel(4, 6)}}, [("all-linear", SPEC)])


def test_the_result_is_the_dict_that_it_was_and_remembers_the_axes():
  params = {"mixing": jnp.ones((4, 2, 3)), "head": {"kernel": jnp.ones((6, 2))}}
  axes = lora_jax.trace_axes(
    lambda p, x: (x @ p["mixing"].reshape(4, 6)) @ p["head"]["kernel"], params, jnp.ones((3, 4))
  )
  specs = match(params, [("all-linear", SPEC)], axes)
  assert specs == {"mixing": SPEC} and {**specs} == dict(specs) and isinstance(specs, dict)
  assert specs.axes is axes and list(specs.left_out) == ["head/kernel"]
  for copied in (copy.copy(specs), copy.deepcopy(specs)):
    assert copied == specs and copied.axes == axes and copied.left_out == specs.left_out
  adapters = lora_jax.init(jax.random.key(0), params, specs)
  assert adapters["mixing"].b.shape == (2, 2, 3)
  assert lora_jax.summary(params, specs).trainable == 2 * 4 + 2 * 6
  with pytest.raises(ValueError, match="mixing: which of the axes"):
    lora_jax.init(jax.random.key(0), params, {**specs})


HEADS = {"mixing": jnp.asarray(np.random.default_rng(0).standard_normal((8, 2, 4)), jnp.float32)}
INPUTS = jnp.asarray(np.random.default_rng(1).standard_normal((16, 8)), jnp.float32)


def heads(p, x):
  return jnp.einsum("bi,iho->bho", x, p["mixing"])


# What takes paths, specs or formats, and the axes: (targets, axes, moments) -> arrays.
USERS = {
  "second_moments": (SPEC, lambda t, axes, m: lora_jax.second_moments(
    heads, HEADS, t, [INPUTS], axes=axes)),
  "gradient_moments": (SPEC, lambda t, axes, m: sensitivity.gradient_moments(
    lambda p, x: (heads(p, x) ** 2).sum(), HEADS, t, [INPUTS], axes=axes)),
  "eva": (SPEC, lambda t, axes, m: lora_jax.eva.start(HEADS, t, m, axes=axes)),
  "loftq": (SPEC, lambda t, axes, m: loftq.start(
    HEADS, t, dict.fromkeys(t, NF4), axes=axes, iterations=1)[1]),
  "quantize": (NF4, lambda t, axes, m: quantize(HEADS, t, axes)),
  "gptq": (NF4, lambda t, axes, m: gptq.quantize(HEADS, t, m, axes)),
  "straight_through": (NF4, lambda t, axes, m: straight_through(HEADS, t, axes)),
  "prune": (SPEC, lambda t, axes, m: pruning.prune(
    HEADS, list(t) if axes else t, pruning.magnitude, pruning.n_of_m(2, 4), axes=axes)),
  "tails": (SPEC, lambda t, axes, m: factorization.tails(
    HEADS, t, factorization.singular_values, axes=axes)),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "use"), USERS.values(), ids=USERS)
def test_whoever_takes_what_match_returned_finds_the_axes_in_it(spec, use):
  axes = lora_jax.trace_axes(heads, HEADS, INPUTS)
  targets = match(HEADS, [("mixing", spec)], axes)
  moments = lora_jax.second_moments(heads, HEADS, ["mixing"], [INPUTS], axes=axes)
  found, expected = (
    use(t, given, moments) for t, given in ((targets, None), (dict(targets), axes))
  )
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), found, expected))
  with pytest.raises(ValueError, match="mixing: which of the axes"):
    use(dict(targets), None, moments)
