"""combine against `peft`'s `add_weighted_adapter`, on a layer of every kind that it adapts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combiner_table import COMBINERS, DENSITY, RANK, WEIGHTS, deltas
from peers import peft, torch
from tolerances import assert_close

from lora_jax import LowRank, combine
from lora_jax.compose import combiners

KEY = jax.random.key(0)
TARGETS = ("first", "second", "conv", "embed")

every_deterministic_combiner = pytest.mark.parametrize(
  "name", [name for name in COMBINERS if "dare" not in name]
)


class Net(torch.nn.Module):
  """A layer of every kind that peft adapts."""

  def __init__(self):
    super().__init__()
    self.first = torch.nn.Linear(11, 13)
    self.second = torch.nn.Linear(11, 13)
    self.conv = torch.nn.Conv2d(5, 7, 3)
    self.embed = torch.nn.Embedding(17, 6)

  def forward(self, x):
    return self.first(x) + self.second(x)


def peft_adapters(*configs: peft.LoraConfig) -> peft.PeftModel:
  """A model with random adapters x, y, ... of these configs."""
  torch.manual_seed(0)
  model = peft.get_peft_model(Net(), configs[0], adapter_name="x")
  for name, config in zip("yz", configs[1:], strict=False):
    model.add_adapter(name, config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.normal_()
  return model


def config(rank=2, alpha=3, targets=TARGETS) -> peft.LoraConfig:
  return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))


def layers(model: peft.PeftModel, name: str):
  """`{path: peft layer}` of what an adapter adapts."""
  found = {path: getattr(model.base_model.model, path) for path in TARGETS}
  return {path: layer for path, layer in found.items() if name in getattr(layer, "scaling", ())}


def ours(model: peft.PeftModel, name: str) -> dict[str, LowRank]:
  """An adapter of peft's as ours."""
  adapters = {}
  for path, layer in layers(model, name).items():
    if path == "embed":
      a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
      a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a, b = (jnp.asarray(x.detach().numpy()) for x in (a, b))
    if path == "conv":
      a, b = a.transpose(2, 3, 1, 0), b[:, :, 0, 0].T
    else:
      a, b = a.T, b.T
    roles = "iiio" if path == "conv" else "io"
    adapters[path] = LowRank(None, a, b, layer.scaling[name], roles=roles)
  return adapters


def deltas_of_peft(model: peft.PeftModel, name: str) -> dict[str, np.ndarray]:
  """What an adapter adds to each layer, in our axes."""
  deltas = {}
  for path, layer in layers(model, name).items():
    delta = layer.get_delta_weight(name).detach().numpy()
    axes = {"conv": (2, 3, 1, 0), "embed": (0, 1)}.get(path, (1, 0))
    deltas[path] = delta.transpose(axes)
  return deltas


def combined_by_peft(model: peft.PeftModel, names: list[str], weights, method: str, **options):
  model.base_model.add_weighted_adapter(names, list(weights), "all", method, **options)
  return model


def mask(place: int, shape: tuple[int, int]) -> np.ndarray:
  """Which numbers stay of array number `place`; peft's arrays are the transposes of ours."""
  kept = np.random.default_rng([place, *sorted(shape)]).random(sorted(shape)) < DENSITY
  return kept if list(shape) == sorted(shape) else kept.T


def drop_alike(monkeypatch, adapters: int) -> None:
  """Makes peft and us drop the same numbers of so many adapters."""
  calls = []

  def of_torch(p):
    calls.append(tuple(p.shape))
    place = (calls.count(calls[-1]) - 1) % adapters
    return torch.as_tensor(mask(place, calls[-1]).astype(np.float32))

  def of_jax(key, p, shape):
    return jnp.asarray(np.stack([mask(n, shape[1:]) for n in range(adapters)]))

  monkeypatch.setattr(torch, "bernoulli", of_torch)
  monkeypatch.setattr(jax.random, "bernoulli", of_jax)


# ---- against peft


@pytest.mark.parametrize("weights", [WEIGHTS, (0.6, 0.9)])
@every_deterministic_combiner
def test_the_combined_change_is_peft_s(name, weights):
  model = peft_adapters(config(alpha=3), config(alpha=5))
  options = {"svd_rank": RANK, "density": DENSITY}
  found = combine([ours(model, "x"), ours(model, "y")], weights, COMBINERS[name])
  expected = deltas_of_peft(combined_by_peft(model, ["x", "y"], weights, name, **options), "all")
  assert set(found) == set(TARGETS)
  assert_close(deltas(found), jax.tree.map(jnp.asarray, expected))


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize("name", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_the_elected_signs_are_peft_s(name, elect, monkeypatch):
  targets, names, weights = ("first", "second", "embed"), ["x", "y", "z"], (0.7, 0.2, 0.5)
  drop_alike(monkeypatch, 3)
  model = peft_adapters(*[config(alpha=alpha, targets=targets) for alpha in (3, 5, 4)])
  make = combiners.dare_ties if "dare" in name else combiners.ties
  mix = make(DENSITY, {"total": combiners.by_total, "frequency": combiners.by_frequency}[elect])
  method = combiners.on_delta(mix, RANK) if "svd" in name else combiners.on_factors(mix)
  found = combine([ours(model, each) for each in names], weights, method, key=KEY)
  options = {"svd_rank": RANK, "density": DENSITY, "majority_sign_method": elect}
  expected = deltas_of_peft(combined_by_peft(model, names, weights, name, **options), "all")
  assert_close(deltas(found), jax.tree.map(jnp.asarray, expected))


@pytest.mark.parametrize("name", ["dare_linear", "dare_linear_svd"])
def test_numbers_dropped_alike_are_combined_as_peft_does(name, monkeypatch):
  drop_alike(monkeypatch, 2)
  model = peft_adapters(*[config(alpha=alpha, targets=("first", "embed")) for alpha in (3, 5)])
  mix = combiners.dare_linear(DENSITY)
  method = combiners.on_delta(mix, RANK) if "svd" in name else combiners.on_factors(mix)
  found = combine([ours(model, "x"), ours(model, "y")], WEIGHTS, method, key=KEY)
  options = {"svd_rank": RANK, "density": DENSITY}
  expected = deltas_of_peft(combined_by_peft(model, ["x", "y"], WEIGHTS, name, **options), "all")
  assert_close(deltas(found), jax.tree.map(jnp.asarray, expected))


@pytest.mark.parametrize("name", ["cat", "svd", "ties_svd"])
def test_ranks_may_differ_where_the_changes_are_combined_as_in_peft(name):
  model = peft_adapters(config(rank=2), config(rank=4))
  found = combine([ours(model, "x"), ours(model, "y")], WEIGHTS, COMBINERS[name])
  options = {"svd_rank": RANK, "density": DENSITY}
  expected = deltas_of_peft(combined_by_peft(model, ["x", "y"], WEIGHTS, name, **options), "all")
  assert_close(deltas(found), jax.tree.map(jnp.asarray, expected))


@pytest.mark.parametrize("name", ["cat", "linear", "ties", "svd"])
def test_a_leaf_that_only_some_adapt_is_combined_of_those_as_in_peft(name):
  model = peft_adapters(config(targets=["first", "conv"]), config(targets=["first", "second"]))
  found = combine([ours(model, "x"), ours(model, "y")], WEIGHTS, COMBINERS[name])
  options = {"svd_rank": RANK, "density": DENSITY}
  expected = deltas_of_peft(combined_by_peft(model, ["x", "y"], WEIGHTS, name, **options), "all")
  assert list(found) == ["first", "conv", "second"]
  assert_close(deltas(found), jax.tree.map(jnp.asarray, expected))
