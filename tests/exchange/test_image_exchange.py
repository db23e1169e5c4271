"""Adapters of models of images, from and to peft, on tiny random models of transformers."""

import functools

import image_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import peft
from torch_models import in_peft, made_by_peft, shaken

import lora_jax
from lora_jax import compress
from lora_jax.compress import storage
from lora_jax.io import pretrained
from lora_jax.models import convolutions
from lora_jax.weights import is_weight

LORA = lora_jax.LoRA(rank=3, alpha=2.0)
HEAD = ("head/.*", lora_jax.Full())
STATISTICS = (convolutions.STATISTICS, None)
# With TensorFlow's padding, transformers asks peft's layer for a stride that it does not have.
NAMES = image_families.FIRST | {"mobilenet_v2": "MobileNetV2, PyTorch's padding, dilated"}
FIRST = [
  pytest.param(family, name, marks=pytest.mark.slow)
  if family in ("deit", "resnet")
  else (family, name)
  for family, name in NAMES.items()
]
CONVOLVED = ("mobilenet_v2", "resnet")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
  @functools.cache
  def folder_of(name):
    folder = tmp_path_factory.mktemp("family")
    image_families.write(folder, name)
    return folder

  @functools.cache
  def make(name):
    return image_families.twins(pretrained.load(folder_of(name)), name)

  make.folder = folder_of
  return make


def made(model, rules):
  specs = lora_jax.match(model.params, rules, model.axes)
  return shaken(model.params, lora_jax.init(jax.random.key(1), model.params, specs, model.axes))


def assert_same(found, expected):
  """To 1e-4 of their size: these adapters make logits of 30, and float32 passes 52 layers."""
  np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_an_adapter_of_peft_with_its_classifier_is_read(twins, tmp_path, family, name):
  model = twins(name)
  targets, head = "all-linear", "classifier"
  if family in CONVOLVED:
    # Those whose windows see all channels; of a depthwise layer peft asks for ranks of its groups.
    targets = r".*(expand_1x1|reduce_1x1|conv_1x1|first_conv|layer\.\d|shortcut)\.convolution"
    head = "classifier.1" if family == "resnet" else head
  else:
    targets = r".*(q_proj|k_proj|v_proj|o_proj|fc1|fc2|projection)"
  config = peft.LoraConfig(r=3, lora_alpha=2.0, target_modules=targets, modules_to_save=[head])
  expected = made_by_peft(model, config, tmp_path)
  adapters = model.load(tmp_path)
  kinds = {type(adapter).__name__ for adapter in adapters.values()}
  assert kinds == {"LowRank", "Full"} and {"head/kernel", "head/bias"} <= adapters.keys()
  assert ("patches/kernel" in adapters) == (family not in CONVOLVED)
  assert abs(expected - model.logits({})).max() > 0.05
  assert_same(model.logits(adapters), expected)


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_adapters_of_every_kind_of_kernel_give_the_same_logits_in_peft(
  twins, tmp_path, family, name
):
  """Patch, pointwise, k x k and depthwise convolutions, and dense layers."""
  model = twins(name)
  presets = ["convolutions"] if family in CONVOLVED else ["all-linear", "convolutions"]
  frozen = [STATISTICS] if family in CONVOLVED else []
  adapters = made(model, [HEAD, *frozen, *((preset, LORA) for preset in presets)])
  model.save(tmp_path / "adapter", adapters)
  assert abs(model.logits(adapters) - model.logits({})).max() > 0.05
  assert_same(in_peft(model, tmp_path / "adapter"), model.logits(adapters))
  # What is read back computes the same, a depthwise kernel as the change that it comes to.
  again = model.load(tmp_path / "adapter")
  assert_same(model.logits(again), model.logits(adapters))
  whole = {path for path in again if isinstance(again[path], lora_jax.weights.Full)}
  depthwise = {path for path in adapters if "depthwise" in path}
  assert whole == depthwise | {"head/kernel", "head/bias"}
  assert bool(depthwise) == (family == "mobilenet_v2")


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_the_presets_find_kernels_and_leave_norms_positions_and_statistics(twins, family, name):
  model = twins(name)
  leaves = {path for path, axes in model.axes.items() if axes.roles}
  convolved = set(lora_jax.match(model.params, [("convolutions", LORA)], model.axes))
  kernels = {path for path in model.axes if path.endswith("/kernel")}
  assert kernels <= leaves
  if family in CONVOLVED:
    assert convolved == kernels - {"head/kernel"}
    groups = {model.axes[path].groups for path in convolved if "depthwise" in path}
    assert (groups != set()) == (family == "mobilenet_v2") and 1 not in groups
    with pytest.raises(ValueError, match="'all-linear' matches no leaf"):
      lora_jax.match(model.params, [("all-linear", LORA)], model.axes)
  else:
    assert convolved == {"patches/kernel"}
    linear = lora_jax.match(model.params, [("all-linear", LORA)], model.axes)
    assert {*linear} == kernels - {"head/kernel", "patches/kernel"}
    assert "conv_general_dilated" in linear.left_out["patches/kernel"]
    halves = [
      lora_jax.match(model.params, [(preset, LORA)], model.axes) for preset in ("attention", "mlp")
    ]
    assert {*halves[0]} | {*halves[1]} == {*linear} and {*halves[0]}.isdisjoint(halves[1])


@pytest.mark.parametrize("name", ["ViT", pytest.param("MobileNetV2", marks=pytest.mark.slow)])
def test_adapted_models_are_what_their_merge_is_and_their_gradient(twins, name):
  """The law, on convolutions of every kind within a whole network."""
  model = twins(name)
  rules = [("convolutions", LORA)] if name == "MobileNetV2" else [("all-linear", LORA)]
  adapters = made(model, rules)
  images = jnp.asarray(model.inputs)
  apply = lora_jax.adapt(model.apply)

  def total(apply, make, adapters):
    return jnp.sum(apply(make(model.params, adapters), images) ** 2)

  def both(apply, make):
    return jax.jit(jax.value_and_grad(lambda x: total(apply, make, x), allow_int=True))(adapters)

  factored, dense = both(apply, lora_jax.attach), both(model.apply, lora_jax.merge)
  np.testing.assert_allclose(factored[0], dense[0], rtol=1e-4)
  for ours, oracle in zip(*(jax.tree.leaves(x[1]) for x in (factored, dense)), strict=True):
    scale = np.abs(oracle).max()
    np.testing.assert_allclose(ours, oracle, atol=2e-3 * scale, rtol=0)


@pytest.mark.parametrize(
  "name", ["DINOv2", pytest.param("MobileNetV2", marks=pytest.mark.slow), "ResNet"]
)
def test_a_model_with_quantized_and_factored_kernels_is_stored_and_the_same_when_read(
  twins, tmp_path, name
):
  model = twins(name)
  kernels = ["convolutions"] if name != "DINOv2" else ["all-linear"]
  formats = lora_jax.match(model.params, [(x, compress.INT8) for x in kernels], model.axes)
  small = compress.quantize(model.params, formats, model.axes)
  assert sum(map(is_weight, jax.tree.leaves(small, is_leaf=is_weight))) == len(formats) > 5
  apply = jax.jit(lora_jax.adapt(model.apply))
  images = jnp.asarray(model.inputs)
  dense, rounded = model.logits({}), np.asarray(apply(small, images))
  assert 0 < abs(rounded - dense).max() < 0.1 * max(1, np.ptp(dense))
  found = pretrained.load(twins.folder(name))
  storage.save(tmp_path / "small", small, found.config, None, steps=["quantize"])
  again = storage.load(tmp_path / "small")
  assert again.config == found.config and again.tokenizer is None
  np.testing.assert_allclose(np.asarray(apply(again.params, images)), rounded, atol=1e-6)
