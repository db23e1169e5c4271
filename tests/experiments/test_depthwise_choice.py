"""The way in which programs compute depthwise convolutions: by the device, and by dropout."""

import image_families
import pytest

import lora_jax
from experiments import model_options, parts
from lora_jax.io import pretrained

KERNEL = "block_3/depthwise/conv/kernel"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mobilenet")
  image_families.write(folder, "MobileNetV2, PyTorch's padding, dilated")
  return pretrained.load(folder)


def test_shifts_are_for_the_cpu_and_axes_are_those_of_the_convolution(found):
  assert found.config.depthwise == "convolution"  # of the library
  here = model_options.for_device(found).config  # the tests run on a CPU
  assert here.depthwise == "shifts"
  assert model_options.for_platform(here, "tpu").depthwise == "convolution"
  assert model_options.for_platform(found.config, "cpu").depthwise == "shifts"
  ways = {
    platforms: model_options.for_export(here, platforms).depthwise
    for platforms in [(), ("cpu",), ("cpu", "tpu")]
  }
  assert ways == {(): "convolution", ("cpu",): "shifts", ("cpu", "tpu"): "convolution"}
  axes = parts.trace_axes(parts.make_model(here), found.params)
  assert axes[KERNEL].groups == found.params["block_3"]["depthwise"]["conv"]["kernel"].shape[-1]


@pytest.mark.parametrize(
  ("path", "dropout", "way"),
  [
    (KERNEL, 0.1, "convolution"),
    (KERNEL, 0.0, "shifts"),
    ("block_3/project/conv/kernel", 0.1, "shifts"),
  ],
)
def test_dropout_of_a_depthwise_kernel_needs_the_convolution(found, path, dropout, way):
  specs = {path: lora_jax.LoRA(rank=1, alpha=1.0, dropout=dropout)}
  here = model_options.for_device(found)
  assert model_options.for_dropout(here, [{}, specs]).config.depthwise == way
