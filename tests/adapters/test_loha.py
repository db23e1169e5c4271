"""LoHa: its low-rank form, its start, and peft's own layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from peers import peft, torch
from tolerances import assert_close

import lora_jax
from lora_jax import LoHa, adapt, init
from lora_jax.weights import LoHa as Weight

KEY = jax.random.key(0)


def trained(adapter: Weight) -> Weight:
  return dataclasses.replace(adapter, a2=normal(*adapter.a2.shape))


@pytest.mark.parametrize(
  ("roles", "shape"), [("io", (11, 13)), ("iio", (5, 11, 13)), ("sioo", (3, 11, 5, 13))]
)
def test_as_a_plain_lora_of_the_rank_squared_it_makes_the_same_change(roles, shape):
  w = normal(*shape)
  adapter = trained(LoHa(rank=3, alpha=2.0).init(KEY, "w", w, roles))
  low_rank = adapter.as_low_rank()
  assert low_rank.w is None and low_rank.rank == 9
  assert_close(low_rank.attach(w, "w").materialize(), adapter.attach(w, "w").materialize())


def test_its_change_can_have_the_rank_squared():
  w = jnp.zeros((20, 20))
  adapter = trained(LoHa(rank=3, alpha=2.0).init(KEY, "w", w, "io"))
  assert np.linalg.matrix_rank(adapter.attach(w, "w").materialize()) == 9


def test_a_change_of_it_is_multiplied_by_a_number():
  w = normal(11, 13)
  adapter = trained(LoHa(rank=3, alpha=2.0).init(KEY, "w", w, "io"))
  delta = adapter.attach(w, "w").delta()
  assert_close(adapter.rescaled(-0.5).attach(w, "w").delta(), -0.5 * delta)


def test_twice_the_parameters_of_lora_train():
  report = lora_jax.summary({"w": normal(11, 13)}, {"w": LoHa(rank=3, alpha=2.0)})
  assert report.trainable == 2 * 3 * (11 + 13)


def test_ranks_that_mean_nothing_are_refused():
  with pytest.raises(ValueError, match="LoHa: rank 0 is below 1"):
    LoHa(rank=0, alpha=1.0)
  with pytest.raises(ValueError, match=r"w: rank 12 exceeds min\(11, 13\); use rank <= 11"):
    init(KEY, {"w": normal(11, 13)}, {"w": LoHa(rank=12, alpha=1.0)})


# ---- peft


class Layers(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.lin = torch.nn.Linear(110, 130, bias=False)
    self.conv = torch.nn.Conv2d(5, 7, 3, padding=1, bias=False)


def numpy(x: torch.Tensor) -> np.ndarray:
  return x.detach().numpy()


@pytest.fixture(scope="module")
def theirs():
  torch.manual_seed(0)
  config = peft.LoHaConfig(r=4, alpha=6, target_modules=["lin", "conv"])
  return peft.get_peft_model(Layers(), config).base_model.model


NAMES = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}


def test_it_starts_from_the_distributions_that_peft_s_layer_starts_from(theirs):
  adapter = LoHa(rank=4, alpha=6.0).init(KEY, "w", normal(110, 130), "io")
  assert adapter.scale == theirs.lin.scaling["default"]
  for part, name in NAMES.items():
    ours, peft_s = getattr(adapter, part), numpy(getattr(theirs.lin, name)["default"]).T
    assert ours.shape == peft_s.shape
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(peft_s).max(), rtol=0.03)
    np.testing.assert_allclose(np.std(ours), np.std(peft_s), rtol=0.1)


@pytest.mark.parametrize("name", ["lin", "conv"])
def test_a_layer_is_peft_s(theirs, name):
  layer = getattr(theirs, name)
  with torch.no_grad():
    layer.hada_w2_b["default"].copy_(torch.randn(layer.hada_w2_b["default"].shape))
  w = numpy(layer.base_layer.weight)
  parts = {part: numpy(getattr(layer, n)["default"]).T for part, n in NAMES.items()}
  if name == "lin":
    roles, w, x, f = "io", w.T, normal(3, 110), lambda w, x: x @ w
    inputs = torch.tensor(np.asarray(x))
  else:
    # Their inputs are flattened as (channel, row, column).
    roles, w, x = "iiio", w.transpose(2, 3, 1, 0), normal(2, 6, 6, 5)
    for part in ("a1", "a2"):
      parts[part] = parts[part].reshape(5, 3, 3, -1).transpose(1, 2, 0, 3)
    inputs = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)

    def f(w, x):
      return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )

  parts = {part: jnp.asarray(x) for part, x in parts.items()}
  weight = Weight(None, **parts, scale=6 / 4, roles=roles).attach(jnp.asarray(w), name)
  outputs = layer(inputs)
  if name == "conv":
    outputs = outputs.permute(0, 2, 3, 1)
  assert_close(adapt(f, strict=True)(weight, x), numpy(outputs))


def test_it_trains_as_many_numbers_as_peft_s(theirs):
  peft_s = sum(p.numel() for n, p in theirs.lin.named_parameters() if "hada_" in n)
  report = lora_jax.summary({"w": normal(110, 130)}, {"w": LoHa(rank=4, alpha=6.0)})
  assert report.trainable == peft_s
