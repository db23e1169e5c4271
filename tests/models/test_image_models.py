"""Models of images against transformers, on tiny random models that transformers wrote."""

import dataclasses
import functools
import json

import image_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch

from lora_jax import families
from lora_jax.io import export, pretrained
from lora_jax.models import layers, mobilenet, resnet, vit

ATOL = 2e-3  # float32, outputs of order one and more
EVERYDAY = {*image_families.FIRST.values(), "DeiT, two heads"} | {
  "MobileNetV2, PyTorch's padding, dilated",
  "ResNet of bottlenecks",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """(the model of transformers, what `pretrained.load` makes of its folder), by the kind's name."""

  @functools.cache
  def load(name, head=None):
    folder = tmp_path_factory.mktemp("family")
    return image_families.write(folder, name, head), pretrained.load(folder)

  return load


def kinds(everyday):
  return [
    name if name in everyday else pytest.param(name, marks=pytest.mark.slow)
    for name in image_families.KINDS
  ]


def ours(found, images, **options):
  apply = jax.jit(found.family.make_model(found.config).apply, static_argnames="method")
  return np.asarray(apply({"params": found.params}, images.transpose(0, 2, 3, 1), **options))


def theirs(model, images, **options):
  with torch.no_grad():
    return model(torch.tensor(images), **options)


@pytest.mark.parametrize("name", kinds(EVERYDAY))
def test_logits_are_those_of_transformers(loaded, name):
  model, found = loaded(name)
  images = image_families.images(name)
  expected = theirs(model, images).logits.numpy()
  assert found.config.classes == ("LABEL_0", "LABEL_1", "LABEL_2") and found.tokenizer is None
  np.testing.assert_allclose(ours(found, images), expected, atol=ATOL, rtol=0)
  assert np.ptp(expected, axis=0).max() > 0.05  # the images are told apart


@pytest.mark.parametrize("name", kinds({"ViT", "DINOv2", "MobileNetV2", "ResNet"}))
def test_a_model_without_a_head_gives_the_features_of_transformers(loaded, name):
  model, found = loaded(name, "Model")
  images = image_families.images(name)
  out = theirs(model, images)
  is_vit = isinstance(found.config, vit.ViTConfig)
  expected = out.last_hidden_state if is_vit else out.pooler_output.flatten(1)
  assert found.config.classes == ()
  np.testing.assert_allclose(ours(found, images), expected.numpy(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", kinds({"DeiT", "DINOv2"})[:5])
def test_images_of_other_sizes_get_interpolated_positions(loaded, name):
  model, found = loaded(name)
  for size in (35, 14):  # more patches than were learned, and fewer
    images = image_families.images(name, size)
    options = {} if "DINO" in name else {"interpolate_pos_encoding": True}
    expected = theirs(model, images, **options).logits.numpy()
    np.testing.assert_allclose(ours(found, images), expected, atol=ATOL, rtol=0)


def test_positions_of_oblong_images_and_any_grid_are_those_of_pytorch():
  for before, after in ((4, 9), (16, 7), (5, 5), (3, 1), (1, 4), (37, 16)):
    rows = torch.randn(1, 2, 1, before, generator=torch.Generator().manual_seed(before))
    expected = torch.nn.functional.interpolate(
      rows, size=(1, after), mode="bicubic", align_corners=False
    )
    found = rows.numpy() @ vit.bicubic(before, after).T
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_oblong_images_and_scanned_layers_give_what_layers_apart_do(loaded):
  model, found = loaded("DINOv2")
  images = image_families.images("DINOv2", 28)[:, :, :14]
  apart = ours(found, images)
  np.testing.assert_allclose(apart, theirs(model, images).logits.numpy(), atol=ATOL, rtol=0)
  config = dataclasses.replace(
    found.config, scan_layers=True, remat_policy=jax.checkpoint_policies.nothing_saveable
  )
  stacked = dataclasses.replace(found, config=config, params=layers.stack_layers(found.params))
  np.testing.assert_allclose(ours(stacked, images), apart, atol=1e-5)
  with pytest.raises(ValueError, match="multiples of 7 pixels"):
    ours(found, images[:, :, :, :13])


@pytest.mark.parametrize("name", kinds(image_families.FIRST.values()))
def test_a_written_model_is_read_back_by_transformers_and_here(loaded, tmp_path, name):
  model, found = loaded(name)
  export.save(tmp_path / "copy", found.params, found.config, None)
  again = pretrained.load(tmp_path / "copy")
  assert again.config == found.config
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  shapes = jax.tree.map(lambda x: x.shape, pretrained.inspect(tmp_path / "copy").params)
  assert shapes == jax.tree.map(lambda x: x.shape, found.params)
  loads = type(model).from_pretrained(tmp_path / "copy").eval()
  images = image_families.images(name)
  torch.testing.assert_close(theirs(loads, images).logits, theirs(model, images).logits)


def test_files_of_the_modules_names_are_read_too(loaded, tmp_path):
  """transformers 5 has other names for modules than for tensors in files, and may write either."""
  for name in ("ViT", "DINOv2"):
    model, found = loaded(name)
    folder = tmp_path / name
    model.save_pretrained(folder, save_original_format=False)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder).params, found.params)


def test_what_is_not_computed_is_refused_by_name(loaded, tmp_path):
  cases = [
    ("ViT", {"hidden_act": "swish"}, "hidden_act='swish' is not supported"),
    (
      "ViT",
      {"image_size": [28, 14]},
      "image_size must be a whole number, or two that are the same",
    ),
    ("ViT", {"image_size": 30}, "image_size 30 is no multiple of patch_size 7"),
    ("ViT", {"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ("ViT", {"patch_size": 10**9}, "over the limit"),
    ("ViT", {"rotary": True}, "'rotary'=True is not known"),
    ("DINOv2", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True is not supported, only False"),
    ("MobileNetV2", {"output_stride": 4}, "output_stride 4 is not one of"),
    ("MobileNetV2", {"depth_multiplier": "wide"}, "width_multiplier must be a number"),
    ("ResNet", {"layer_type": "dense"}, "layer_type='dense' is not supported"),
    ("ResNet", {"depths": [2]}, "2 widths and 1 depths"),
    ("ResNet", {"depths": 3}, "depths must be a list"),
  ]
  for name, changes, words in cases:
    fields = json.loads(loaded(name)[0].config.to_json_string(use_diff=False)) | changes
    with pytest.raises(ValueError, match=words):
      families.parse_config(fields)
  with pytest.raises(ValueError, match="its layers differ in shape and cannot be stacked"):
    loaded("ResNet")[1].family.make_model(resnet.ResNetConfig(scan_layers=True))


def test_the_statistics_of_batch_norm_are_leaves_of_their_own(loaded):
  _, found = loaded("MobileNetV2")
  shapes = families.param_shapes(found.config)
  means = [path for path in shapes if path.endswith("norm/mean")]
  assert len(means) == 52 == sum(path.endswith("conv/kernel") for path in shapes)
  assert shapes["block_3/depthwise/conv/kernel"][:3] == (3, 3, 1)
  assert mobilenet.widths(mobilenet.MobileNetV2Config())[0::2] == (32, 1280)


def test_a_model_takes_images_of_its_channels_alone(loaded):
  for name in ("ViT", "ResNet"):
    _, found = loaded(name)
    model = found.family.make_model(found.config)
    with pytest.raises(ValueError, match="3 channels"):
      jax.eval_shape(model.apply, {"params": found.params}, jnp.zeros((1, 28, 28, 1)))
