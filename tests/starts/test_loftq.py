"""LoftQ against PEFT's own decomposition of what an NF4 quantiser loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from peers import peft, torch
from tolerances import assert_close

import lora_jax
from lora_jax import Axes, LoRA, PiSSA, Weight, adapt, attach, loftq

SPEC = LoRA(rank=8, alpha=8.0)
W = normal(64, 96)

# The sixteen values of NF4: quantiles of the normal distribution, one of them zero
# (Dettmers et al. 2023, appendix E).
_ABOVE, _BELOW = (
  np.asarray(jax.scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1])) for n in (9, 8)
)
NF4 = np.sort(np.concatenate([_ABOVE, [0.0], -_BELOW])) / _ABOVE.max()


def rounded(w, xp):
  """NF4 in blocks of 32 numbers with the largest as their scale; numpy or jax.numpy."""
  blocks = w.reshape(-1, 32)
  scale = abs(blocks).max(axis=1, keepdims=True)
  nearest = abs(blocks[..., None] / scale[..., None] - xp.asarray(NF4, w.dtype)).argmin(-1)
  return (xp.asarray(NF4, w.dtype)[nearest] * scale).reshape(w.shape)


def quantize(w):
  return rounded(w, jnp)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes(Weight):
  """What `quantize` gives, held as indices and scales."""

  codes: jax.Array
  scale: jax.Array
  sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(default="", metadata={"static": True})

  @classmethod
  def of(cls, w):
    blocks = w.reshape(-1, 32)
    scale = jnp.abs(blocks).max(axis=1, keepdims=True)
    nearest = jnp.abs(blocks[..., None] / scale[..., None] - jnp.asarray(NF4, w.dtype)).argmin(-1)
    return cls(nearest.astype(jnp.uint8), scale, w.shape)

  def materialize(self):
    return (jnp.asarray(NF4, self.scale.dtype)[self.codes] * self.scale).reshape(self.sizes)


def start(w=W, spec=SPEC, quantize=quantize, roles="io", **settings):
  axes = {"w": Axes(roles, ("dot_general",))}
  base, adapters = loftq.start({"w": w, "bias": W[0]}, {"w": spec}, quantize, axes=axes, **settings)
  return base["w"], adapters["w"]


def error(w, base, adapter):
  return float(jnp.linalg.norm((w - adapter.attach(base, "w").materialize()).ravel()))


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_start_is_the_algorithm_s_with_peft_s_decomposition(iterations):
  w = np.asarray(W).T  # PyTorch holds outputs by inputs
  left = w
  for _ in range(iterations):
    base = rounded(left.T, np).T
    factors = peft.utils.loftq_utils._low_rank_decomposition(torch.tensor(w - base), SPEC.rank)
    part = (factors["L"] @ factors["R"]).numpy()
    left = w - part
  ours, adapter = start(iterations=iterations)
  # A number halfway between two of NF4's may be rounded either way.
  differ = np.abs(ours - base.T) > 1e-5
  assert differ.mean() < 0.002
  if iterations == 1:
    assert not differ.any()
    assert_close(adapter.attach(jnp.zeros_like(W), "w").materialize(), jnp.asarray(part.T))
  assert error(W, ours, adapter) == pytest.approx(np.linalg.norm(w - base - part), rel=1e-3)


def test_the_error_is_below_that_of_quantisation_and_falls_with_the_iterations():
  plain = float(jnp.linalg.norm(W - quantize(W)))
  errors = [error(W, *start(iterations=n)) for n in (1, 2, 5)]
  assert plain > errors[0] > errors[1] > errors[2]
  # One SVD of the loss cannot do better than leave its singular values beyond the rank.
  lost = np.linalg.svd(np.asarray(W - quantize(W), np.float64), compute_uv=False)
  assert errors[0] == pytest.approx(np.linalg.norm(lost[SPEC.rank :]), rel=1e-4)


def test_the_scale_is_divided_out_of_the_factors():
  base, adapter = start(iterations=2)
  other_base, other = start(spec=LoRA(rank=8, alpha=2.0, rslora=True), iterations=2)
  assert other.scale == pytest.approx(2 / 8**0.5)
  assert_close(other.attach(other_base, "w").materialize(), adapter.attach(base, "w").materialize())
  np.testing.assert_allclose(
    np.linalg.norm(other.a, axis=0), np.linalg.norm(other.b, axis=1), rtol=1e-4
  )


@pytest.mark.parametrize(
  ("roles", "shape"), [("ioo", (32, 4, 24)), ("iio", (4, 8, 48)), ("iiio", (3, 3, 4, 32))]
)
def test_a_kernel_of_several_axes_is_one_matrix(roles, shape):
  w = normal(*shape)
  base, adapter = start(w, LoRA(rank=4, alpha=1.0), roles=roles, iterations=2)
  cut = roles.index("o")
  inputs = int(np.prod(shape[:cut]))
  flat, flat_adapter = start(w.reshape(inputs, -1), LoRA(rank=4, alpha=1.0), iterations=2)
  assert_close(base.reshape(flat.shape), flat)
  assert error(w, base, adapter) == pytest.approx(error(w.reshape(inputs, -1), flat, flat_adapter))


@pytest.mark.parametrize(("roles", "axis"), [("sio", 0), ("iso", 1)])
def test_every_layer_of_a_stack_has_a_start_of_its_own(roles, axis):
  spec, layers = LoRA(rank=4, alpha=1.0), [normal(32, 64), normal(32, 64) * 3 + 0.1]
  base, adapter = start(jnp.stack(layers, axis), spec, roles=roles, iterations=2)
  weight = adapter.attach(base, "w").materialize()
  for n, layer in enumerate(layers):
    one = error(layer, *start(layer, spec, iterations=2))
    left = float(jnp.linalg.norm(layer - jnp.take(weight, n, axis)))
    assert left == pytest.approx(one, rel=1e-2)


def test_a_quantiser_s_weight_stays_in_the_tree_and_is_adapted_as_it_is():
  base, adapters = loftq.start({"w": W, "bias": W[0]}, {"w": SPEC}, Codes.of, iterations=2)
  assert isinstance(base["w"], Codes) and base["w"].codes.dtype == jnp.uint8
  assert base["bias"] is not None and (base["bias"] == W[0]).all()
  arrays, same = start(iterations=2)
  assert_close(base["w"].materialize(), arrays)
  assert_close(adapters["w"].a, same.a)
  weights = attach(base, adapters)
  assert weights["w"].w is base["w"]
  x = normal(3, 64)
  expected = x @ same.attach(arrays, "w").materialize()
  assert_close(adapt(lambda p, x: x @ p["w"])(weights, x), expected)


def test_a_rounded_base_is_kept_in_the_leaf_s_dtype_and_its_rounding_is_made_up_for():
  w = W.astype(jnp.bfloat16)
  base, adapter = start(w, quantize=lambda w: w, iterations=1)
  assert base.dtype == jnp.bfloat16 and adapter.a.dtype == jnp.float32
  coarse, adapter = start(w, quantize=lambda w: jnp.round(w * 64) / 64 + 1e-4, iterations=1)
  lost = np.asarray(w, np.float64) - np.asarray(coarse, np.float64)
  best = np.linalg.svd(lost)[1][:8]
  part = adapter.attach(jnp.zeros_like(W), "w").materialize()
  assert np.linalg.norm(part) == pytest.approx(np.linalg.norm(best), rel=1e-4)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"iterations": 0}, "LoftQ: iterations 0 is below 1"),
    ({"quantize": lambda w: w[:32]}, r"w: quantize returned \(32, 96\) for \(64, 96\)"),
    ({"spec": LoRA(rank=65, alpha=1.0)}, r"w: rank 65 exceeds min\(64, 96\)"),
    ({"spec": LoRA(rank=2, alpha=-1.0)}, "w: LoftQ divides by the root of the scale"),
    ({"spec": PiSSA(rank=2, alpha=1.0)}, "w: LoftQ is a start of LoRA"),
    (
      {"spec": LoRA(rank=2, alpha=1.0, initializer=lora_jax.initializers.gaussian)},
      "w: LoftQ is a start, and so is the spec's initializer",
    ),
  ],
)
def test_what_loftq_cannot_start_from_is_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    start(**settings)


def test_a_bad_spec_is_refused_before_any_kernel_is_quantised():
  def never(w):
    raise AssertionError("quantised")

  specs = {"a": SPEC, "b": LoRA(rank=65, alpha=1.0)}
  with pytest.raises(ValueError, match="b: rank 65 exceeds"):
    loftq.start({"a": W, "b": W}, specs, never)
