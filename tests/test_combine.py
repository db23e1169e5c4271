"""combine and rescale against formulas; `test_combine_as_peft.py` holds them to `peft`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combiner_table import COMBINERS, WEIGHTS, deltas
from functions import normal
from tolerances import assert_close

import lora_jax
from lora_jax import LowRank, combine, rescale
from lora_jax.compose import combiners

KEY = jax.random.key(0)

some_combiners = pytest.mark.parametrize("name", ["cat", "svd", "dare_ties", "ties_svd"])
every_deterministic_combiner = pytest.mark.parametrize(
  "name", [name for name in COMBINERS if "dare" not in name]
)


def adapter(seed: int, *, stack=(), rank=2, scale=1.5) -> LowRank:
  a, b = normal(*stack, 11, rank + seed), normal(*stack, rank + seed, 13)
  return LowRank(None, a[..., :rank], b[..., seed:, :], scale)


def pair(**options):
  return {"w": adapter(1, **options)}, {"w": adapter(2, **options)}


def test_cat_is_the_weighted_sum_of_the_changes_and_linear_is_not():
  x, y = pair()
  expected = {"w": 0.7 * deltas(x)["w"] - 0.4 * deltas(y)["w"]}
  assert_close(deltas(combine([x, y], WEIGHTS, combiners.cat)), expected)
  mixed = deltas(combine([x, y], WEIGHTS, combiners.on_factors(combiners.linear)))
  a, b = (np.asarray(each, np.float64) for each in ([x["w"].a, y["w"].a], [x["w"].b, y["w"].b]))
  roots = np.sqrt(np.abs(WEIGHTS) * np.float64(1.5))
  formula = (roots[0] * a[0] - roots[1] * a[1]) @ (roots[0] * b[0] + roots[1] * b[1])
  assert_close(mixed, {"w": jnp.asarray(formula, jnp.float32)})
  assert np.linalg.norm(mixed["w"] - expected["w"]) > 0.5 * np.linalg.norm(expected["w"])


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_svd_is_the_nearest_to_the_sum_and_the_same_without_forming_it(rank):
  x, y = pair()
  whole = np.asarray(deltas(combine([x, y], WEIGHTS, combiners.cat))["w"], np.float64)
  u, s, vt = np.linalg.svd(whole)
  nearest = {"w": jnp.asarray((u[:, :rank] * s[:rank]) @ vt[:rank], jnp.float32)}
  dense = combiners.on_delta(combiners.linear, rank)
  for method in (combiners.svd(rank), dense):
    assert_close(deltas(combine([x, y], WEIGHTS, method)), nearest)


@every_deterministic_combiner
def test_a_stack_of_layers_is_combined_layer_by_layer(name):
  x, y = pair(stack=(3,))
  found = combine([x, y], WEIGHTS, COMBINERS[name])
  for n in range(3):
    layer = [jax.tree.map(lambda leaf, n=n: leaf[n], each) for each in (x, y)]
    expected = deltas(combine(layer, WEIGHTS, COMBINERS[name]))
    assert_close({"w": deltas(found)["w"][n]}, expected)


@some_combiners
def test_combine_is_jitted_with_traced_weights_and_key(name):
  x, y = pair()
  method = COMBINERS[name]
  jitted = jax.jit(lambda x, y, weights, key: combine([x, y], weights, method, key=key))
  expected = combine([x, y], WEIGHTS, method, key=KEY)
  assert_close(deltas(jitted(x, y, jnp.array(WEIGHTS), KEY)), deltas(expected))


@some_combiners
def test_an_adapter_in_bfloat16_is_combined_in_float32(name):
  x, y = ({"w": adapter(n)} for n in (1, 2))
  x, y = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, y))
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, y))
  found = combine([x, y], WEIGHTS, COMBINERS[name], key=KEY)
  assert found["w"].a.dtype == jnp.float32
  assert_close(deltas(found), deltas(combine(rounded, WEIGHTS, COMBINERS[name], key=KEY)))


def test_the_weights_have_a_gradient():
  x, y = pair()

  def size(weights):
    return jnp.sum(deltas(combine([x, y], weights, combiners.cat))["w"] ** 2)

  d = [np.asarray(deltas(each)["w"], np.float64) for each in (x, y)]
  expected = [2 * np.sum(each * (0.7 * d[0] - 0.4 * d[1])) for each in d]
  assert_close(jax.grad(size)(jnp.array(WEIGHTS)), jnp.asarray(expected, jnp.float32))


def test_what_dare_drops_is_other_numbers_for_each_adapter_factor_layer_and_leaf():
  ones = LowRank(None, jnp.ones((2, 50, 20)), jnp.ones((2, 20, 50)))
  adapters = [{"v": ones, "w": ones}] * 2
  method = combiners.on_factors(combiners.dare_linear(0.3))
  # A weight of zero leaves the numbers of the other adapter.
  arrays = [
    np.asarray(x).ravel()
    for weights in ((1.0, 0.0), (0.0, 1.0))
    for each in combine(adapters, weights, method, key=KEY).values()
    for factor in (each.a, each.b)
    for x in factor
  ]
  assert len({x.tobytes() for x in arrays}) == len(arrays) == 16
  for x in arrays:
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.3], rtol=1e-6)
    # 1,000 numbers: five standard deviations.
    assert abs(np.mean(x > 0) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 1000)
  other = combine(adapters, (1.0, 0.0), method, key=jax.random.key(1))["v"].a
  assert not np.array_equal(other, combine(adapters, (1.0, 0.0), method, key=KEY)["v"].a)


def test_dare_drops_the_same_of_a_leaf_whatever_the_other_leaves_are():
  x, y = pair()
  method = combiners.on_factors(combiners.dare_linear(0.5))
  alone = combine([x, y], WEIGHTS, method, key=KEY)["w"]
  beside = combine([{"v": x["w"]} | x, y], WEIGHTS, method, key=KEY)["w"]
  np.testing.assert_array_equal(alone.a, beside.a)


def test_magnitude_keeps_the_largest_numbers_and_exactly_so_many():
  arrays = jnp.array([[3.0, -4.0, 1.0, 0.5, -2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
  mixed = combiners.magnitude_prune(0.4)(None, arrays, jnp.array([1.0, 0.0]))
  np.testing.assert_array_equal(mixed, [3, -4, 0, 0, 0])
  of_equal = combiners.magnitude_prune(0.4)(None, arrays, jnp.array([0.0, 1.0]))
  assert int(of_equal.sum()) == 2


def test_ties_averages_what_agrees_with_the_elected_sign():
  arrays = jnp.array([[3.0, -1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, 5.0, 2.0]])
  ones = jnp.ones(3)
  by_total = combiners.ties(1.0)(None, arrays, ones)
  np.testing.assert_allclose(by_total, [3, 5, 2])
  by_frequency = combiners.ties(1.0, combiners.by_frequency)(None, arrays, ones)
  np.testing.assert_allclose(by_frequency, [-1, -1, 2])


# ---- what is refused


def test_factors_of_different_ranks_are_refused_by_the_leaf():
  x, y = {"block_0/w": adapter(1, rank=2)}, {"block_0/w": adapter(1, rank=3)}
  with pytest.raises(ValueError, match=r"block_0/w: factors of the ranks 2, 3 .* use cat, svd or"):
    combine([x, y], WEIGHTS, combiners.on_factors(combiners.linear))


def test_adapters_of_different_leaves_are_refused():
  x, y = {"w": adapter(1)}, {"w": adapter(1, stack=(3,))}
  with pytest.raises(ValueError, match=r"w: the adapters' factors are of different leaves: \(11, "):
    combine([x, y], WEIGHTS, combiners.cat)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), ((1.0, 2.0),)])
def test_there_must_be_a_weight_for_each_adapter(weights):
  with pytest.raises(ValueError, match="2 adapters and weights of shape"):
    combine(pair(), weights, combiners.cat)


def test_nothing_is_not_combined():
  with pytest.raises(ValueError, match="0 adapters"):
    combine([], [], combiners.cat)


def test_a_kind_without_a_low_rank_form_is_refused_with_the_remedy():
  full = lora_jax.init(KEY, {"bias": normal(11)}, {"bias": lora_jax.Full()})
  with pytest.raises(ValueError, match=r"bias: Full has no low-rank form of its own; .*to_lora"):
    combine([full, full], WEIGHTS, combiners.cat)


@pytest.mark.parametrize("mix", [combiners.dare_linear(0.5), combiners.dare_ties(0.5)])
def test_dropping_at_random_needs_a_key(mix):
  with pytest.raises(ValueError, match="w: values are dropped at random; give combine a key"):
    combine(pair(), WEIGHTS, combiners.on_factors(mix))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
@pytest.mark.parametrize(
  "mix",
  [combiners.magnitude_prune, combiners.ties, combiners.dare_linear, combiners.dare_ties],
)
def test_a_density_that_is_no_share_is_refused(mix, density):
  with pytest.raises(ValueError, match=r"density .* is not in \(0, 1\]"):
    mix(density)


@pytest.mark.parametrize(
  "make", [combiners.svd, lambda rank: combiners.on_delta(combiners.linear, rank)]
)
def test_a_rank_below_one_is_refused(make):
  with pytest.raises(ValueError, match="rank 0 is below 1"):
    make(0)


# ---- rescale


def test_rescale_multiplies_the_change_by_a_number_that_may_be_traced():
  x = {"w": adapter(1), "blocks": adapter(2, stack=(3,))}
  expected = jax.tree.map(lambda delta: -0.5 * delta, deltas(x))
  assert_close(deltas(rescale(x, -0.5)), expected)
  assert_close(deltas(jax.jit(rescale)(x, -0.5)), expected)
