"""Low-rank factorisation against formulas in float64, and the ranks that share a budget out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import convolve, normal

import lora_jax
from lora_jax import adapt, cost, materialize, tree
from lora_jax.compress import factorization, factors_as_kernels, pruning, sensitivity
from lora_jax.weights import Factored
from lora_jax.weights.probe import Moments

OF_RANK_TWO = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
EXACT = {
  "svd": factorization.svd,
  "pivoted QR": factorization.pivoted_qr,
  "randomised": factorization.randomized(0),
}
rng = np.random.default_rng(0)
ROWS = rng.standard_normal((64, 12)) @ rng.standard_normal((12, 12))  # inputs that are correlated
W = rng.standard_normal((12, 9))


def moments(rows=ROWS):
  params = {"w": jnp.asarray(W, jnp.float32)}
  batches = [jnp.asarray(rows, jnp.float32)]
  return lora_jax.second_moments(lambda p, x: x @ p["w"], params, ["w"], batches)


@pytest.mark.parametrize("decompose", EXACT.values(), ids=EXACT)
def test_truncation_at_the_exact_rank_is_exact(decompose):
  params = {"w": jnp.asarray(OF_RANK_TWO, jnp.float32)}
  found = factorization.factorize(params, {"w": 2}, decompose)
  np.testing.assert_allclose(found["w"].materialize(), OF_RANK_TWO, rtol=1e-5, atol=1e-5)
  assert (
    np.linalg.norm(
      factorization.factorize(params, {"w": 1}, decompose)["w"].materialize() - OF_RANK_TWO
    )
    > 0.9
  )


def test_the_svd_is_the_nearest_and_the_pivoted_qr_near():
  nearest = np.linalg.norm(np.linalg.svd(W, compute_uv=False)[4:])
  errors = {}
  for name, decompose in EXACT.items():
    a, b = decompose("w", W, 4)
    errors[name] = np.linalg.norm(W - a @ b)
  assert errors["svd"] == pytest.approx(nearest, rel=1e-9)
  assert errors["randomised"] == pytest.approx(nearest, rel=1e-2)
  assert nearest < errors["pivoted QR"] < 1.5 * nearest


def test_the_rows_of_the_pivoted_qr_say_what_it_loses_at_each_rank():
  losses = factorization.tails({"w": W}, ["w"], factorization.pivoted_rows)["w"]
  for rank in (1, 4, 7):
    a, b = factorization.pivoted_qr("w", W, rank)
    assert losses[rank] == pytest.approx(np.linalg.norm(W - a @ b) ** 2, rel=1e-9)
  assert losses[-1] == 0


def test_whitening_loses_what_the_singular_values_say_of_the_outputs_and_less_than_the_svd():
  whitened = factorization.Whitened(moments(), damping=1e-9)
  a, b = whitened("w", W, 4)
  lost = np.linalg.norm(ROWS @ (W - a @ b)) ** 2 / len(ROWS)
  optimal = np.linalg.svd(ROWS @ W, compute_uv=False)[4:] / np.sqrt(len(ROWS))
  assert lost == pytest.approx((optimal**2).sum(), rel=1e-4)
  assert lost == pytest.approx((whitened.values("w", W)[4:] ** 2).sum(), rel=1e-4)
  a, b = factorization.svd("w", W, 4)
  assert lost < 0.9 * np.linalg.norm(ROWS @ (W - a @ b)) ** 2 / len(ROWS)


def test_a_kernel_of_zeros_has_factors_of_zeros():
  for matrix in (np.zeros((12, 9)), np.zeros((12, 20))):
    a, b = factorization.Whitened(moments())("w", matrix, 2)
    np.testing.assert_allclose(a @ b, 0, atol=1e-12)


def test_with_gradients_it_loses_least_of_the_second_order_change_of_the_loss():
  gradients = rng.standard_normal((64, 9)) @ np.diag(np.arange(1.0, 10))
  metric = factorization.Whitened(moments(), {"w": gradients.T @ gradients}, damping=1e-9)

  def change(a, b):
    """E[(xᵀ E g)²], over all pairs of a row and a gradient."""
    return ((ROWS @ (W - a @ b) @ gradients.T) ** 2).mean()

  found = change(*metric("w", W, 4))
  assert found == pytest.approx((metric.values("w", W)[4:] ** 2).sum(), rel=1e-4)
  assert found < 0.9 * change(*factorization.Whitened(moments())("w", W, 4))


def test_the_update_is_the_least_squares_fit_to_the_new_inputs():
  dense = {"w": jnp.asarray(W, jnp.float32)}
  found = factorization.factorize(dense, {"w": 4})
  new = ROWS @ rng.standard_normal((12, 12))
  updated = factorization.update(found, dense, ["w"], moments(new), damping=1e-9)["w"]
  a = np.asarray(found["w"].a, np.float64)
  expected = np.linalg.lstsq(new @ a, new @ W, rcond=None)[0]
  np.testing.assert_allclose(updated.b, expected, rtol=1e-3, atol=1e-4)


def test_the_moments_of_gradients_are_those_that_jax_gives_row_by_row():
  params = {"up": normal(2, 5, 7), "down": normal(7, 3)}
  x, y = normal(4, 5), normal(4, 3)

  def loss(p, x, probe=0.0):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(x @ w) + h, None), jnp.zeros((4, 7)), p["up"])
    return jnp.sum((jax.nn.relu(h) @ p["down"] + probe - y) ** 2)

  axes = {
    "up": lora_jax.Axes("sio", ("dot_general",)),
    "down": lora_jax.Axes("io", ("dot_general",)),
  }
  found = sensitivity.gradient_moments(loss, params, ["up", "down"], [x, x], axes=axes)
  g = jax.grad(loss, 2)(params, x, jnp.zeros((4, 3)))
  np.testing.assert_allclose(found["down"], 2 * g.T @ g, rtol=1e-4, atol=1e-5)
  assert found["up"].shape == (2, 7, 7)

  def by_layer(probe):
    h = jnp.tanh(x @ params["up"][0] + probe[0]) + jnp.tanh(x @ params["up"][1] + probe[1])
    return jnp.sum((jax.nn.relu(h) @ params["down"] - y) ** 2)

  g = jax.grad(by_layer)(jnp.zeros((2, 4, 7)))
  np.testing.assert_allclose(found["up"], 2 * jnp.swapaxes(g, 1, 2) @ g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NWHC")])
def test_the_moments_of_a_convolutions_gradients_are_over_all_its_positions(layout):
  roles = "".join({"O": "o"}.get(c, "i") for c in layout[1])
  shape = {"H": 3, "W": 3, "I": 2, "O": 4}
  params = {"w": normal(*(shape[c] for c in layout[1]))}
  x = normal(*({"N": 2, "H": 6, "W": 5, "C": 2}[c] for c in layout[0]))

  def loss(p, x, probe=0.0):
    y = jax.lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=layout)
    return jnp.sum(jnp.tanh(y + probe) ** 2)

  axes = {"w": lora_jax.Axes(roles, ("conv_general_dilated",))}
  found = sensitivity.gradient_moments(loss, params, ["w"], [x, x], axes=axes)["w"]
  probe = jnp.zeros([{"N": 2, "H": 3, "W": 5, "C": 4}[c] for c in layout[2]])
  g = jnp.moveaxis(jax.grad(loss, 2)(params, x, probe), layout[2].index("C"), -1).reshape(-1, 4)
  np.testing.assert_allclose(found, 2 * g.T @ g, rtol=1e-4, atol=1e-5)


def test_a_convolution_with_groups_has_no_moments_of_gradients():
  params, x = {"w": normal(3, 3, 1, 4)}, normal(2, 6, 5, 2)

  def loss(p, x):
    y = jax.lax.conv_general_dilated(
      x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    return jnp.sum(y**2)

  axes = {"w": lora_jax.Axes("iiio", ("conv_general_dilated",))}
  with pytest.raises(ValueError, match="no gradient reached the results of w"):
    sensitivity.gradient_moments(loss, params, ["w"], [x], axes=axes)


def test_a_convolutions_update_is_the_fit_to_its_new_windows():
  dense = {"w": normal(3, 3, 2, 7)}
  axes = {"w": lora_jax.Axes("iiio", ("conv_general_dilated",))}
  found = factorization.factorize(dense, {"w": 4}, axes=axes)
  windows = np.random.default_rng(1).standard_normal((64, 18))
  total = jnp.asarray(windows.T @ windows, jnp.float32)
  moments = {"w": Moments(total, jnp.asarray(64.0))}
  updated = factorization.update(found, dense, ["w"], moments, damping=1e-9)["w"]
  a, w = np.asarray(found["w"].a, np.float64).reshape(18, 4), dense["w"].reshape(18, 7)
  expected = np.linalg.lstsq(windows @ a, windows @ w, rcond=None)[0]
  assert updated.shape == (3, 3, 2, 7)
  np.testing.assert_allclose(updated.b, expected, rtol=1e-3, atol=1e-4)


def test_kernels_of_any_axes_are_factored_and_cost_what_their_factors_do():
  params = {"conv": normal(3, 3, 2, 6), "layers": normal(2, 8, 4, 3), "bias": normal(6)}
  axes = {"conv": "iiio", "layers": "sioo", "bias": ""}
  axes = {path: lora_jax.Axes(roles, ("dot_general",)) for path, roles in axes.items()}
  found = factorization.factorize(params, {"conv": 6, "layers": 8}, axes=axes)
  assert (found["layers"].a.shape, found["layers"].b.shape) == ((2, 8, 8), (2, 8, 4, 3))
  for path in ("conv", "layers"):
    np.testing.assert_allclose(found[path].materialize(), params[path], rtol=1e-4, atol=1e-5)
  smaller = factorization.factorize(params, {"conv": 2, "layers": 2}, axes=axes)
  x = normal(1, 5, 5, 2)
  np.testing.assert_allclose(
    adapt(convolve, strict=True)({"w": smaller["conv"]}, x),
    convolve({"w": materialize(smaller["conv"])}, x),
    rtol=1e-4,
    atol=1e-5,
  )
  assert sum(x.size for x in jax.tree.leaves(smaller["layers"])) == 2 * 2 * (8 + 12)


def test_a_share_of_the_energy_keeps_the_fewest_ranks_that_hold_it():
  params = {"w": jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.0]))}
  losses = factorization.tails(params, ["w"], factorization.singular_values)
  np.testing.assert_allclose(losses["w"], [21, 5, 1, 0, 0], atol=1e-6)
  assert [factorization.energy_ranks(losses, e)["w"] for e in (0.1, 0.77, 20 / 21, 1.0)] == [
    1,
    2,
    2,
    3,
  ]


def test_a_budget_goes_where_ranks_are_worth_most_and_is_met():
  losses = {
    "steep": np.array([100.0, 1.0, 0.5, 0.2, 0.0]),
    "flat": np.array([4.0, 3.0, 2.0, 1.0, 0.0]),
  }
  costs = {path: sensitivity.parameters(1, 8, 8) for path in losses}
  assert costs["flat"].at(2) == 32 and costs["flat"].at(None) == 64
  ranks = sensitivity.allocate(losses, costs, 80)
  assert ranks == {"steep": 1}  # the flat one stays as it is: its factors save little and lose much
  ranks = sensitivity.allocate(losses, costs, 64)
  best = min(
    (losses["steep"][i] + losses["flat"][j], i, j)
    for i in (1, 2, 3)
    for j in (1, 2, 3)
    if 16 * (i + j) <= 64
  )
  assert losses["steep"][ranks["steep"]] + losses["flat"][ranks["flat"]] == best[0]
  with pytest.raises(ValueError, match=r"the budget 31 cannot be met: with rank 1 .* cost 32"):
    sensitivity.allocate(losses, costs, 31)
  assert sensitivity.allocate(losses, costs, 64, multiple=2) == {"steep": 2, "flat": 2}
  with pytest.raises(ValueError, match="with rank 2 everywhere the kernels cost 64"):
    sensitivity.allocate(losses, costs, 63, multiple=2)


def test_a_budget_of_times_that_no_rank_meets_is_refused_and_not_overrun():
  losses, costs = {"k": np.linspace(8, 0, 9)}, {"k": sensitivity.Cost(1.0, 0.0, 0.4)}
  with pytest.raises(ValueError, match=r"the budget 0\.5 cannot be met: the kernels cost 1 at"):
    sensitivity.allocate(losses, costs, 0.5, multiple=16)  # of ranks up to 8 none is one


def test_the_costs_of_operations_count_rows_and_those_of_time_are_measured():
  assert sensitivity.flops(2, 8, 4, rows=3) == sensitivity.Cost(2 * 3 * 2 * 32, 2 * 3 * 2 * 12)
  cost = sensitivity.milliseconds(1, 256, 256, rows=256, repeats=3)
  assert cost.dense > 0 and cost.at(1) > 0


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda p: factorization.factorize(p, {"w": 10}), "w: the rank must be from 1 to 9, .* is 10"),
    (lambda p: factorization.factorize(p, {"w": 0}), "the rank must be from 1"),
    (lambda p: factorization.factorize(p, {"v": 1}), "'v' matches no leaf"),
    (lambda p: factorization.factorize(p, {}), "the ranks are empty"),
    (lambda p: factorization.factorize({"w": p["w"].at[0, 0].set(jnp.nan)}, {"w": 2}), "holds NaN"),
    (
      lambda p: factorization.factorize(factorization.factorize(p, {"w": 3}), {"w": 2}),
      "w: is compressed already, a Factored",
    ),
    (
      lambda p: factorization.factorize(p, {"w": 2}, factorization.Whitened({})),
      "w: has no moments",
    ),
    (
      lambda p: factorization.factorize(p, {"w": 2}, factorization.Whitened(moments(ROWS[:8]))),
      "w: the calibration data have 8 rows for its 12 inputs; give more",
    ),
    (lambda p: factorization.energy_ranks({}, 1.5), "energy 1.5 must be above 0"),
    (lambda p: factorization.update(p, p, ["w"], {}), "is not a factorized kernel"),
  ],
)
def test_what_cannot_be_factorised_is_refused_with_the_reason(make, words):
  with pytest.raises(ValueError, match=words):
    make({"w": jnp.asarray(W, jnp.float32)})


def test_a_factorised_model_is_adapted_and_heals():
  params = {"w": jnp.asarray(W, jnp.float32)}
  found = factorization.factorize(params, {"w": 3})
  specs = lora_jax.match(found, [("w", lora_jax.LoRA(rank=2, alpha=2.0))])
  x = jnp.asarray(ROWS, jnp.float32)
  adapters = lora_jax.init(jax.random.key(0), found, specs)
  apply = adapt(lambda p, x: x @ p["w"], strict=True)

  def loss(adapters):
    return jnp.mean((apply(lora_jax.attach(found, adapters), x) - x @ params["w"]) ** 2)

  before, step = loss(adapters), jax.jit(jax.grad(loss))
  for _ in range(200):
    adapters = jax.tree.map(lambda p, g: p - 0.002 * g, adapters, step(adapters))
  assert loss(adapters) < 0.7 * before
  assert isinstance(tree.flatten(found, is_leaf=lora_jax.is_weight)["w"], Factored)


class Convolutions(nn.Module):
  """A network of images, written without a thought of factors."""

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Conv(12, (3, 3), strides=2)(x))
    x = nn.gelu(nn.Conv(16, (3, 3), padding="VALID")(x))
    return nn.Dense(10)(x.mean((1, 2)))


class Tied(nn.Module):
  """An embedding that is the head too."""

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(40, 12)
    return embed.attend(jnp.tanh(embed(ids)))


@pytest.mark.parametrize(
  ("module", "x", "patterns", "full", "low"),
  [
    (Convolutions(), normal(2, 9, 9, 3), ["Conv_.*/kernel"], (12, 16), 3),
    (Tied(), jnp.arange(14).reshape(2, 7), ["Embed_0/embedding"], (12,), 4),
  ],
)
def test_convolutions_and_embeddings_of_a_network_are_factored_and_cost_less(
  module, x, patterns, full, low
):
  params = module.init(jax.random.key(0), x)["params"]

  def f(params, x):
    return module.apply({"params": params}, x)

  strict = adapt(f, strict=True)
  axes = lora_jax.trace_axes(f, params, x)
  paths = factorization.select(params, patterns, axes)
  assert len(paths) == len(full)
  whole = factorization.factorize(params, dict(zip(paths, full, strict=True)), axes=axes)
  np.testing.assert_allclose(strict(whole, x), f(params, x), rtol=1e-4, atol=1e-5)

  smaller = factorization.factorize(params, dict.fromkeys(paths, low), axes=axes)
  np.testing.assert_allclose(strict(smaller, x), f(materialize(smaller), x), rtol=1e-4, atol=1e-5)
  operations, numbers = (
    [count(tree) for tree in (smaller, params)]
    for count in (
      lambda params: cost.flops(jax.make_jaxpr(strict)(params, x)),
      lambda params: sum(leaf.size for leaf in jax.tree.leaves(params)),
    )
  )
  assert operations[0] < 0.7 * operations[1]
  assert numbers[0] < 0.7 * numbers[1]


def test_the_factors_of_a_convolution_are_kernels_of_their_own():
  params = {"w": normal(3, 3, 2, 7), "other": normal(4, 4)}
  axes = {
    "w": lora_jax.Axes("iiio", ("conv_general_dilated",)),
    "other": lora_jax.Axes("io", ("dot_general",)),
  }
  small = factorization.factorize(params, {"w": 4}, axes=axes)
  opened, kinds = factors_as_kernels.open_factors(small), factors_as_kernels.open_axes(small, axes)
  assert {path: x.roles for path, x in kinds.items()} == {
    "w/a": "iiio", "w/b": "io", "other": "io",
  }  # fmt: skip
  pruned = pruning.prune(opened, ["w/a", "w/b"], pruning.magnitude, pruning.share(0.5), axes=kinds)
  closed = factors_as_kernels.close_factors(pruned, small)["w"]
  # Half of the inputs of each output: 9 of 18, and 2 of 4.
  assert (closed.a.mask.sum((0, 1, 2)) == 9).all() and (closed.b.mask.sum(0) == 2).all()
  assert closed.shape == (3, 3, 2, 7) and (closed.materialize() != 0).any()
