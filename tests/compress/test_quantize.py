"""Quantisation of trees: what is chosen, refused, calibrated, and trained against."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import normal
from tolerances import assert_close

import lora_jax
from lora_jax import Axes, LoRA, adapt, compress, loftq
from lora_jax.compress import gptq
from lora_jax.weights import Coded, Format, Quantized
from lora_jax.weights.probe import Moments

PARAMS = {"embed": normal(20, 16), "up": {"kernel": normal(16, 24)}, "norm": jnp.ones(16)}
AXES = {
  "embed": Axes("io", ("gather", "dot_general")),
  "up/kernel": Axes("io", ("dot_general",)),
  "norm": Axes("", ()),
}
SMALL = Format(levels="nf4", block=8, double=True)


def test_the_leaves_that_match_are_quantised_and_no_other():
  formats = lora_jax.match(PARAMS, [(".*kernel", SMALL), ("embed", compress.INT8)], AXES)
  small = compress.quantize(PARAMS, formats, AXES)
  assert isinstance(small["up"]["kernel"], Quantized) and small["norm"] is PARAMS["norm"]
  # A kernel has a scale for each output, an embedding for each token.
  assert small["up"]["kernel"].codes.shape == (24, 8) and small["embed"].codes.shape == (20, 16)
  assert small["up"]["kernel"].path == "up/kernel"
  assert PARAMS["embed"].shape == small["embed"].shape


def test_the_axes_of_a_quantised_tree_are_those_of_the_dense_one():
  def f(params, ids):
    return params["embed"][ids] @ params["up"]["kernel"]

  small = compress.quantize(PARAMS, {"up/kernel": SMALL})
  ids = jnp.arange(3)
  assert lora_jax.trace_axes(f, small, ids) == lora_jax.trace_axes(f, PARAMS, ids)


@pytest.mark.parametrize(
  ("leaf", "words"),
  [
    (normal(4, 4).at[1, 2].set(jnp.nan), "w: has values that are not finite"),
    (normal(2, 4, 4), r"w: which of the axes of \(2, 4, 4\) are inputs"),
    (
      compress.quantize({"w": normal(8, 8)}, {"w": SMALL})["w"],
      "w: is a Quantized and not an array",
    ),
  ],
)
def test_what_cannot_be_quantised_is_refused(leaf, words):
  with pytest.raises(ValueError, match=words):
    compress.quantize({"w": leaf}, {"w": SMALL})


def test_a_leaf_that_is_quantised_already_does_not_match_again():
  small = compress.quantize(PARAMS, {"up/kernel": SMALL})
  with pytest.raises(ValueError, match="cannot be adapted: it is quantized already"):
    lora_jax.match(small, [(".*kernel", SMALL)])


# ---- calibration


def correlated(rows: int, d: int) -> np.ndarray:
  """Inputs of which a few directions are far larger than the rest."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
  return (rng.normal(size=(rows, d)) * np.geomspace(10, 0.1, d)) @ basis


def moments_of(x) -> Moments:
  return Moments(jnp.asarray(x.T @ x, jnp.float32), jnp.float32(len(x)))


def gptq_by_hand(w, h, levels, scale, damping):
  """Algorithm 1 in float64, a column after another, each correction made at once; [inputs, out]."""
  d = len(w)
  order = np.argsort(-np.diagonal(h), kind="stable")
  h = h[np.ix_(order, order)] + damping * np.diagonal(h).mean() * np.eye(d)
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  left, found = w[order].copy(), np.zeros_like(w)
  for n in range(d):
    s = scale[order[n]]
    nearest = abs(left[n][:, None] / s[:, None] - levels).argmin(axis=1)
    found[order[n]] = levels[nearest] * s
    error = (left[n] - found[order[n]]) / u[n, n]
    left[n:] -= np.outer(u[n, n:], error)
  return found


@pytest.mark.parametrize("d", [48, 80])
def test_gptq_is_the_paper_s_algorithm(d):
  w, x = normal(d, 6), correlated(200, d)
  format, moments = Format(levels="int4", block=16), moments_of(x)
  found = gptq.quantize({"w": w}, {"w": format}, {"w": moments})["w"]
  scale = np.repeat(np.asarray(found.scale, np.float64).T, 16, axis=0)
  levels = np.arange(-8, 8, dtype=np.float64)
  h = np.asarray(moments.mean, np.float64)
  expected = gptq_by_hand(np.asarray(w, np.float64), h, levels, scale, 0.01)
  # Where float32 decides a tie the other way, what follows differs: a few columns at most.
  assert np.isclose(found.materialize(), expected, atol=1e-5).mean() > 0.9


@pytest.mark.parametrize("format", [SMALL, Format(levels="int4", block=8), compress.INT8])
def test_outputs_change_less_than_with_every_number_rounded_alone(format):
  w, x = normal(64, 32), correlated(500, 64)

  def lost(small):
    y = x @ np.asarray(w, np.float64)
    return np.linalg.norm(x @ np.asarray(small["w"].materialize(), np.float64) - y)

  nearest = lost(compress.quantize({"w": w}, {"w": format}))
  assert lost(gptq.quantize({"w": w}, {"w": format}, {"w": moments_of(x)})) < 0.7 * nearest


def test_every_layer_of_a_stack_is_calibrated_by_its_own_moments():
  layers = [normal(16, 8), normal(16, 8)[::-1]]
  each = [moments_of(correlated(60, 16)), moments_of(correlated(60, 16)[:, ::-1])]
  axes = {"w": Axes("sio", ("dot_general",))}
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
  found = gptq.quantize({"w": jnp.stack(layers)}, {"w": SMALL}, {"w": stacked}, axes)["w"]
  for n, (w, moments) in enumerate(zip(layers, each, strict=True)):
    alone = gptq.quantize({"w": w}, {"w": SMALL}, {"w": moments})["w"]
    np.testing.assert_array_equal(found.materialize()[n], alone.materialize())


@pytest.mark.parametrize(
  ("moments", "settings", "words"),
  [
    ({}, {}, "w: has no moments"),
    ({"w": moments_of(correlated(10, 16))}, {}, "w: 10 rows of calibration data for 16 inputs"),
    ({"w": Moments(jnp.ones(16), jnp.float32(20))}, {}, "diagonal=False"),
    ({"w": Moments(jnp.full((16, 16), jnp.inf), jnp.float32(20))}, {}, "w: .* are not finite"),
    ({"w": moments_of(correlated(20, 16))}, {"damping": 0.0}, "damping 0.0 is not above 0"),
  ],
)
def test_a_calibration_that_says_too_little_is_refused(moments, settings, words):
  with pytest.raises(ValueError, match=words):
    gptq.quantize({"w": normal(16, 8)}, {"w": SMALL}, moments, **settings)


def test_loftq_starts_nearer_to_the_kernel_than_its_quantised_base():
  params, format = {"w": normal(32, 24), "b": normal(32, 24) * 2}, Format(levels="nf4", block=8)
  specs = lora_jax.match(params, [("w", LoRA(rank=4, alpha=8.0))])
  base, adapters = loftq.start(params, specs, {"w": format})
  assert isinstance(base["w"], Quantized) and base["b"] is params["b"]
  plain = compress.quantize(params, {"w": format})["w"].materialize()
  started = lora_jax.attach(base, adapters)["w"].materialize()
  assert np.linalg.norm(params["w"] - started) < 0.8 * np.linalg.norm(params["w"] - plain)
  with pytest.raises(ValueError, match="not so b"):
    loftq.start(params, specs, {"w": format, "b": format})


# ---- training against the quantised merge


def trained_through_rounding():
  """Adapters of a small regression, trained against their quantised merge."""
  params, x = {"w": normal(32, 8)}, normal(64, 32)
  y = x @ (params["w"] + 0.3 * normal(32, 2) @ normal(2, 8))
  specs = lora_jax.match(params, [("w", LoRA(rank=4, alpha=8.0))])
  adapters = lora_jax.init(jax.random.key(0), params, specs)
  formats = {"w": Format(levels="int4", block=16)}
  f = adapt(lambda p, x: x @ p["w"], strict=True)

  def loss(adapters):
    weights = compress.straight_through(lora_jax.attach(params, adapters), formats)
    return jnp.mean((f(weights, x) - y) ** 2)

  tx = optax.adam(1e-2)
  state = tx.init(adapters)
  step = jax.jit(jax.value_and_grad(loss))
  losses = []
  for _ in range(150):
    value, gradient = step(adapters)
    losses.append(float(value))
    updates, state = tx.update(gradient, state)
    adapters = optax.apply_updates(adapters, updates)
  small = compress.quantize(lora_jax.merge(params, adapters), formats)
  return losses, float(step(adapters)[0]), float(jnp.mean((f(small, x) - y) ** 2))


def test_to_merge_and_to_quantise_loses_nothing_of_what_was_trained_through_rounding():
  losses, trained, merged = trained_through_rounding()
  assert trained < 0.2 * losses[0]
  assert merged == pytest.approx(trained, rel=1e-4)


def test_the_gradient_passes_the_rounding_by():
  w, x = normal(16, 8), normal(3, 16)
  f = adapt(lambda p, x: jnp.sum((x @ p["w"]) ** 2), strict=True)

  def loss(w):
    return f(compress.straight_through({"w": w}, {"w": SMALL}), x)

  rounded = compress.quantize({"w": w}, {"w": SMALL})["w"].materialize()
  assert_close(loss(w), f({"w": rounded}, x))
  assert_close(jax.grad(loss)(w), jax.grad(lambda w: f({"w": w}, x))(rounded))
  assert_close(jax.jvp(loss, (w,), (w,))[1], jax.jvp(lambda w: f({"w": w}, x), (rounded,), (w,))[1])


def test_layers_of_a_scan_are_rounded_one_by_one():
  params, x = {"w": normal(3, 16, 16)}, normal(2, 16)
  axes = {"w": Axes("sio", ("dot_general",))}

  def f(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  weights = compress.straight_through(params, {"w": SMALL}, axes)
  expected = f(lora_jax.materialize(compress.quantize(params, {"w": SMALL}, axes)), x)
  assert_close(jax.jit(adapt(f, strict=True))(weights, x), expected)


def test_what_is_quantised_already_is_not_rounded_again():
  small = compress.quantize(PARAMS, {"up/kernel": SMALL})
  assert isinstance(small["up"]["kernel"], Coded)
  with pytest.raises(ValueError, match="up/kernel: is quantized already"):
    compress.straight_through(small, {"up/kernel": SMALL})
  with pytest.raises(ValueError, match="other: the tree has no such leaf"):
    compress.straight_through(PARAMS, {"other": SMALL})
