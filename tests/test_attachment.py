"""init, attach, merge, unmerge and the mask of what trains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import normal
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA, LowRank, adapt, attach, init, merge, trainable_mask, unmerge

SPEC = LoRA(rank=2, alpha=4.0)
PARAMS = {
  "block_0": {"query": {"kernel": normal(11, 13), "bias": normal(13)}},
  "block_1": {"query": {"kernel": normal(13, 11), "bias": normal(11)}},
  "head": {"kernel": normal(11, 5)},
}
PATHS = ("block_0/query/kernel", "block_1/query/kernel")
SPECS = dict.fromkeys(PATHS, SPEC)
KEY = jax.random.key(0)


def model(p, x):
  for name in ("block_0", "block_1"):
    x = jnp.tanh(x @ p[name]["query"]["kernel"] + p[name]["query"]["bias"])
  return x @ p["head"]["kernel"]


def trained(adapters):
  """The adapters somewhere in training: no factor is zero."""
  leaves, treedef = jax.tree.flatten(adapters)
  return jax.tree.unflatten(treedef, [x + normal(*x.shape) for x in leaves])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_is_the_identity_to_the_bit(dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
  x = normal(3, 11).astype(dtype)
  weights = attach(params, init(KEY, params, SPECS))
  for run in (lambda f: f, jax.jit):
    y, expected = run(adapt(model))(weights, x), run(model)(params, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
  merged = merge(params, init(KEY, params, SPECS))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), merged, params))


def test_adapters_are_float32_on_a_bfloat16_base_and_so_are_their_gradients():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  adapters = init(KEY, params, SPECS)

  def loss(adapters):
    y = adapt(model)(attach(params, adapters), normal(3, 11).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    return jnp.sum(y.astype(jnp.float32) ** 2)

  for tree in (adapters, jax.grad(loss)(adapters)):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_attach_puts_weights_at_the_adapters_paths_and_nothing_else_changes():
  weights = attach(PARAMS, init(KEY, PARAMS, SPECS))
  assert isinstance(weights["block_0"]["query"]["kernel"], LowRank)
  assert weights["block_0"]["query"]["kernel"].w is PARAMS["block_0"]["query"]["kernel"]
  assert weights["block_0"]["query"]["kernel"].path == "block_0/query/kernel"
  assert weights["head"]["kernel"] is PARAMS["head"]["kernel"]


def test_attach_and_merge_name_the_leaf_that_the_tree_has_not():
  adapters = {"block_7/query/kernel": init(KEY, PARAMS, SPECS)[PATHS[0]]}
  for f in (attach, merge, unmerge):
    with pytest.raises(ValueError, match="no leaf at block_7/query/kernel"):
      f(PARAMS, adapters)


@pytest.mark.parametrize("shape", [(13, 11), (11,), (2, 11, 13), (11, 12)])
def test_attach_refuses_an_adapter_of_another_shape(shape):
  adapters = {"w": init(KEY, {"w": normal(11, 13)}, {"w": SPEC})["w"]}
  with pytest.raises(ValueError, match=r"w: .*\(11, 2\) and \(2, 13\).* do not fit \(.*1"):
    attach({"w": jnp.ones(shape)}, adapters)


def test_the_merged_params_compute_what_the_adapted_model_does():
  adapters = trained(init(KEY, PARAMS, SPECS))
  x = normal(3, 11)
  assert_close(model(merge(PARAMS, adapters), x), adapt(model)(attach(PARAMS, adapters), x))


def test_unmerge_restores_the_base_to_float32_rounding():
  adapters = trained(init(KEY, PARAMS, SPECS))
  merged = merge(PARAMS, adapters)
  assert not np.allclose(merged["block_0"]["query"]["kernel"], PARAMS["block_0"]["query"]["kernel"])
  restored = unmerge(merged, adapters)
  size = max(np.abs(x).max() for x in jax.tree.leaves(merged))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=size * 2**-23), restored, PARAMS
  )


def test_a_merge_into_bfloat16_is_rounded_once():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  adapters = trained(init(KEY, params, SPECS))
  w, adapter = params["block_0"]["query"]["kernel"], adapters[PATHS[0]]
  exact = np.asarray(w, np.float64) + 2.0 * np.asarray(adapter.a, np.float64) @ np.asarray(
    adapter.b, np.float64
  )
  merged = merge(params, adapters)["block_0"]["query"]["kernel"]
  assert merged.dtype == jnp.bfloat16
  # Half a unit in the last of bfloat16's eight places.
  np.testing.assert_array_less(
    abs(np.asarray(merged, np.float64) - exact), abs(exact) * 1.001 * 2**-8
  )


def test_a_change_of_targets_does_not_change_another_leaf_s_start():
  one, both = (init(KEY, PARAMS, dict.fromkeys(paths, SPEC)) for paths in (PATHS[1:], PATHS))
  np.testing.assert_array_equal(one[PATHS[1]].a, both[PATHS[1]].a)


def test_every_leaf_and_every_layer_of_a_stack_starts_from_numbers_of_its_own():
  params = {"x": jnp.ones((11, 13)), "y": jnp.ones((11, 13)), "blocks": jnp.ones((3, 11, 13))}
  axes = {"blocks": lora_jax.Axes("sio", ("dot_general",))}
  axes |= dict.fromkeys("xy", lora_jax.Axes("io", ("dot_general",)))
  adapters = init(KEY, params, dict.fromkeys(params, SPEC), axes=axes)
  starts = [adapters["x"].a, adapters["y"].a, *adapters["blocks"].a]
  assert len({tuple(a.ravel().tolist()) for a in starts}) == 5


def test_the_scale_is_alpha_by_the_rank_or_by_its_root():
  assert LoRA(rank=16, alpha=8.0).scale == 0.5
  assert LoRA(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_a_starts_uniform_within_one_by_the_root_of_the_inputs():
  adapter = SPEC.init(KEY, "w", jax.ShapeDtypeStruct((4, 25, 13), jnp.float32), "iio")
  a = np.abs(adapter.a)
  assert a.max() <= 0.1 and a.max() > 0.095
  assert math.isclose(a.mean(), 0.05, rel_tol=0.1)


@pytest.mark.parametrize(
  ("rank", "words"),
  [
    (64, r"block_3/attn/query/kernel: rank 64 exceeds min\(32, 48\); use rank <= 32"),
    (33, r"use rank <= 32"),
  ],
)
def test_a_rank_above_the_kernel_s_is_refused(rank, words):
  params = {"block_3": {"attn": {"query": {"kernel": jnp.ones((32, 48))}}}}
  specs = lora_jax.match(params, [("attention", LoRA(rank=rank, alpha=1.0))])
  with pytest.raises(ValueError, match=words):
    init(KEY, params, specs)


def test_the_full_rank_is_allowed():
  adapters = init(KEY, {"w": jnp.ones((32, 48))}, {"w": LoRA(rank=32, alpha=1.0)})
  assert adapters["w"].a.shape == (32, 32)


def test_a_rank_below_one_is_refused():
  with pytest.raises(ValueError, match="rank 0 is below 1"):
    LoRA(rank=0, alpha=1.0)


def test_a_kernel_of_three_axes_without_traced_axes_is_refused():
  with pytest.raises(ValueError, match=r"query: which of the axes of \(11, 3, 5\).*trace_axes"):
    init(KEY, {"query": normal(11, 3, 5)}, {"query": SPEC})


def test_a_nested_weight_trains_its_outer_factors_only():
  healed = attach(PARAMS, init(KEY, PARAMS, SPECS))
  weights = attach(healed, init(jax.random.key(1), healed, SPECS))
  mask = trainable_mask(weights)["block_0"]["query"]["kernel"]
  assert (mask.a, mask.b, mask.w.a, mask.w.b, mask.w.w) == (True, True, False, False, False)


def test_merging_the_outer_adapters_of_a_nested_tree_merges_the_inner_ones_too():
  inner, outer = (trained(init(jax.random.key(n), PARAMS, SPECS)) for n in (0, 1))
  healed = attach(PARAMS, inner)
  assert_close(merge(healed, outer), merge(merge(PARAMS, inner), outer))


def test_also_trains_further_leaves_in_full():
  weights = attach(PARAMS, init(KEY, PARAMS, SPECS))
  mask = trainable_mask(weights, also=[r"head/.*", r".*/bias"])
  assert mask["head"]["kernel"] is True and mask["block_1"]["query"]["bias"] is True
  assert mask["block_0"]["query"]["kernel"].w is False


@pytest.mark.parametrize(
  ("pattern", "words"),
  [
    ("tail/.*", "'tail/.*' of leaves to train in full matches no leaf"),
    ("block_0/.*", "block_0/query/kernel: is adapted, and 'block_0/.*' asks to train it in full"),
    ("head(", r"'head\(' is no regular expression"),
  ],
)
def test_also_refuses_a_pattern_that_matches_nothing_or_a_weight(pattern, words):
  with pytest.raises(ValueError, match=words):
    trainable_mask(attach(PARAMS, init(KEY, PARAMS, SPECS)), also=[pattern])


def test_masked_optax_holds_state_for_the_factors_alone_and_leaves_the_base_bit_identical():
  weights = attach(PARAMS, init(KEY, PARAMS, SPECS))
  mask = trainable_mask(weights)
  frozen = jax.tree.map(lambda trains: not trains, mask)
  optimizer = optax.chain(
    optax.masked(optax.adam(0.1), mask), optax.masked(optax.set_to_zero(), frozen)
  )
  state = optimizer.init(weights)
  sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim)
  assert sizes == sorted(2 * [22, 26, 26, 22])

  def loss(weights):
    return jnp.sum(adapt(model)(weights, normal(3, 11)) ** 2)

  after = weights
  for _ in range(3):
    updates, state = optimizer.update(jax.grad(loss)(after), state, after)
    after = optax.apply_updates(after, updates)
  assert loss(after) < loss(weights)
  changed = jax.tree.map(lambda x, y: bool((x != y).any()), after, weights)
  assert changed == mask


def test_the_gradient_by_the_trainable_part_is_a_tree_of_factors_alone():
  weights = attach(PARAMS, init(KEY, PARAMS, SPECS))
  train, frozen = lora_jax.partition(weights, trainable_mask(weights))
  gradient = jax.grad(
    lambda train: jnp.sum(adapt(model)(lora_jax.join(train, frozen), normal(3, 11)) ** 2)
  )(train)
  assert sorted(x.shape for x in jax.tree.leaves(gradient)) == [(2, 11), (2, 13), (11, 2), (13, 2)]


def test_adapters_are_a_pytree_that_can_be_stacked():
  two = [init(jax.random.key(n), PARAMS, SPECS) for n in range(2)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *two)
  assert isinstance(stacked[PATHS[0]], LowRank)
  assert stacked[PATHS[0]].a.shape == (2, 11, 2)


def partly_trained(also):
  """A tree in which the adapters and further leaves have moved, and the adapters of its start."""
  adapters = init(KEY, PARAMS, SPECS)
  weights = attach(PARAMS, adapters)
  train, frozen = lora_jax.partition(weights, trainable_mask(weights, also=also))
  moved = jax.jit(lambda train: jax.tree.map(lambda x: x + normal(*x.shape), train))(train)
  return lora_jax.join(moved, frozen), adapters


def test_detach_does_not_drop_what_the_mask_trains_in_full():
  weights, adapters = partly_trained([r".*/bias", "head/kernel"])
  leaves = "block_0/query/bias, block_1/query/bias, head/kernel"
  for asked in (adapters, list(adapters)):
    with pytest.raises(
      ValueError, match=f"{leaves}: trained in full, and would be dropped.*params"
    ):
      lora_jax.detach(weights, asked)
  found = lora_jax.detach(weights, adapters, PARAMS)
  assert found.keys() == {*adapters, *leaves.split(", ")}
  jax.tree.map(assert_close, merge(PARAMS, found), lora_jax.materialize(weights))
  traced = jax.jit(lambda weights, params: lora_jax.detach(weights, adapters, params))
  jax.tree.map(assert_close, traced(weights, PARAMS), found)


def test_detach_with_the_base_finds_what_was_trained_in_full_without_a_mask():
  adapters = init(KEY, PARAMS, SPECS)
  weights = attach(PARAMS, adapters)
  assert lora_jax.detach(weights, adapters, PARAMS).keys() == adapters.keys()
  weights["head"]["kernel"] = weights["head"]["kernel"] + 1
  found = lora_jax.detach(weights, adapters, PARAMS)
  assert found.keys() == {*adapters, "head/kernel"}
  jax.tree.map(assert_close, merge(PARAMS, found), lora_jax.materialize(weights))


def test_detach_does_not_drop_an_adapter_that_is_not_asked_for():
  weights, _ = partly_trained([])
  with pytest.raises(ValueError, match=f"{PATHS[1]}: has an adapter that would be dropped"):
    lora_jax.detach(weights, PATHS[:1])


def test_a_mask_that_trains_nothing_in_full_leaves_detach_as_it_was():
  weights, adapters = partly_trained([])
  assert lora_jax.detach(weights, adapters).keys() == adapters.keys()
