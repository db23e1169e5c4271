"""Quantized Weights: codes against qwix, the law over the programs, and what is never kept."""

import dataclasses
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from functions import normal
from jax import lax
from tolerances import assert_close

import lora_jax
from lora_jax import (
  AdaLoRA,
  DoRA,
  Full,
  LoHa,
  LoKr,
  LoRA,
  LowRank,
  MaterializationError,
  PiSSA,
  TokenRows,
  VeRA,
  adapt,
  materialize,
)
from lora_jax.weights.quantized import FP8, INT4, INT8, NF4, Format, Quantized, quantized

W = normal(128, 48)
PLAIN_NF4 = Format(levels="nf4", block=64)
SMALL = Format(levels="nf4", block=4)  # the matrices of the programs have 7 to 15 inputs


def columns_of(roles: str) -> tuple[int, ...]:
  return tuple(n - len(roles) for n, role in enumerate(roles) if role == "i")


def made(w, roles="io", format=SMALL) -> Quantized:
  return quantized(w, format, columns_of(roles))


@pytest.mark.parametrize(
  ("format", "qtype"),
  [
    (PLAIN_NF4, "nf4"),
    (INT4, jnp.int4),
    (Format(levels="int8", block=32), jnp.int8),
    (INT8, jnp.int8),
    (FP8, jnp.float8_e4m3fn),
  ],
)
def test_the_numbers_are_those_of_qwix(format, qtype):
  tile = format.block or len(W)
  peer = qwix.quantize(W, qtype, channelwise_axes=(1,), tiled_axes={0: tile})
  np.testing.assert_allclose(made(W, format=format).materialize(), qwix.dequantize(peer), rtol=1e-6)


def test_quantised_scales_are_off_by_half_a_step_at_most():
  plain, double = (made(W, format=format) for format in (PLAIN_NF4, NF4))
  step, scales = double.scale.scale, double.scale.materialize()
  assert scales.shape == plain.scale.shape == (48, 2)
  assert (abs(scales - plain.scale) <= step * 0.5001).all()


@pytest.mark.parametrize(
  ("format", "most"), [(NF4, 0.27), (PLAIN_NF4, 0.2813), (INT4, 0.3126), (INT8, 0.51), (FP8, 0.51)]
)
def test_the_bytes_on_the_device_are_those_of_the_format(format, most):
  weight = made(normal(576, 1536), format=format)
  held = sum(shard.data.nbytes for x in jax.tree.leaves(weight) for shard in x.addressable_shards)
  assert held == weight.nbytes <= most * 2 * 576 * 1536


@pytest.mark.parametrize(
  ("roles", "shape"),
  [
    ("io", (10, 6)),
    ("oi", (6, 10)),
    ("sio", (3, 10, 6)),
    ("iso", (10, 3, 6)),
    ("ioo", (10, 2, 5)),
    ("iio", (2, 5, 6)),
    ("iiio", (3, 3, 2, 4)),
  ],
)
def test_every_kernel_is_coded_along_its_inputs(roles, shape):
  w = normal(*shape)
  weight = made(w, roles)
  assert (weight.shape, weight.ndim, weight.dtype) == (w.shape, w.ndim, w.dtype)
  order = [n for n, role in enumerate(roles) if role != "i"]
  inputs = [n for n, role in enumerate(roles) if role == "i"]
  rows = np.asarray(w).transpose(order + inputs).reshape(*(shape[n] for n in order), -1)
  found = np.asarray(weight.materialize()).transpose(order + inputs).reshape(rows.shape)
  for start in range(0, rows.shape[-1], 4):
    block, codes = rows[..., start : start + 4], found[..., start : start + 4]
    largest = abs(block).max(axis=-1, keepdims=True)
    # The largest gap between two levels is 0.304.
    assert (abs(block - codes) <= 0.1525 * largest).all()


def test_zeros_are_zeros_and_an_odd_row_is_filled_up():
  weight = made(jnp.zeros((5, 3)))
  assert weight.codes.shape == (3, 4) and not weight.materialize().any()


# ---- the law


def test_a_row_of_one_block_with_quantised_scales_is_multiplied_by():
  weight, x = made(normal(32, 48), format=NF4), normal(4, 32)
  assert_close(adapt(lambda w, x: x @ w, strict=True)(weight, x), x @ weight.materialize())


def qlora(w, roles, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  d, k = w.shape[-2:]
  a, b = rng.normal(size=(*w.shape[:-2], d, 2)), rng.normal(size=(*w.shape[:-2], 2, k))
  base = made(w.astype(dtype), roles)
  return LowRank(base, jnp.asarray(a, "float32"), jnp.asarray(b, "float32"), 0.1)


def layers(params, x):
  def layer(x, w):
    return jnp.tanh(x @ w["up"]) @ w["down"], None

  return lax.scan(layer, x, params)[0]


STACK = {"up": normal(3, 32, 40), "down": normal(3, 40, 32)}
X = normal(8, 32)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_the_gradient_of_qlora_is_that_of_the_dense_base(wrap):
  weights = {name: qlora(w, "sio") for name, w in STACK.items()}
  dense = {
    name: dataclasses.replace(weight, w=weight.w.materialize()) for name, weight in weights.items()
  }

  def loss(trainable, frozen):
    return jnp.sum(jnp.sin(wrap(adapt(layers, strict=True))(lora_jax.join(trainable, frozen), X)))

  def gradient(weights):
    return jax.jit(jax.grad(loss))(*lora_jax.partition(weights, lora_jax.trainable_mask(weights)))

  found, expected = gradient(weights), gradient(dense)
  assert len(jax.tree.leaves(found)) == 4
  for name in STACK:
    assert_close(found[name].a, expected[name].a)
    assert_close(found[name].b, expected[name].b)


@pytest.mark.parametrize("kind", ["quantised", "dense"])
def test_no_decoded_kernel_is_kept_for_the_backward_pass(kind):
  weights = {name: qlora(w, "sio") for name, w in STACK.items()}
  if kind == "dense":
    weights = {n: dataclasses.replace(w, w=w.w.materialize()) for n, w in weights.items()}
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))

  def loss(trainable):
    return jnp.sum(jnp.sin(adapt(layers, strict=True)(lora_jax.join(trainable, frozen), X)))

  kept = jax.tree.leaves(jax.vjp(loss, trainable)[1])
  largest = max(x.size for x in kept if jnp.issubdtype(x.dtype, jnp.floating))
  kernels = STACK["up"].size
  # With a dense base the kernels are kept, so the measure sees what it is for.
  assert largest < kernels if kind == "quantised" else largest == kernels


def test_one_decoded_layer_at_a_time_is_in_memory():
  count, d = 16, 256
  weights, x = {"w": qlora(normal(count, d, d), "sio")}, normal(4, d)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))

  def f(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  def loss(trainable, frozen, x):
    return jnp.sum(adapt(f, strict=True)(lora_jax.join(trainable, frozen), x) ** 2)

  step = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile()
  kernel = 4 * d * d
  assert step.memory_analysis().temp_size_in_bytes < 3 * kernel


def test_the_flag_of_the_readme_decodes_unrolled_layers_one_at_a_time():
  count, d = 16, 256
  weights, x = [qlora(normal(d, d), "io") for _ in range(count)], normal(4, d)

  def f(weights, x):
    for w in weights:
      x = jnp.tanh(x @ w)
    return x

  # The option had another name before jaxlib 0.9.1.
  options = (
    {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if [int(part) for part in version("jaxlib").split(".")[:3]] >= [0, 9, 1]
    else {"xla_cpu_enable_concurrency_optimized_scheduler": False}
  )
  forward = jax.jit(adapt(f, strict=True), compiler_options=options).lower(weights, x).compile()
  kernel = 4 * d * d
  assert forward.memory_analysis().temp_size_in_bytes < 3 * kernel


# ---- what stays coded


def test_rows_of_an_embedding_are_looked_up_by_their_codes():
  table = quantized(normal(50, 24), Format(levels="nf4", block=8), (-1,))
  ids = jnp.array([[3, 49], [0, 3]])
  f = jax.jit(adapt(lambda p, ids: jnp.take(p, ids, axis=0, mode="clip"), strict=True))
  np.testing.assert_array_equal(f(table, ids), table.materialize()[ids])
  shapes = [v.aval.shape for eqn in jax.make_jaxpr(f)(table, ids).eqns for v in eqn.outvars]
  assert (50, 24) not in shapes


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_a_lookup_out_of_bounds_is_what_it_is_of_an_array(mode):
  table = quantized(normal(10, 8), SMALL, (-1,))
  ids = jnp.array([0, 9, 10, 400, -1])
  f = jax.jit(adapt(lambda p, ids: jnp.take(p, ids, axis=0, mode=mode)))
  expected = jnp.take(table.materialize(), ids, axis=0, mode=mode)
  np.testing.assert_array_equal(f(table, ids), expected)


def test_a_tied_head_is_the_same_codes_transposed():
  table = quantized(normal(50, 24), Format(levels="nf4", block=8), (-1,))
  f = jax.jit(adapt(lambda p, x: x @ p.T, strict=True))
  assert_close(f(table, normal(3, 24)), normal(3, 24) @ table.materialize().T)
  assert table.transpose((1, 0)).codes is table.codes


@pytest.mark.parametrize(
  "f",
  [
    lambda w: w[1],
    lambda w: w[:, :, ::2],
    lambda w: w[jnp.int32(2)],
    lambda w: w.transpose(2, 1, 0),
    lambda w: w.transpose(2, 0, 1)[3, :2],
  ],
)
def test_what_is_done_along_the_rows_is_done_to_the_codes(f):
  """A product follows, since what a function returns is an array."""

  def program(w, x):
    w = f(w)
    return jnp.tensordot(w, x, [[w.shape.index(32)], [0]])

  weight = made(normal(4, 32, 6), "sio", Format(levels="nf4", block=8))
  found = jax.jit(adapt(program, strict=True))(weight, normal(32, 2))
  assert_close(found, program(weight.materialize(), normal(32, 2)))


@pytest.mark.parametrize("format", [SMALL, INT8])
def test_a_bfloat16_model_has_its_kernels_rounded_once(format):
  weight = made(normal(32, 6).astype(jnp.bfloat16), format=format)
  x = normal(4, 32)
  f = adapt(lambda w, x: x.astype(w.dtype) @ w, strict=True)
  assert weight.dtype == f(weight, x).dtype == jnp.bfloat16
  assert_close(f(weight, x), x.astype(jnp.bfloat16) @ weight.materialize(), "bfloat16")
  exact = x @ dataclasses.replace(weight, to="float32").materialize()
  assert_close(adapt(lambda w, x: x @ w.astype(x.dtype))(weight, x), exact)


@pytest.mark.parametrize(
  ("f", "words"),
  [
    (lambda w: w[3:].sum(), "may cut its quantized blocks"),
    (lambda w: w + 1, "return would materialize this Sum"),
    (lambda w: (2 * w).sum(), "a multiple of it has other quantized values"),
    (lambda w: w.astype(jnp.int8), "rounds the values"),
  ],
)
def test_strict_mode_refuses_what_has_no_codes(f, words):
  with pytest.raises(MaterializationError, match=words):
    adapt(f, strict=True)(made(normal(8, 6)))


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"levels": "int3"}, "levels 'int3' are unknown; use nf4, int4, int8, fp8"),
    ({"levels": "nf4", "block": 7}, "block 7 is not an even number"),
    ({"levels": "int8", "double": True}, "set block as well"),
  ],
)
def test_a_format_that_is_none_is_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    Format(**settings)


KINDS = {
  "LoRA": LoRA(rank=2, alpha=4.0),
  "DoRA": DoRA(rank=2, alpha=4.0),
  "LoHa": LoHa(rank=2, alpha=4.0),
  "LoKr": LoKr(rank=2, alpha=4.0),
  "VeRA": VeRA(rank=4),
  "AdaLoRA": AdaLoRA(rank=2, alpha=4.0),
  "PiSSA": PiSSA(rank=2, alpha=2.0),
  "TokenRows": TokenRows(ids=(1, 3)),
  "Full": Full(),
}


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_every_adapter_has_a_quantised_base(spec):
  params = {"w": made(normal(16, 12), format=Format(levels="nf4", block=8))}
  adapters = lora_jax.init(jax.random.key(0), params, {"w": spec})
  trained = jax.tree.map(
    lambda x: (
      x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else x
    ),
    adapters,
  )
  dense = lora_jax.attach(materialize(params), trained)
  weights = lora_jax.attach(params, trained)
  f = adapt(lambda p, x: x @ p["w"])
  assert_close(jax.jit(f)(weights, normal(3, 16)), f(dense, normal(3, 16)))
  selected, _ = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  assert not any(x.dtype == jnp.uint8 for x in jax.tree.leaves(selected))
