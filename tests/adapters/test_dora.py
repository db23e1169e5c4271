"""DoRA: its norms in extreme cases, what it costs, unmerging, and peft's own layers."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import equations, full_size_values
from peers import peft, torch
from tolerances import assert_close
from weight_table import factors, low_rank

import lora_jax
from lora_jax import Axes, DoRA, LoRA, NotFactored, adapt, attach, init, join, partition, unmerge
from lora_jax.weights import DoRA as Weight
from lora_jax.weights import input_norms

KEY = jax.random.key(0)
SPEC = DoRA(rank=2, alpha=3.0)


def weight(w, a, b, magnitude=None, scale=0.5, **settings) -> Weight:
  """On a base, with the magnitudes of the base or others."""
  magnitude = input_norms(w, "io") if magnitude is None else magnitude
  return Weight(None, a, b, magnitude, scale=scale, **settings).attach(w, "w")


def sum_in_float64(x: Weight) -> np.ndarray:
  w, a, b = (np.asarray(part, np.float64) for part in (x.w, x.a, x.b))
  return w + x.scale * a @ b


# ---- the norm


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1.0, 1e4, 1e15])
def test_the_norm_is_that_of_the_sum_whatever_the_size_of_the_model_is(size):
  a, b = factors((50, 13), "io")
  x = weight(size * normal(50, 13), a, size * b)
  expected = np.linalg.norm(sum_in_float64(x), axis=0)
  np.testing.assert_allclose(x.norm_of_sum(), expected, rtol=2e-6)


@pytest.mark.parametrize("left", [1e-1, 1e-2])
def test_the_squared_norm_is_known_to_a_millionth_of_its_terms_where_they_nearly_cancel(left):
  a, b = factors((50, 13), "io")
  x = weight(-0.5 * a @ b + left * normal(50, 13), a, b)
  expected = np.linalg.norm(sum_in_float64(x), axis=0)
  assert expected.max() < 2 * left
  terms = np.linalg.norm(x.w, axis=0) ** 2 + np.linalg.norm(0.5 * a @ b, axis=0) ** 2
  error = np.abs(np.asarray(x.norm_of_sum(), np.float64) ** 2 - expected**2)
  np.testing.assert_array_less(error, 1e-6 * terms)


@pytest.mark.parametrize("left", [1e-4, 1e-6, 0.0])
def test_what_float32_cannot_tell_from_nothing_is_not_divided_by(left):
  """The squared norm, a millionth of its terms at most, may come out below zero."""
  a, b = factors((50, 13), "io")
  x = weight(-0.5 * a @ b + left * normal(50, 13), a, b)
  assert np.linalg.norm(sum_in_float64(x), axis=0).max() < 1e-3 * np.linalg.norm(x.w, axis=0).min()
  factor = x.factor()
  assert np.isfinite(factor).all()
  assert (factor > 0).all() and (factor < 1100).all()
  gradient = jax.grad(lambda x: jnp.sum(x.materialize()), allow_int=True)(
    dataclasses.replace(x, constant_norm=False)
  )
  assert all(np.isfinite(part).all() for part in jax.tree.leaves(gradient))


def test_the_factor_is_exactly_one_at_the_start_for_weights_of_any_size():
  w = normal(50, 400) * 10.0 ** jnp.linspace(-15, 15, 400)
  a, b = factors(w.shape, "io")
  for x in (weight(w, a, 0 * b), weight(w.astype(jnp.bfloat16), a, 0 * b)):
    np.testing.assert_array_equal(jax.jit(Weight.factor)(x), 1)
    np.testing.assert_array_equal(x.materialize(), x.w)


def test_outputs_of_zeros_start_as_zeros_and_can_learn():
  w = normal(11, 13).at[:, ::2].set(0)
  a, b = factors(w.shape, "io")
  x = weight(w, a, 0 * b)
  np.testing.assert_array_equal(x.factor(), 1)

  def loss(x):
    return jnp.sum((normal(3, 11) @ x.materialize() - 1) ** 2)

  for _ in range(3):
    gradient = jax.grad(loss)(x)
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(gradient))
    moved = {name: getattr(x, name) - 0.01 * getattr(gradient, name) for name in Weight.TRAINED}
    x = dataclasses.replace(x, **moved)
  assert np.abs(x.materialize()[:, ::2]).min() > 0


def test_the_norm_of_a_bfloat16_base_follows_float32_factors():
  a, b = factors((200, 13), "io")
  x = weight(normal(200, 13).astype(jnp.bfloat16), a, 0.1 * b)
  expected = np.linalg.norm(sum_in_float64(x), axis=0)
  assert x.norm_of_sum().dtype == jnp.float32
  np.testing.assert_allclose(x.norm_of_sum(), expected, rtol=2e-4)


# ---- what it costs


def products_with_the_base(spec: DoRA | LoRA, *, gradient: bool) -> int:
  """How many contractions have the whole kernel as an operand in a training step."""
  params = {"w": normal(11, 13)}
  weights = attach(params, init(KEY, params, {"w": spec}))
  train, rest = partition(weights, lora_jax.trainable_mask(weights))

  def loss(train, x):
    return jnp.sum(jnp.sin(adapt(lambda p, x: x @ p["w"], strict=True)(join(train, rest), x)))

  f = jax.grad(loss, (0, 1)) if gradient else loss
  return sum(
    eqn.primitive.name == "dot_general"
    and any(collections.Counter(v.aval.shape) == {11: 1, 13: 1} for v in eqn.invars)
    for eqn in equations(jax.make_jaxpr(f)(train, normal(3, 11)))
  )


def test_a_step_reads_the_base_once_more_than_lora_s_and_never_in_the_backward_pass():
  lora = LoRA(rank=2, alpha=3.0)
  for gradient in (False, True):
    extra = products_with_the_base(SPEC, gradient=gradient)
    assert extra == products_with_the_base(lora, gradient=gradient) + 1
  differentiated = DoRA(rank=2, alpha=3.0, constant_norm=False)
  assert products_with_the_base(differentiated, gradient=True) == (
    products_with_the_base(SPEC, gradient=True) + 1
  )


def test_applied_ahead_the_norm_is_not_computed_again():
  w = normal(11, 13)
  a, b = factors(w.shape, "io")
  x = weight(w, a, b, magnitude=1 + normal(13) ** 2)

  def product(w, x):
    return adapt(lambda w, x: x @ w, strict=True)(w, x)

  rows = normal(3, 11)
  assert_close(product(x.applied(), rows), product(x, rows))
  counts = [
    sum(eqn.primitive.name == "dot_general" for eqn in equations(jax.make_jaxpr(product)(w, rows)))
    for w in (x, x.applied())
  ]
  assert counts == [6, 3]


def test_a_base_that_is_itself_a_weight_is_not_formed():
  base = low_rank(normal(11, 13), "io", seed=1)
  params = {"w": base}
  adapters = init(KEY, params, {"w": SPEC})
  np.testing.assert_allclose(
    adapters["w"].norm,
    np.linalg.norm(np.asarray(base.materialize(), np.float64), axis=0),
    rtol=1e-6,
  )
  adapters = jax.tree.map(lambda x: x + normal(*x.shape), adapters)
  x = dataclasses.replace(attach(params, adapters)["w"], norm=input_norms(base, "io"))
  product = adapt(lambda w, x: x @ w, strict=True)
  assert_close(product(x, normal(3, 11)), normal(3, 11) @ x.materialize())
  assert full_size_values(product, (x, normal(3, 11)), {(11, 13)}) == 0


def test_the_norm_of_a_stack_is_layer_by_layer_whatever_the_place_of_the_stack():
  w = normal(11, 3, 13)
  norms = input_norms(w, "iso")
  assert norms.shape == (3, 13)
  np.testing.assert_allclose(norms, np.linalg.norm(np.asarray(w, np.float64), axis=0), rtol=1e-6)


# ---- with and without the base


def test_the_magnitudes_and_the_norms_are_arrays_of_their_own():
  """A training step gives its state away to be written over; the norms are not of the state."""
  adapter = init(KEY, {"w": normal(11, 13)}, {"w": SPEC})["w"]
  np.testing.assert_array_equal(adapter.magnitude, adapter.norm)
  assert adapter.magnitude.unsafe_buffer_pointer() != adapter.norm.unsafe_buffer_pointer()


def test_an_adapter_without_norms_takes_those_of_the_base_that_it_is_attached_to():
  params = {"w": normal(11, 13)}
  adapter = init(KEY, params, {"w": SPEC})["w"]
  loaded = dataclasses.replace(adapter, norm=None)
  assert_close(attach(params, {"w": loaded})["w"], attach(params, {"w": adapter})["w"])


def test_unmerge_finds_the_base_again_where_no_output_has_turned_by_more_than_a_right_angle():
  rng = np.random.default_rng(0)
  w, (a, b) = normal(11, 400), factors((11, 400), "io")
  magnitude = jnp.asarray(rng.standard_normal(400), jnp.float32)  # of either sign
  x = weight(w, a, 3 * b, magnitude=magnitude)
  upright = np.sum(np.asarray(w) * sum_in_float64(x), axis=0) > 0
  assert 100 < upright.sum() < 400
  restored = unmerge({"w": x.materialize()}, {"w": x.detach()})["w"]
  np.testing.assert_allclose(restored[:, upright], w[:, upright], rtol=0, atol=1e-3)
  assert np.median(np.abs(restored - w)[:, ~upright].max(axis=0)) > 0.1


def test_unmerge_keeps_outputs_of_zeros_and_marks_those_that_a_zero_magnitude_lost():
  w = normal(11, 13).at[:, 3].set(0)
  a, b = factors(w.shape, "io")
  x = weight(w, a, 0.1 * b, magnitude=input_norms(w, "io").at[5].set(0))
  restored = unmerge({"w": x.materialize()}, {"w": x.detach()})["w"]
  assert np.isnan(restored[:, 5]).all()
  kept = [n for n in range(13) if n != 5]
  np.testing.assert_allclose(restored[:, kept], w[:, kept], rtol=0, atol=1e-5)


# ---- what it is not defined for


def test_a_shape_alone_has_no_norms_to_start_from():
  params = {"w": jax.ShapeDtypeStruct((11, 13), jnp.float32)}
  with pytest.raises(ValueError, match=r"^w: DoRA starts from the norms .*\(11, 13\).*parameters"):
    init(KEY, params, {"w": SPEC})


def test_a_rank_above_the_kernel_s_is_refused():
  with pytest.raises(ValueError, match=r"w: rank 12 exceeds min\(11, 13\); use rank <= 11"):
    init(KEY, {"w": normal(11, 13)}, {"w": DoRA(rank=12, alpha=1.0)})


def test_it_is_no_sum_that_could_be_scaled_or_written_as_a_lora():
  adapter = init(KEY, {"w": normal(11, 13)}, {"w": SPEC})["w"]
  with pytest.raises(ValueError, match="the change of a DoRA cannot be multiplied"):
    adapter.rescaled(0.5)
  with pytest.raises(NotFactored, match="no low-rank form"):
    adapter.as_low_rank()


def test_shard_map_does_not_split_the_inputs_over_which_its_norms_are():
  x = attach({"w": normal(11, 13)}, init(KEY, {"w": normal(11, 13)}, {"w": SPEC}))["w"]
  assert x.local_specs(jax.P(None, "model")).magnitude == jax.P("model")
  assert x.partition_specs(jax.P("data", "model")).magnitude == jax.P("model")
  with pytest.raises(NotFactored, match="its norms are over all inputs"):
    x.local_specs(jax.P("data", "model"))


# ---- peft


class Layers(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.emb = torch.nn.Embedding(17, 11)
    self.conv = torch.nn.Conv2d(5, 7, 3, padding=1)
    self.lin = torch.nn.Linear(11, 13, bias=False)


def numpy(x: torch.Tensor) -> np.ndarray:
  return x.detach().numpy()


@pytest.fixture(scope="module")
def theirs():
  """peft's layers, somewhere in training."""
  torch.manual_seed(0)
  config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["emb", "conv", "lin"])
  model = peft.get_peft_model(Layers(), config).base_model.model
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter += 0.3 * torch.randn(parameter.shape)
  return model


def ours(layer, name: str, roles: str, to_kernel) -> Weight:
  """The Weight of one of their layers.

  to_kernel: the axes of their weight, and of their A and B as far as they go, as they are here.
  """
  a, b, m = (
    next(p for n, p in layer.named_parameters() if part in n)
    for part in ("_A.", "_B.", "magnitude")
  )
  w, a = jnp.asarray(to_kernel(numpy(layer.base_layer.weight))), to_kernel(numpy(a))
  b = numpy(b).reshape(-1, 2).T
  a = np.moveaxis(a, 0, -1) if name == "emb" else a
  adapter = Weight(
    None, jnp.asarray(a), jnp.asarray(b), jnp.ravel(numpy(m)), scale=1.5, roles=roles
  )
  return adapter.attach(w, name)


LAYERS = {
  "lin": ("io", np.transpose, lambda w, x: x @ w, normal(3, 11)),
  "emb": ("io", lambda w: w, lambda w, x: w[x], jnp.arange(17).reshape(1, 17)),
  "conv": (
    "iiio",
    lambda w: np.transpose(w, (2, 3, 1, 0)),
    lambda w, x: jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    normal(2, 6, 6, 5),
  ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients_are_peft_s(theirs, name):
  roles, to_kernel, f, x = LAYERS[name]
  layer = getattr(theirs, name)
  weight = ours(layer, name, roles, to_kernel)
  inputs = torch.tensor(np.asarray(x))
  if name == "conv":
    inputs = inputs.permute(0, 3, 1, 2)
  outputs = layer(inputs)
  if name == "conv":
    outputs = (outputs - layer.base_layer.bias[:, None, None]).permute(0, 2, 3, 1)
  assert_close(adapt(f, strict=True)(weight, x), numpy(outputs))

  layer.zero_grad()
  torch.sin(outputs).sum().backward()
  expected = {n: numpy(p.grad) for n, p in layer.named_parameters() if p.grad is not None}
  gradient = jax.grad(lambda w: jnp.sum(jnp.sin(adapt(f, strict=True)(w, x))))(weight)
  for part, n in (("a", "_A."), ("b", "_B."), ("magnitude", "magnitude")):
    theirs_ = next(g for name_, g in expected.items() if n in name_)
    if part == "a":
      theirs_ = np.moveaxis(theirs_, 0, -1) if name == "emb" else to_kernel(theirs_)
    if part == "b":
      theirs_ = theirs_.reshape(-1, 2).T
    assert_close(getattr(gradient, part), theirs_.reshape(getattr(weight, part).shape))


def test_it_trains_as_many_numbers_as_peft_s(theirs):
  trained = sum(p.numel() for n, p in theirs.lin.named_parameters() if "lora_" in n)
  report = lora_jax.summary({"w": normal(11, 13)}, {"w": SPEC})
  assert report.trainable == trained == 11 * 2 + 2 * 13 + 13


def test_a_traced_embedding_has_a_length_for_each_feature():
  params = {"w": normal(17, 11)}
  adapters = init(KEY, params, {"w": SPEC}, {"w": Axes("io", ("gather",))})
  assert adapters["w"].magnitude.shape == (11,)
