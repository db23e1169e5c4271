"""PiSSA against PEFT's, against the SVD in float64, and as a change of the original base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import full_size_values
from starts import peft_start, start
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA, LowRank, PiSSA, Recentred, adapt, attach, detach, merge


@pytest.fixture(scope="module")
def real(smollm2):
  """A projection of a pretrained model, (576, 192)."""
  return smollm2.params["block_7"]["attn"]["key"]["kernel"]


@pytest.mark.parametrize(("alpha", "rslora"), [(8.0, False), (3.0, False), (3.0, True)])
def test_the_start_is_peft_s_on_a_pretrained_weight(real, alpha, rslora):
  residual, a, b, scale = peft_start(real, "pissa", 8, alpha, rslora)
  ours = start(real, PiSSA(rank=8, alpha=alpha, rslora=rslora))
  assert ours.scale == pytest.approx(scale)
  assert_close(ours.attach(real, "w").w, jnp.asarray(residual))
  # The signs of a pair of singular vectors are free, and each vector is known to no more than
  # rounding divided by the gap between its singular value and the next.
  signs = np.sign(np.sum(np.asarray(ours.a) * a, axis=0))
  np.testing.assert_allclose(ours.a, a * signs, atol=1e-4 * np.abs(a).max())
  np.testing.assert_allclose(ours.b, b * signs[:, None], atol=1e-4 * np.abs(b).max())


def test_the_randomised_start_is_as_near_to_the_best_as_peft_s(real):
  """The part that is left, in the Frobenius norm; the best has the singular values beyond 8."""
  best = np.linalg.norm(np.linalg.svd(np.asarray(real, np.float64))[1][8:])
  left = {
    iterations: np.linalg.norm(
      start(real, PiSSA(rank=8, alpha=8.0, iterations=iterations)).attach(real, "w").w
    )
    for iterations in (0, 1, 4)
  }
  theirs = np.linalg.norm(peft_start(real, "pissa_niter_4", 8, 8.0)[0])
  assert best <= left[4] * (1 + 1e-6)
  assert left[4] <= theirs
  assert left[4] < left[1] < left[0]
  assert left[4] < 1.005 * best


@pytest.mark.parametrize(
  ("roles", "shape", "iterations"),
  [("io", (11, 13), None), ("ioo", (11, 3, 5), None), ("iio", (3, 5, 11), None),
   ("iiio", (3, 3, 4, 11), None), ("sio", (3, 11, 13), None), ("iso", (11, 3, 13), None),
   ("ssioo", (2, 2, 11, 3, 5), None), ("iiio", (3, 3, 4, 11), 4), ("sio", (3, 11, 13), 4)],
)  # fmt: skip
def test_the_trained_part_is_the_nearest_matrix_of_its_rank(roles, shape, iterations):
  w = normal(*shape)
  adapter = start(w, PiSSA(rank=2, alpha=3.0, iterations=iterations), roles)
  part = LowRank(
    jnp.zeros(shape), adapter.a, adapter.b, adapter.scale, roles=adapter.roles
  ).materialize()
  order = [n for role in "sio" for n, x in enumerate(roles) if x == role]
  inputs = np.prod([n for n, x in zip(shape, roles, strict=True) if x == "i"])
  stack = np.prod([n for n, x in zip(shape, roles, strict=True) if x == "s"], dtype=int)
  matrices, parts = (
    np.transpose(np.asarray(x, np.float64), order).reshape(stack, inputs, -1) for x in (w, part)
  )
  for matrix, found in zip(matrices, parts, strict=True):
    s = np.linalg.svd(matrix)[1]
    # Nothing of this rank is nearer (Eckart and Young), and what is as near is the same.
    tolerance = 1e-5 if iterations is None else 1e-2
    assert np.linalg.norm(matrix - found) <= (1 + tolerance) * np.linalg.norm(s[2:])
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(s[:2]), rel=tolerance)
  assert_close(merge({"w": w}, {"w": adapter})["w"], w)


def test_the_two_factors_share_the_singular_values_equally():
  adapter = start(normal(11, 13), PiSSA(rank=3, alpha=6.0))
  sizes = np.linalg.norm(adapter.a, axis=0), np.linalg.norm(adapter.b, axis=1)
  np.testing.assert_allclose(*sizes, rtol=1e-5)
  s = np.linalg.svd(np.asarray(normal(11, 13), np.float64))[1][:3]
  np.testing.assert_allclose(sizes[0] ** 2, s / 2, rtol=1e-5)


def test_a_bfloat16_base_starts_from_float32_factors_and_keeps_its_dtype():
  w = normal(64, 48).astype(jnp.bfloat16)
  adapter = start(w, PiSSA(rank=4, alpha=4.0))
  assert adapter.a.dtype == adapter.b0.dtype == jnp.float32
  weight = adapter.attach(w, "w")
  assert weight.w.dtype == weight.materialize().dtype == jnp.bfloat16
  assert_close(weight.materialize(), w, "bfloat16")


def trained(adapter):
  return jax.tree.map(
    lambda x, trains: x + 0.1 * normal(*x.shape) if trains else x, adapter, adapter.trainable()
  )


@pytest.fixture
def one():
  w = normal(2, 11, 3, 5)
  return w, trained(start(w, PiSSA(rank=2, alpha=3.0), "sioo"))


def test_detach_gives_back_what_was_attached(one):
  w, adapter = one
  back = detach(attach({"w": w}, {"w": adapter}), ["w"])["w"]
  assert isinstance(back, Recentred)
  for name, part in adapter.parts.items():
    np.testing.assert_array_equal(back.parts[name], part)
  assert_close(merge({"w": w}, {"w": back}), merge({"w": w}, {"w": adapter}))


def test_the_change_of_the_original_base_is_that_of_a_plain_lora_of_twice_the_rank(one):
  w, adapter = one
  plain = adapter.as_low_rank()
  assert (type(plain), plain.rank, plain.w) == (LowRank, 4, None)
  assert_close(merge({"w": w}, {"w": plain}), merge({"w": w}, {"w": adapter}))
  restored = lora_jax.unmerge(merge({"w": w}, {"w": adapter}), {"w": adapter})
  np.testing.assert_allclose(restored["w"], w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.5, -2.0])
def test_scaling_an_adapter_scales_the_change_of_the_original_base(one, c):
  w, adapter = one
  change = merge({"w": w}, {"w": adapter})["w"] - w
  expected = w + c * change
  assert_close(adapter.rescaled(c).attach(w, "w").materialize(), expected)
  assert_close(adapter.attach(w, "w").rescaled(c).materialize(), expected)


def test_a_base_of_weights_stays_as_it_is_and_is_used_in_factored_form():
  params = {"w": normal(11, 13)}
  inner = attach(params, {"w": trained(start(params["w"], LoRA(rank=2, alpha=2.0)))})
  adapter = trained(start(inner["w"], PiSSA(rank=3, alpha=3.0)))
  weights = attach(inner, {"w": adapter})
  assert weights["w"].w.w is inner["w"]
  assert_close(
    weights["w"].materialize(), adapter.as_low_rank().attach(inner["w"], "").materialize()
  )
  mask = weights["w"].trainable()
  assert (mask.a, mask.b, jax.tree.leaves(mask.w)) == (True, True, [False] * 5)

  def f(weights, x):
    return x @ weights["w"]

  x = normal(3, 11)
  assert_close(adapt(f, strict=True)(weights, x), x @ weights["w"].materialize())
  assert full_size_values(adapt(f, strict=True), (weights, x), {(11, 13)}) == 0


def test_the_start_outlives_a_step_that_donates_what_trains():
  adapter = start(normal(11, 13), PiSSA(rank=2, alpha=2.0))
  train, rest = lora_jax.partition(adapter, adapter.trainable())
  jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)(train)
  assert_close(rest.a0, start(normal(11, 13), PiSSA(rank=2, alpha=2.0)).a0)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"rank": 0, "alpha": 1.0}, "PiSSA: rank 0 is below 1"),
    ({"rank": 2, "alpha": 0.0}, "PiSSA: alpha 0.0 is not above 0"),
    ({"rank": 2, "alpha": 1.0, "iterations": -1}, "PiSSA: iterations -1 is below 0"),
  ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    PiSSA(**settings)


def test_a_rank_or_a_leaf_without_values_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"w: rank 12 exceeds min\(11, 13\)"):
    start(normal(11, 13), PiSSA(rank=12, alpha=1.0))
  with pytest.raises(ValueError, match=r"w: PiSSA starts from the values .* only a shape"):
    start(jax.ShapeDtypeStruct((11, 13), jnp.float32), PiSSA(rank=2, alpha=1.0))
