"""VeRA: what the layers share, and peft's own layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import equations
from peers import peft, torch
from tolerances import assert_close

import lora_jax
from lora_jax import Axes, VeRA, adapt, attach, init, join, partition
from lora_jax.weights import VeRA as Weight

KEY = jax.random.key(0)


def test_every_layer_has_the_first_rows_and_columns_of_the_same_matrices():
  shapes = {"small": (11, 13), "wide": (11, 40), "tall": (30, 13)}
  params = {path: normal(*shape) for path, shape in shapes.items()}
  adapters = init(KEY, params, dict.fromkeys(params, VeRA(rank=4)))
  a, b = VeRA(rank=4).matrices(30, 40)
  for path, (inputs, outputs) in shapes.items():
    np.testing.assert_array_equal(adapters[path].a, a[:inputs])
    np.testing.assert_array_equal(adapters[path].b, b[:, :outputs])


def test_what_is_shared_comes_from_the_seed_and_not_from_the_run_s_key():
  params, spec = {"w": normal(11, 13)}, {"w": VeRA(rank=4, seed=1)}
  one, same = (init(jax.random.key(n), params, spec)["w"] for n in (0, 1))
  assert_close(one, same)
  other = init(KEY, params, {"w": VeRA(rank=4, seed=2)})["w"]
  assert not np.isclose(one.a, other.a).any() and not np.isclose(one.b, other.b).any()


def test_a_seed_means_the_same_numbers_whatever_generator_jax_is_set_to():
  spec = VeRA(rank=4)
  expected = spec.matrices(11, 13)
  with jax.default_prng_impl("rbg"):
    assert_close(spec.matrices(11, 13), expected)
  # As they are on JAX 0.8 and 0.10: others would change the meaning of vectors that were saved.
  np.testing.assert_allclose(expected[0][0, :2], [-0.53222525, 0.70569134], rtol=1e-6)
  np.testing.assert_allclose(expected[1][:2, 0], [0.19309913, -0.68439388], rtol=1e-6)


@pytest.mark.parametrize(("fan_in", "bound"), [(None, (6 / 16) ** 0.5), (600, 0.1)])
def test_the_matrices_are_uniform_within_he_s_bound(fan_in, bound):
  a, b = VeRA(rank=16, fan_in=fan_in).matrices(200, 300)
  for matrix, limit in ((a, bound), (b, (6 / 16) ** 0.5)):
    sizes = np.sort(np.abs(matrix).ravel()) / limit
    assert sizes[-1] <= 1
    np.testing.assert_allclose(sizes, np.linspace(0, 1, sizes.size), atol=0.03)
    assert abs(np.mean(matrix)) < 0.03 * limit


def test_the_layers_of_a_stack_share_them_too():
  adapter = VeRA(rank=4).init(KEY, "w", normal(3, 11, 13), "sio")
  a, b = VeRA(rank=4).matrices(11, 13)
  for layer in range(3):
    np.testing.assert_array_equal(adapter.a[layer], a)
    np.testing.assert_array_equal(adapter.b[layer], b)
  assert adapter.lambda_d.shape == (3, 4) and adapter.lambda_b.shape == (3, 13)


def test_the_vectors_start_at_d_initial_and_at_zero_and_are_all_that_trains():
  params = {"w": normal(2, 11, 5, 13)}
  axes = {"w": Axes("siio", ("dot_general",))}
  spec = VeRA(rank=100, d_initial=0.3)
  adapter = init(KEY, params, {"w": spec}, axes)["w"]
  assert (adapter.lambda_d == jnp.float32(0.3)).all() and not adapter.lambda_b.any()
  assert adapter.a.shape == (2, 11, 5, 100)  # a rank above the kernel's own
  report = lora_jax.summary(params, {"w": spec}, axes)
  assert report.trainable == 2 * (100 + 13)


def test_the_backward_pass_forms_no_gradient_of_the_shared_a():
  w = normal(11, 13)
  adapter = VeRA(rank=2).init(KEY, "w", w, "io")
  weights = attach({"w": w}, {"w": adapter})
  train, rest = partition(weights, lora_jax.trainable_mask(weights))

  def loss(train):
    return jnp.sum(jnp.sin(adapt(lambda p, x: x @ p["w"])(join(train, rest), normal(3, 11))))

  products = [
    eqn.outvars[0].aval.shape
    for eqn in equations(jax.make_jaxpr(jax.grad(loss))(train))
    if eqn.primitive.name == "dot_general"
  ]
  # x W, h = x A and h B; then the gradient by B, and none by A.
  assert products == [(3, 13), (3, 2), (3, 13), (13, 2)]


def test_as_a_plain_lora_it_makes_the_same_change():
  w = normal(3, 11, 5, 13)
  adapter = VeRA(rank=4).init(KEY, "w", w, "sioo")
  adapter = dataclasses.replace(adapter, lambda_b=normal(3, 5, 13))
  low_rank = adapter.as_low_rank()
  assert low_rank.w is None and low_rank.rank == 4
  assert_close(low_rank.attach(w, "w").materialize(), adapter.attach(w, "w").materialize())


def test_settings_that_mean_nothing_are_refused():
  with pytest.raises(ValueError, match="VeRA: rank 0 is below 1"):
    VeRA(rank=0)
  with pytest.raises(ValueError, match="VeRA: fan_in 0 is below 1"):
    VeRA(rank=4, fan_in=0)


# ---- peft


class Layers(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.first, self.second = torch.nn.Linear(11, 30), torch.nn.Linear(24, 13)


def numpy(x: torch.Tensor) -> np.ndarray:
  return x.detach().numpy()


@pytest.fixture(scope="module")
def theirs():
  """peft's layers, somewhere in training."""
  torch.manual_seed(0)
  config = peft.VeraConfig(r=4, target_modules=["first", "second"])
  model = peft.get_peft_model(Layers(), config).base_model.model
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "vera_lambda" in name:
        parameter += torch.randn(parameter.shape)
  return model


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_layer_is_peft_s_with_its_matrices(theirs, name):
  layer = getattr(theirs, name)
  w = numpy(layer.base_layer.weight).T
  a, b = numpy(layer.vera_A["default"]).T, numpy(layer.vera_B["default"]).T
  vectors = numpy(layer.vera_lambda_d["default"]), numpy(layer.vera_lambda_b["default"])
  parts = (jnp.asarray(x) for x in (a[: w.shape[0]], b[:, : w.shape[1]], *vectors))
  weight = Weight(None, *parts).attach(jnp.asarray(w), name)
  x = normal(3, w.shape[0])
  y = adapt(lambda w, x: x @ w, strict=True)(weight, x) + numpy(layer.base_layer.bias)
  assert_close(y, numpy(layer(torch.tensor(np.asarray(x)))))
  delta = numpy(layer.get_delta_weight("default")).T
  assert_close(weight.delta(), delta)


def test_its_matrices_are_distributed_as_peft_s(theirs):
  layer = theirs.first
  ours = VeRA(rank=4, fan_in=24).matrices(24, 30)
  for x, y in zip(ours, (layer.vera_A["default"].T, layer.vera_B["default"].T), strict=True):
    assert x.shape == tuple(y.shape)
    np.testing.assert_allclose(np.abs(x).max(), np.abs(numpy(y)).max(), rtol=0.05)


def test_it_trains_as_many_numbers_as_peft_s(theirs):
  trained = sum(p.numel() for n, p in theirs.first.named_parameters() if "vera_lambda" in n)
  assert lora_jax.summary({"w": normal(11, 30)}, {"w": VeRA(rank=4)}).trainable == trained == 4 + 30
