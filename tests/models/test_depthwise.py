"""Depthwise convolutions by shifts against those of lax, bare and adapted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax

import lora_jax
from lora_jax.models import depthwise, mobilenet


def alike(ours, theirs, **tolerances):
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), ours, theirs)


@pytest.mark.parametrize(
  ("stride", "dilation", "padding"),
  [(1, 1, [(1, 1)] * 2), (2, 1, [(1, 1)] * 2), (2, 1, "SAME"), (1, 2, [(2, 2)] * 2)],
)
def test_values_and_gradients_by_shifts_are_those_of_lax(stride, dilation, padding):
  x_BHWC, kernel = normal(2, 9, 8, 5), normal(3, 3, 1, 5)
  axes = lax.conv_dimension_numbers(x_BHWC.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))

  def values(name):
    def run(x, kernel):
      return depthwise.WAYS[name](
        x,
        kernel,
        (stride, stride),
        padding,
        lhs_dilation=(1, 1),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=axes,
        feature_group_count=5,
        precision=None,
      )

    y, back = jax.vjp(run, x_BHWC, kernel)
    return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  alike(values("shifts"), values("convolution"), atol=1e-4)


@pytest.mark.slow
def test_adapters_of_depthwise_kernels_stay_factored_and_are_those_of_the_convolution():
  config = mobilenet.MobileNetV2Config(width_multiplier=0.1, classes=("a", "b"))
  model, images = mobilenet.MobileNetV2(config), normal(2, 32, 32, 3)
  params = model.init(jax.random.key(0), images)["params"]
  axes = lora_jax.trace_axes(lambda p, x: model.apply({"params": p}, x), params, images)
  rules = [
    (".*/depthwise/conv/kernel", lora_jax.LoRA(rank=1, alpha=2.0)),
    ("convolutions", lora_jax.LoRA(rank=2, alpha=2.0)),
  ]
  adapters = lora_jax.init(jax.random.key(1), params, lora_jax.match(params, rules, axes))
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)

  def values(how):
    own = mobilenet.MobileNetV2(dataclasses.replace(config, depthwise=how))
    apply = lora_jax.adapt(own.apply, strict=True)

    def loss(adapters):
      return (apply({"params": lora_jax.attach(params, adapters)}, images) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(adapters)

  shifted, convolved = values("shifts"), values("convolution")
  assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(shifted))
  alike(shifted, convolved, rtol=2e-3, atol=1e-5)


def test_an_unknown_way_is_refused():
  with pytest.raises(ValueError, match="depthwise 'fft' is not one of convolution, shifts"):
    mobilenet.MobileNetV2Config(depthwise="fft")
