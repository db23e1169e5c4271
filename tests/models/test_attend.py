"""Attention's implementations against the plain one: values, gradients, memory and the choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tolerances import assert_close

import lora_jax
from lora_jax.models import attention_kernels, blockwise, gpt2, llama
from lora_jax.models.attention import attend
from lora_jax.models.attention_kernels import Call, Choice

PLAIN, BLOCKWISE = Choice("plain"), Choice("blockwise")
LENGTH = 40


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def arrays(rows=2, length=LENGTH, slots=LENGTH, heads=4, kv_heads=2, features=8, values=8):
  return (
    normal(0, rows, length, heads, features),
    normal(1, rows, slots, kv_heads, features),
    normal(2, rows, slots, kv_heads, values),
  )


SEGMENTS = jnp.repeat(jnp.array([[1, 1, 2, 3, 3], [1, 2, 2, 2, 4]]), LENGTH // 5, axis=1)
LENGTHS = jnp.array([LENGTH - 3, 9])  # of prompts that differ
POSITIONS = jnp.arange(7)[None] + jnp.array([[5], [20]])
UP_TO_LENGTH = (jnp.arange(LENGTH) < LENGTHS[:, None])[:, None, None]

# Every feature alone, and together those that a published model has together.
CASES = {
  "causal": ({}, {"is_causal": True}),
  "everywhere": ({}, {}),
  "a window": ({}, {"is_causal": True, "window": 11}),
  "a window that a layer decides on": ({}, {"is_causal": True, "window": jnp.asarray(11)}),
  "texts in a row": ({}, {"is_causal": True, "segments_BT": SEGMENTS}),
  "prompts of unequal lengths": ({}, {"is_causal": True, "mask": UP_TO_LENGTH}),
  "a mask of each head": ({}, {"mask": normal(3, 2, 4, LENGTH, LENGTH) > -0.5}),
  "a soft cap and a scale": ({}, {"is_causal": True, "softcap": 1.5, "scale": 0.7}),
  "sinks": ({}, {"is_causal": True, "sinks_N": normal(4, 4)}),
  "gpt-oss": ({}, {"is_causal": True, "sinks_N": normal(4, 4), "window": 11}),
  "Gemma 2, packed": (
    {}, {"is_causal": True, "softcap": 1.5, "window": 11, "segments_BT": SEGMENTS},
  ),
  "each head has keys of its own": ({"kv_heads": 4}, {"is_causal": True}),
  "fewer features of values": ({"values": 4}, {"is_causal": True}),
  "a length that no block divides": ({"length": 37, "slots": 37}, {"is_causal": True}),
  "queries among the slots of a cache": (
    {"length": 7}, {"positions_BT": POSITIONS, "window": 11},
  ),
  "keys of another text": ({"slots": 21}, {}),
}  # fmt: skip


def value_and_gradients(choice, inputs, options):
  known = {name: x for name, x in options.items() if name != "sinks_N"}

  def loss(query, key, value, sinks_N):
    out = attend(query, key, value, choice=choice, sinks_N=sinks_N, **known)
    return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

  sinks_N = options.get("sinks_N")
  found = (0, 1, 2) if sinks_N is None else (0, 1, 2, 3)
  return jax.jit(jax.grad(loss, found, has_aux=True))(*inputs, sinks_N)


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 8)


@pytest.mark.parametrize("name", CASES)
def test_blocks_give_the_values_and_gradients_of_the_plain_one(name, small_blocks, monkeypatch):
  sizes, options = CASES[name]
  inputs = arrays(**sizes)
  expected = value_and_gradients(PLAIN, inputs, options)
  if "positions_BT" in options:  # where the choice is by length alone
    monkeypatch.setattr(attention_kernels, "_LONG", 0)
  assert_close(value_and_gradients(BLOCKWISE, inputs, options), expected)


def test_blocks_give_the_plain_one_in_bfloat16(small_blocks):
  inputs = [x.astype(jnp.bfloat16) for x in arrays()]
  options = {"is_causal": True, "segments_BT": SEGMENTS}
  found, expected = (value_and_gradients(each, inputs, options) for each in (BLOCKWISE, PLAIN))
  assert_close(found, expected, "bfloat16")


def test_empty_blocks_are_not_computed(small_blocks):
  form = blockwise._Form(1.0, None, True, None, LENGTH, 8, 8)
  assert len(blockwise._pairs(form, LENGTH, LENGTH)) == 5 * 6 / 2
  window = dataclasses.replace(form, window=9)
  assert len(blockwise._pairs(window, LENGTH, LENGTH)) == 5 + 4
  everywhere = dataclasses.replace(form, is_causal=False)
  assert len(blockwise._pairs(everywhere, LENGTH, LENGTH)) == 25


def temporaries(choice, length):
  """Bytes that XLA sets aside for the gradient of a layer's attention."""
  sizes = ((1, length, 4, 16), (1, length, 2, 16), (1, length, 2, 16))
  shapes = [jax.ShapeDtypeStruct(each, jnp.float32) for each in sizes]
  attention = functools.partial(attend, is_causal=True, choice=choice)
  gradient = jax.jit(jax.grad(lambda *inputs: attention(*inputs).sum(), (0, 1, 2)))
  return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("choice", "growth"), [(PLAIN, 4), (BLOCKWISE, 2)])
def test_memory_of_blocks_grows_linearly_and_of_the_plain_one_quadratically(choice, growth):
  found = [temporaries(choice, length) for length in (512, 1024, 2048)]
  slopes = np.diff(found)
  assert slopes[1] / slopes[0] == pytest.approx(growth / 1, rel=0.1)
  assert (found[2] > 2048 * 2048 * 4 * 4) == (choice is PLAIN)


CONFIG = llama.LlamaConfig(
  vocab_size=64,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_length=64,
  window=9,
  local_layers=(True, False),
  attn_softcap=5.0,
  attn_sinks=True,
)
GPT2 = gpt2.GPT2Config(
  vocab_size=64, width=16, mlp_width=24, num_layers=2, num_heads=2, head_dim=8, max_length=64
)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
  "config",
  [pytest.param(CONFIG, id="llama"), pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow)],
)
def test_a_decoder_with_adapters_trains_alike_and_stays_factored(config, scan, small_blocks):
  tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 64)

  def gradients(choice):
    family = {"llama": llama.Llama, "gpt2": gpt2.GPT2}[config.family]
    model = family(dataclasses.replace(config, scan_layers=scan, attention=choice))
    params = model.init(jax.random.key(0), tokens)["params"]
    axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
    specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=2, alpha=4.0))], axes)
    adapters = lora_jax.init(jax.random.key(2), params, specs, axes)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    apply = lora_jax.adapt(model.apply, strict=True)  # raises where a full matrix would be made

    def loss(adapters):
      variables = {"params": lora_jax.attach(params, adapters)}
      return jnp.sin(apply(variables, tokens, segments_BT=SEGMENTS)).sum()

    return jax.jit(jax.value_and_grad(loss, allow_int=True))(adapters)

  found, expected = gradients(BLOCKWISE), gradients(PLAIN)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), found, expected)


SHORT = Call(length=80, slots=80, features=64, value_features=64, dtype=jnp.dtype("float32"))
LONG = SHORT._replace(length=2048, slots=2048)
HALF = LONG._replace(dtype=jnp.dtype("bfloat16"))


@pytest.mark.parametrize(
  ("platform", "call", "name"),
  [
    ("cpu", SHORT, "plain"),
    ("cpu", LONG, "blockwise"),
    ("cpu", LONG._replace(length=1, cached=True), "plain"),
    ("tpu", LONG._replace(cached=True), "blockwise"),
    ("cuda", SHORT, "plain"),
    ("cuda", LONG, "blockwise"),
    ("cuda", HALF, "cudnn"),
    ("cuda", HALF._replace(window=512), "cudnn"),
    ("cuda", HALF._replace(segments=True), "blockwise"),
    ("cuda", HALF._replace(softcap=True), "blockwise"),
    ("cuda", HALF._replace(features=256), "blockwise"),
    ("tpu", SHORT, "plain"),
    ("tpu", LONG, "splash"),
    ("tpu", HALF._replace(segments=True, softcap=True, window=512), "splash"),
    ("tpu", HALF._replace(sinks=True), "blockwise"),
    ("tpu", HALF._replace(window="traced"), "blockwise"),
    ("tpu", HALF._replace(is_causal=False), "blockwise"),
  ],
)
def test_the_implementation_goes_by_device_dtype_length_and_features(platform, call, name):
  assert attention_kernels.chosen(Choice(platform=platform), call) == name


@pytest.mark.parametrize(
  ("name", "platform", "call", "reason"),
  [
    ("cudnn", "cpu", HALF, "runs on a GPU, and the program is for a CPU"),
    ("splash", "cuda", HALF, "runs on a TPU, and the program is for a GPU"),
    ("cudnn", "cuda", LONG, "takes bfloat16 and float16, not float32"),
    ("cudnn", "cuda", HALF._replace(segments=True), "texts of one row"),
    ("cudnn", "cuda", HALF._replace(softcap=True), "no soft cap"),
    ("cudnn", "cuda", HALF._replace(sinks=True), "no attention sinks"),
    ("cudnn", "cuda", HALF._replace(features=192), "up to 128 features"),
    ("splash", "tpu", HALF._replace(mask=True), "no mask of any other kind"),
    ("splash", "tpu", HALF._replace(window="traced"), "layers differ in their window"),
    ("splash", "tpu", HALF._replace(is_causal=False), "causal attention alone"),
    ("splash", "tpu", HALF._replace(slots=4096), "as many keys as queries"),
  ],
)
def test_a_choice_that_cannot_compute_a_call_is_refused_with_the_reason(
  name, platform, call, reason
):
  with pytest.raises(ValueError, match=f"attention '{name}': .*{reason}.*; use 'auto'"):
    attention_kernels.chosen(Choice(name, platform), call)


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="attention 'flash' is unknown; use auto, plain, blockwise"):
    Choice("flash")


def test_what_a_model_asks_of_attention_is_known_from_its_config():
  call = attention_kernels.call_of(CONFIG, 2048, segments=True)
  assert (call.window, call.softcap, call.sinks, call.segments) == (9, True, True, True)
  scanned = dataclasses.replace(CONFIG, scan_layers=True)
  assert attention_kernels.call_of(scanned, 2048, segments=False).window == "traced"
  assert attention_kernels.call_of(GPT2, 2048, segments=False).window is None


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"window": 70},
    {"segments_BT": jnp.repeat(jnp.array([[1, 1, 2, 3, 3]]), 40, axis=1)},
    {"softcap": 1.5, "scale": 0.7},
  ],
  ids=str,
)
def test_the_kernel_for_tpus_gives_the_values_and_gradients_of_the_plain_one(options):
  # Pallas interprets it here.
  inputs = arrays(rows=1, length=200, slots=200, features=16, values=16)
  options = {"is_causal": True, **options}
  expected = value_and_gradients(PLAIN, inputs, options)
  with pltpu.force_tpu_interpret_mode():
    found = value_and_gradients(Choice("splash", "tpu"), inputs, options)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.05, atol=0.02), found, expected)


# As where tests do not turn most of it off.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def test_layers_that_are_not_scanned_keep_the_weights_of_attention_alone():
  """Per layer of an encoder: the scores' softmax, and neither its numerators nor its factors."""
  layers, shape = 4, (2, 128, 2, 8)

  def loss(x, attention):
    for _ in range(layers):
      x = x + attention(x, x, x)
    return jnp.sum(x**2)

  def kept(attention):
    gradient = jax.jit(jax.grad(lambda x: loss(x, attention)))
    program = gradient.lower(jnp.ones(shape)).compile(OPTIMIZED)
    return program.memory_analysis().temp_size_in_bytes / (4 * 2 * 2 * 128 * 128)

  assert kept(attend) < 0.7 * kept(jax.nn.dot_product_attention)


def test_the_derivatives_of_an_encoders_attention_are_those_of_jax():
  query, key, value = (normal(0, 2, 5, 4, 8), normal(1, 2, 7, 4, 8), normal(2, 2, 7, 4, 8))
  change = jax.tree.map(jnp.cos, (query, key, value))
  for derive in (
    lambda f: jax.jvp(f, (query, key, value), change)[1],
    lambda f: jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2))(query, key, value),
  ):
    for a, b in zip(
      jax.tree.leaves(derive(attend)),
      jax.tree.leaves(derive(jax.nn.dot_product_attention)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
