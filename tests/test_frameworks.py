"""Models of Flax, untouched: Linen, NNX and plain functions, with adapters placed by tracing."""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functions import normal
from jaxprs import full_size_values
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA, adapt
from lora_jax import nnx as lora_nnx

KEY = jax.random.key(0)
# What is made here is small, and most of the time is the compiler's.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SPEC = LoRA(rank=2, alpha=4.0)


class Tied(nn.Module):
  """An embedding that is the head as well."""

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(23, 11, name="embed")
    return embed.attend(jnp.sin(nn.Dense(11)(embed(ids))))


class Cell(nn.Module):
  """An LSTM over time, by nn.RNN."""

  @nn.compact
  def __call__(self, x):
    return nn.RNN(nn.LSTMCell(13))(x)


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(11, name="down")(nn.gelu(nn.Dense(13, name="up")(x))), None


class Scanned(nn.Module):
  axis: int = 0

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      nn.remat(Mlp), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
    )
    return layers(name="blocks")(x)[0]


class Ensemble(nn.Module):
  @nn.compact
  def __call__(self, x):
    members = nn.vmap(
      nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3, in_axes=0
    )
    return members(13)(jnp.stack([x, jnp.sin(x), jnp.cos(x)]))


class Convolutions(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Conv(7, (3, 3), strides=2)(x))
    return nn.Conv(14, (3, 3), feature_group_count=7)(x)


class Encoder(nn.Module):
  """A post-norm layer with dropout and a batch of its own statistics."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    y = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=14)(x)
    x = nn.LayerNorm()(x + nn.Dropout(0.5, deterministic=not train)(y))
    x = nn.BatchNorm(use_running_average=not train)(x)
    return x + nn.Dense(11)(nn.relu(nn.Dense(13)(x)))


IDS = jnp.array([[1, 2, 22], [0, 5, 1]])
# name: the model, its input, the adapted leaves, the sizes of their matrices.
LINEN = {
  "Dense": (nn.Dense(13), normal(3, 11), {"kernel": "io"}, {(11, 13)}),
  "DenseGeneral": (
    nn.DenseGeneral((3, 5), axis=(-2, -1)), normal(4, 2, 11), {"kernel": "iioo"}, {(2, 11, 3, 5)},
  ),
  "Einsum": (
    nn.Einsum((11, 3, 5), "bd,dnh->bnh", use_bias=False), normal(4, 11), {"kernel": "ioo"},
    {(11, 3, 5)},
  ),
  "attention": (
    nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=14), normal(1, 4, 11),
    {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"},
    {(11, 2, 7)},
  ),
  "tied embedding": (
    Tied(), IDS, {"embed/embedding": "io", "Dense_0/kernel": "io"}, {(23, 11), (11, 11)},
  ),
  "LSTM": (
    Cell(), normal(2, 4, 11),
    {f"LSTMCell_0/{gate}/kernel": "io" for gate in ("hi", "hf", "hg", "ho", "if", "ii")},
    {(13, 13), (11, 13)},
  ),
  "scanned layers under remat": (
    Scanned(), normal(2, 11), {"blocks/up/kernel": "sio", "blocks/down/kernel": "sio"}, {(11, 13)},
  ),
  "scanned layers on a middle axis": (
    Scanned(axis=1), normal(2, 11), {"blocks/up/kernel": "iso", "blocks/down/kernel": "iso"},
    {(11, 13)},
  ),
  "ensemble by vmap": (
    Ensemble(), normal(2, 11), {"VmapDense_0/kernel": "sio"}, {(11, 13)},
  ),
  "convolutions": (
    Convolutions(), normal(1, 6, 6, 5), {"Conv_0/kernel": "iiio", "Conv_1/kernel": "iiio"},
    {(3, 3, 5, 7)},
  ),
  "encoder": (
    Encoder(), normal(2, 4, 11),
    {"MultiHeadDotProductAttention_0/query/kernel": "ioo", "Dense_0/kernel": "io"},
    {(11, 13), (11, 2, 7)},
  ),
}  # fmt: skip


def trained(adapters):
  """The adapters somewhere in training: no factor is zero."""
  return jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), adapters)


def gradients(f, train, frozen, x):
  def loss(train):
    return jnp.sum(jnp.sin(f(lora_jax.join(train, frozen), x)))

  return quick_jit(jax.grad(loss))(train)


@pytest.mark.parametrize(("model", "x", "roles", "matrices"), LINEN.values(), ids=LINEN)
def test_a_linen_model_is_adapted_untouched(model, x, roles, matrices):
  variables = quick_jit(model.init)(KEY, x)
  params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

  def f(params, x):
    return model.apply({"params": params} | rest, x)

  axes = lora_jax.trace_axes(f, params, x)
  assert {path: axes[path].roles for path in roles} == roles
  specs = lora_jax.match(params, [(path, SPEC) for path in roles], axes=axes)
  adapters = lora_jax.init(KEY, params, specs, axes=axes)
  fresh = adapt(f)(lora_jax.attach(params, adapters), x)
  # Not to the bit: eagerly, a function that Flax jits is compiled in f and inlined by adapt.
  assert_close(fresh, f(params, x), "float32")

  weights = lora_jax.attach(params, trained(adapters))
  strict = adapt(f, strict=True)
  merged = lora_jax.merge(params, trained(adapters))
  y = strict(weights, x)
  assert_close(y, f(merged, x))
  assert not np.allclose(y, fresh)

  train, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  oracle = gradients(lambda w, x: f(lora_jax.materialize(w), x), train, frozen, x)
  assert_close(gradients(strict, train, frozen, x), oracle)
  count = full_size_values(strict, (weights, x), matrices)
  assert count <= full_size_values(f, (merged, x), matrices)


def test_dropout_and_batch_statistics_are_as_without_the_transform():
  model, x = Encoder(), normal(2, 4, 11)
  variables = quick_jit(model.init)(KEY, x)
  specs = lora_jax.match(variables["params"], [(r"Dense_\d/kernel", SPEC)])
  adapters = trained(lora_jax.init(KEY, variables["params"], specs))

  def run(apply, params):
    return apply(
      variables | {"params": params}, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )

  actual = run(adapt(model.apply), lora_jax.attach(variables["params"], adapters))
  expected = run(model.apply, lora_jax.merge(variables["params"], adapters))
  assert_close(actual, expected)
  assert "BatchNorm_0" in actual[1]["batch_stats"]


def test_frozen_dicts_and_a_method_of_the_module_go_through():
  model = Tied()
  params = flax.core.freeze(model.init(KEY, IDS)["params"])
  specs = lora_jax.match(params, [("Dense_0/kernel", SPEC)])
  weights = lora_jax.attach(params, trained(lora_jax.init(KEY, params, specs)))
  assert isinstance(weights, flax.core.FrozenDict)
  y = adapt(model.apply)({"params": weights}, IDS, method=Tied.__call__)
  assert_close(y, model.apply({"params": lora_jax.materialize(weights)}, IDS))


def test_the_dtype_of_a_bfloat16_model_on_float32_parameters_is_kept():
  model, x = nn.Dense(13, dtype=jnp.bfloat16), normal(3, 11)
  params = model.init(KEY, x)["params"]
  weights = lora_jax.attach(
    params, trained(lora_jax.init(KEY, params, lora_jax.match(params, [("all-linear", SPEC)])))
  )
  y = adapt(model.apply, strict=True)({"params": weights}, x)
  assert_close(y, model.apply({"params": lora_jax.materialize(weights)}, x), "bfloat16")


class NnxModel(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(23, 11, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(2, 11, 14, decode=False, rngs=rngs)
    self.mlp = nnx.List([nnx.Linear(11, 13, rngs=rngs), nnx.Linear(13, 11, rngs=rngs)])

  def __call__(self, ids):
    x = self.attn(self.embed(ids))
    return self.embed.attend(x + self.mlp[1](jax.nn.relu(self.mlp[0](x))))


def nnx_weights(f, params):
  """The adapted parameters and what they merge to."""
  axes = lora_jax.trace_axes(f, params, IDS)
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes=axes)
  assert len(specs) == 6
  adapters = trained(lora_jax.init(KEY, params, specs, axes=axes))
  return lora_jax.attach(params, adapters), lora_jax.merge(params, adapters)


def test_an_nnx_module_is_adapted_by_its_split_state():
  graph, state = nnx.split(NnxModel(nnx.Rngs(0)))

  def f(state, ids):
    return nnx.merge(graph, state)(ids)

  weights, merged = nnx_weights(f, state)
  assert isinstance(weights, nnx.State)
  assert_close(jax.jit(adapt(f, strict=True))(weights, IDS), f(merged, IDS))


def test_an_nnx_module_is_adapted_by_its_pure_dict():
  graph, state = nnx.split(NnxModel(nnx.Rngs(0)))

  def f(params, ids):
    filled = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(filled, params)
    return nnx.merge(graph, filled)(ids)

  weights, merged = nnx_weights(f, nnx.to_pure_dict(state))
  assert isinstance(weights["mlp"][0]["kernel"], lora_jax.LowRank)
  assert_close(jax.jit(adapt(f, strict=True))(weights, IDS), f(merged, IDS))


def test_a_plain_function_of_a_tuple_of_arrays_is_adapted():
  params = [(normal(11, 13), normal(13)), (normal(13, 11), normal(11))]

  def f(params, x):
    for w, bias in params:
      x = jnp.tanh(x @ w + bias)
    return x

  axes = lora_jax.trace_axes(f, params, normal(3, 11))
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes=axes)
  assert list(specs) == ["0/0", "1/0"]
  adapters = trained(lora_jax.init(KEY, params, specs, axes=axes))
  y = adapt(f, strict=True)(lora_jax.attach(params, adapters), normal(3, 11))
  assert_close(y, f(lora_jax.merge(params, adapters), normal(3, 11)))


class Layered(nnx.Module):
  """A module with a list of layers, a random stream and statistics of its own."""

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(11, 11, rngs=rngs) for _ in range(2)])
    self.norm = nnx.BatchNorm(11, use_running_average=True, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

  def __call__(self, x, *, power=1):
    for layer in self.layers:
      x = jnp.sin(layer(x))
    return self.dropout(self.norm(x)) ** power


def test_the_helper_for_nnx_takes_a_module_apart_and_writes_a_merge_back():
  module, x = Layered(nnx.Rngs(0)), normal(3, 11)
  f, params = lora_nnx.split(module)
  assert_close(f(params, x, power=2), module(x, power=2), "float32")
  specs = lora_jax.match(params, [("all-linear", SPEC)])
  assert list(specs) == ["layers/0/kernel", "layers/1/kernel"]
  weights = lora_jax.attach(params, trained(lora_jax.init(KEY, params, specs)))
  before, adapted = module(x), adapt(f, strict=True)(weights, x)
  assert_close(module(x), before, "float32")  # a pure function changes no module
  lora_nnx.update(module, lora_jax.materialize(weights))
  assert_close(module(x), adapted, "float32")
  assert float(abs(adapted - before).max()) > 1e-2
  with pytest.raises(ValueError, match="layers"):
    lora_nnx.update(module, {"layers": {7: {"kernel": params["layers"][0]["kernel"]}}})


class StackedByScan(nnx.Module):
  """Three layers in one, applied by nnx.scan."""

  def __init__(self, rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def layers(rngs):
      return nnx.Linear(11, 11, rngs=rngs)

    self.layers = layers(rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
      return jnp.sin(layer(x))

    return forward(self.layers, x)


def test_layers_stacked_for_nnx_scan_have_an_adapter_each():
  module, x = StackedByScan(nnx.Rngs(0)), normal(3, 11)
  f, params = lora_nnx.split(module)
  axes = lora_jax.trace_axes(f, params, x)
  assert axes["layers/kernel"].roles == "sio"
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
  adapters = trained(lora_jax.init(KEY, params, specs, axes))
  assert adapters["layers/kernel"].a.shape == (3, 11, 2)
  weights = lora_jax.attach(params, adapters)
  assert_close(adapt(f, strict=True)(weights, x), f(lora_jax.materialize(weights), x), "float32")


class Spectral(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.SpectralNorm(nn.Dense(7))(x, update_stats=True)


# name: the model, its input, how many kernels it has, or those that "all-linear" is to take.
FOUND = {
  "OptimizedLSTMCell": (nn.RNN(nn.OptimizedLSTMCell(7)), normal(3, 4, 11), 8),
  "LSTMCell": (nn.RNN(nn.LSTMCell(7)), normal(3, 4, 11), 8),
  "GRUCell": (nn.RNN(nn.GRUCell(7)), normal(3, 4, 11), 6),
  "MGUCell": (nn.RNN(nn.MGUCell(7)), normal(3, 4, 11), 4),
  "WeightNorm": (nn.WeightNorm(nn.Dense(7)), normal(3, 11), 1),
  "SpectralNorm": (Spectral(), normal(3, 11), 1),
}


@pytest.mark.parametrize(("model", "x", "kernels"), FOUND.values(), ids=FOUND)
def test_all_linear_takes_every_kernel_by_its_use_as_by_its_name(model, x, kernels):
  variables = jax.eval_shape(model.init, KEY, x)

  def f(variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])[0]

  axes = lora_jax.trace_axes(f, variables, x)
  rules = [("all-linear", SPEC)]
  specs = lora_jax.match(variables, rules, axes)
  assert len(specs) == kernels and {axes[path].roles for path in specs} == {"io"}
  assert specs == lora_jax.match(variables, rules)
  assert all(path.startswith("params/") for path in specs)


@pytest.mark.parametrize("cell", [nnx.OptimizedLSTMCell, nnx.GRUCell])
def test_all_linear_takes_every_kernel_of_a_recurrent_nnx_module(cell):
  rnn, x = nnx.RNN(cell(11, 7, rngs=nnx.Rngs(0))), normal(3, 4, 11)
  f, params = lora_nnx.split(rnn)
  carry = rnn.cell.initialize_carry((3, 11), nnx.Rngs(0))
  axes = lora_jax.trace_axes(lambda p, x: f(p, x, initial_carry=carry), params, x)
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
  assert len(specs) == 2 and specs == lora_jax.match(params, [("all-linear", SPEC)])


class StackedList(nnx.Module):
  """A list of layers that are stacked for a scan, at every call."""

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(11, 11, rngs=rngs) for _ in range(3)])

  def __call__(self, x):
    states = [nnx.split(layer) for layer in self.layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in states))
    return jax.lax.scan(lambda h, s: (jnp.sin(nnx.merge(states[0][0], s)(h)), None), x, stacked)[0]


def test_a_list_of_nnx_layers_that_is_stacked_and_scanned_is_followed():
  f, params = lora_nnx.split(StackedList(nnx.Rngs(0)))
  axes = lora_jax.trace_axes(f, params, normal(2, 11))
  specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
  assert {path: (axes[path].roles, axes[path].rows) for path in specs} == {
    f"layers/{n}/kernel": ("io", 2) for n in range(3)
  }


def test_boxed_kernels_of_linen_are_found_by_name_and_by_use():
  init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
  model, x = nn.Dense(13, kernel_init=init), normal(3, 11)
  params = jax.eval_shape(model.init, KEY, x)
  axes = lora_jax.trace_axes(model.apply, params, x)
  for found in (None, axes):
    assert list(lora_jax.match(params, [("all-linear", SPEC)], found)) == ["params/kernel/value"]
