"""LoKr: how its sizes are split, that its products are direct, and peft's own layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from jaxprs import equations, full_size_values
from peers import peft, torch
from tolerances import assert_close

import lora_jax
from lora_jax import Axes, LoKr, MaterializationError, NotFactored, adapt, attach, init
from lora_jax.adapters.lokr import factorization
from lora_jax.weights import LoKr as Weight

KEY = jax.random.key(0)


def trained(spec: LoKr, w, roles: str) -> Weight:
  """On its base, and nothing of it zero."""
  adapter = spec.init(KEY, "w", w, roles)
  return jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), adapter).attach(w, "w")


@pytest.mark.parametrize("factor", [None, 1, 2, 4, 6, 7, 16, 1000])
def test_sizes_are_split_as_in_peft(factor):
  for size in range(1, 300):
    assert factorization(size, factor) == peft.tuners.lokr.layer.factorization(size, factor or -1)


SPECS = {
  "low-rank": LoKr(rank=2, alpha=3.0),
  "full": LoKr(rank=12, alpha=3.0),
  "both low-rank": LoKr(rank=1, alpha=3.0, decompose_both=True),
  "outer of another size": LoKr(rank=2, alpha=3.0, factor=2),
  "full, the outer first": LoKr(rank=40, alpha=3.0, factor=2),
}

# Inputs of 24 = 4 × 6 and outputs of 40 = 5 × 8, on one axis or on several.
USES = {
  "x @ w": ("io", (24, 40), lambda w, x: x @ w, normal(3, 24)),
  "w @ x": ("io", (24, 40), lambda w, x: w @ x, normal(40, 3)),
  "x @ w.T": ("io", (24, 40), lambda w, x: x @ w.T, normal(3, 40)),
  "many rows": ("io", (24, 40), lambda w, x: x @ w, normal(2, 3, 4, 24)),
  "heads out": ("ioo", (24, 4, 10), lambda w, x: jnp.einsum("nd,dhk->hnk", x, w), normal(3, 24)),
  "heads in": ("iio", (8, 3, 40), lambda w, x: jnp.einsum("nhd,hdk->nk", x, w), normal(3, 8, 3)),
  "heads in, transposed": (
    "iio", (8, 3, 40), lambda w, x: jnp.einsum("khd,nk->nhd", jnp.moveaxis(w, 2, 0), x),
    normal(3, 40),
  ),
  "experts": ("sio", (2, 24, 40), lambda w, x: jnp.einsum("end,edk->enk", x, w), normal(2, 3, 24)),
  "experts summed": (
    "sio", (2, 24, 40), lambda w, x: jnp.einsum("end,edk->nk", x, w), normal(2, 3, 24),
  ),
  "every expert": ("sio", (2, 24, 40), lambda w, x: jnp.einsum("nd,edk->enk", x, w), normal(3, 24)),
  "experts in the middle": (
    "iso", (24, 2, 40), lambda w, x: jnp.einsum("end,dek->enk", x, w), normal(2, 3, 24),
  ),
  "stacks exchanged": (
    "ssio", (2, 3, 24, 40),
    lambda w, x: jnp.einsum("fend,fedk->fenk", x, w.transpose(1, 0, 2, 3)), normal(3, 2, 4, 24),
  ),
  "layers": (
    "sio", (3, 24, 40), lambda w, x: lax.scan(lambda x, w: (jnp.sin(x @ w) @ w.T, None), x, w)[0],
    normal(3, 24),
  ),
}  # fmt: skip


PAIRS = [(use, "low-rank") for use in USES] + [("x @ w", spec) for spec in [*SPECS][1:]]
RARER = [(use, "full") for use in [*USES][1:]]
RARER += [(use, spec) for use in ("x @ w.T", "heads out") for spec in [*SPECS][2:]]
PAIRS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in RARER]

# The numbers are what is looked at here, and most of the time is the compiler's.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(("use", "spec"), PAIRS)
def test_products_and_their_gradients_are_those_of_the_dense_array(use, spec):
  roles, shape, f, x = USES[use]
  w = trained(SPECS[spec], normal(*shape), roles)

  def gradients_and_value(f):
    def loss(w, x):
      y = f(w, x)
      return jnp.sum(jnp.sin(y)), y

    return quick_jit(jax.grad(loss, (0, 1), has_aux=True))(w, x)

  assert_close(
    gradients_and_value(adapt(f, strict=True)),
    gradients_and_value(lambda w, x: f(w.materialize(), x)),
  )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["x @ w", "x @ w.T", "experts"])
def test_products_form_neither_the_matrix_nor_a_low_rank_form_of_it(name, spec):
  roles, shape, f, x = USES[name]
  w = trained(spec, normal(*shape), roles)

  def loss(parts, x):
    weight = dataclasses.replace(w, **parts)
    return jnp.sum(jnp.sin(adapt(f, strict=True)(weight, x)))

  gradient = jax.grad(loss, (0, 1))
  transposes = full_size_values(jax.grad(lambda x: jnp.sum(f(w.w, x))), (x,), {(24, 40)})
  assert full_size_values(gradient, (w.parts, x), {(24, 40)}) <= transposes
  sizes = [
    v.aval.size
    for eqn in equations(jax.make_jaxpr(gradient)(w.parts, x))
    for v in eqn.outvars
    if not {24, 40} <= set(v.aval.shape)
  ]
  # A factor of the low-rank form has 24 or 40 times its rank, and there are three rows.
  rows = max(x.size, jax.eval_shape(f, w.w, x).size)
  assert max(sizes) <= max(rows, *(part.size for part in w.parts.values()))


@pytest.mark.parametrize(
  ("roles", "shape"), [("io", (24, 40)), ("iio", (8, 3, 40)), ("sioo", (2, 24, 4, 10))]
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_as_a_plain_lora_it_makes_the_same_change(roles, shape, spec):
  w = normal(*shape)
  weight = trained(spec, w, roles)
  low_rank = weight.as_low_rank()
  assert low_rank.w is None
  assert_close(low_rank.attach(w, "w").delta(), weight.delta())
  if roles == "io":
    assert_close(weight.detach().as_low_rank(), low_rank)
  else:
    with pytest.raises(NotFactored, match="several input or output axes"):
      weight.detach().as_low_rank()


def test_its_low_rank_form_is_as_thin_as_its_factors_allow():
  ranks = [trained(spec, normal(24, 40), "io").as_low_rank().rank for spec in SPECS.values()]
  assert ranks == [4 * 2, 4 * 6, 1 * 1, 2 * 2, 2 * 12]


INDIRECT = {
  "rows": ("io", (24, 40), lambda w, x: w[jnp.array([3, 1, 3])] @ x, normal(40)),
  "half of the columns": ("io", (24, 40), lambda w, x: x @ w[:, :20], normal(3, 24)),
  "one of a stack": ("sio", (2, 24, 40), lambda w, x: x @ w[1], normal(3, 24)),
  "one of two inputs": (
    "iio",
    (8, 3, 40),
    lambda w, x: jnp.einsum("nh,hdk->ndk", x, w),
    normal(3, 8),
  ),
  "experts by group": (
    "sio",
    (2, 24, 40),
    lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2])),
    normal(3, 24),
  ),
}


@pytest.mark.parametrize(("roles", "shape", "f", "x"), INDIRECT.values(), ids=INDIRECT)
def test_other_uses_go_by_the_low_rank_form_or_are_refused(roles, shape, f, x):
  w = trained(LoKr(rank=2, alpha=3.0), normal(*shape), roles)
  assert_close(adapt(f, strict=True)(w, x), f(w.materialize(), x))
  full = trained(LoKr(rank=12, alpha=3.0), normal(*shape), roles)
  assert_close(adapt(f)(full, x), f(full.materialize(), x))
  with pytest.raises(MaterializationError, match="the low-rank form has rank 24, where the matrix"):
    adapt(f, strict=True)(full, x)


def test_a_cast_keeps_the_parts_in_float32_and_one_to_integers_is_refused():
  w = trained(LoKr(rank=2, alpha=3.0), normal(24, 40), "io")
  assert (w.astype(jnp.bfloat16).dtype, w.astype(jnp.bfloat16).w1.dtype) == (
    jnp.bfloat16,
    jnp.float32,
  )
  with pytest.raises(NotFactored, match="int32"):
    w.astype(jnp.int32)


def test_a_change_of_it_is_multiplied_by_a_number():
  for spec in (LoKr(rank=2, alpha=3.0), LoKr(rank=1, alpha=3.0, decompose_both=True)):
    w = trained(spec, normal(24, 40), "io")
    assert_close(w.rescaled(-0.5).delta(), -0.5 * w.delta())
    assert_close(w.scaled(-0.5).materialize(), -0.5 * w.materialize())


@pytest.mark.parametrize(
  "change",
  [
    {"w1": normal(4, 4)},
    {"w1": normal(5, 4)},
    {"w1": None},
    {"w2_a": None},
    {"w2_a": normal(6, 3)},
    {"w2": normal(6, 8)},
    {"w1": normal(2, 4, 5)},
  ],
)
def test_factors_that_make_no_kernel_of_this_shape_are_refused(change):
  adapter = LoKr(rank=2, alpha=3.0).init(KEY, "w", normal(24, 40), "io")
  with pytest.raises(ValueError, match=r"^w: .*do not fit \(24, 40\)"):
    attach({"w": normal(24, 40)}, {"w": dataclasses.replace(adapter, **change)})


def test_shard_map_does_not_split_a_kronecker_product():
  w = trained(LoKr(rank=2, alpha=3.0), normal(2, 24, 40), "sio")
  assert w.local_specs(jax.P("layers")).w1 == jax.P("layers")
  with pytest.raises(NotFactored, match="not made of shards"):
    w.local_specs(jax.P(None, None, "model"))
  assert w.partition_specs(jax.P(None, None, "model")).w1 == jax.P(None)


def test_settings_that_mean_nothing_are_refused():
  with pytest.raises(ValueError, match="LoKr: rank 0 is below 1"):
    LoKr(rank=0, alpha=1.0)
  with pytest.raises(ValueError, match="LoKr: factor 0 is below 1"):
    LoKr(rank=1, alpha=1.0, factor=0)


# ---- peft


def numpy(x: torch.Tensor) -> np.ndarray:
  return x.detach().numpy()


def peft_layer(module: torch.nn.Module, **config):
  """peft's layer on a module, and its parts under their names here."""
  torch.manual_seed(0)
  model = torch.nn.Sequential(module)
  config = peft.LoKrConfig(alpha=6, target_modules=["0"], **config)
  layer = peft.get_peft_model(model, config).base_model.model[0]
  named = {n.split(".")[0]: p for n, p in layer.named_parameters() if n.startswith("lokr_")}
  swap = {"a": "b", "b": "a"}
  return layer, {
    (name[5:-1] + swap[name[-1]] if name[-1] in swap else name[5:]): parameter
    for name, parameter in named.items()
  }


CONFIGS = {
  "low-rank": {"r": 4},
  "full": {"r": 16},
  "both low-rank": {"r": 2, "decompose_both": True},
  "factor": {"r": 4, "decompose_factor": 8},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_starts_with_the_shapes_and_distributions_of_peft_s_layer(config):
  layer, theirs = peft_layer(torch.nn.Linear(960, 1200), **config)
  spec = LoKr(
    rank=config["r"],
    alpha=6.0,
    decompose_both=config.get("decompose_both", False),
    factor=config.get("decompose_factor"),
  )
  adapter = spec.init(KEY, "w", jax.ShapeDtypeStruct((960, 1200), jnp.float32), "io")
  assert adapter.scale == layer.scaling["default"]
  assert adapter.parts.keys() == theirs.keys()
  for name, part in adapter.parts.items():
    assert part.shape == tuple(theirs[name].shape)[::-1]
    np.testing.assert_allclose(np.abs(part).max(), np.abs(numpy(theirs[name])).max(), rtol=0.15)
  report = lora_jax.summary({"w": jax.ShapeDtypeStruct((960, 1200), jnp.float32)}, {"w": spec})
  assert report.trainable == sum(p.numel() for p in theirs.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_linear_layer_is_peft_s(config):
  layer, theirs = peft_layer(torch.nn.Linear(96, 120, bias=False), **config)
  with torch.no_grad():
    for parameter in theirs.values():
      parameter += torch.randn(parameter.shape)
  parts = {name: jnp.asarray(numpy(p).T) for name, p in theirs.items()}
  w = jnp.asarray(numpy(layer.base_layer.weight).T)
  weight = Weight(None, **parts, scale=6 / config["r"]).attach(w, "w")
  assert_close(weight.delta(), numpy(layer.get_delta_weight("default")).T)
  x = normal(3, 96)
  outputs = numpy(layer(torch.tensor(np.asarray(x))))
  assert_close(adapt(lambda w, x: x @ w, strict=True)(weight, x), outputs)


@pytest.mark.parametrize("config", [{"r": 2}, {"r": 6}, {"r": 1, "decompose_both": True}])
def test_a_convolution_is_peft_s_with_its_channels_first(config):
  module = torch.nn.Conv2d(12, 20, 3, padding=1, bias=False)
  layer, theirs = peft_layer(module, **config)
  spec = LoKr(rank=config["r"], alpha=6.0, decompose_both="decompose_both" in config, channels=True)
  params = {"w": jnp.asarray(numpy(layer.base_layer.weight).transpose(2, 3, 1, 0))}
  axes = {"w": Axes("iiio", ("conv_general_dilated",))}
  adapter = init(KEY, params, {"w": spec}, axes)["w"]
  with torch.no_grad():
    for parameter in theirs.values():
      parameter += torch.randn(parameter.shape)
  parts = {name: jnp.asarray(numpy(p).reshape(len(p), -1).T) for name, p in theirs.items()}
  assert {n: p.shape for n, p in parts.items()} == {n: p.shape for n, p in adapter.parts.items()}
  weight = attach(params, {"w": dataclasses.replace(adapter, **parts)})["w"]
  delta = numpy(layer.get_delta_weight("default")).transpose(2, 3, 1, 0)
  assert_close(weight.delta(), delta)

  def convolve(w, x):
    return lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  x = normal(2, 5, 5, 12)
  outputs = layer(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
  assert_close(adapt(convolve, strict=config["r"] < 6)(weight, x), numpy(outputs))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_axis_of_size_zero_has_a_decomposition(shape):
  adapter = init(KEY, {"w": jnp.zeros(shape)}, {"w": SPECS["full"]})["w"]
  weight = adapter.attach(jnp.zeros(shape), "w")
  assert weight.materialize().shape == shape
  assert adapt(lambda w, x: x @ w, strict=True)(weight, jnp.ones((2, shape[0]))).shape == (
    2,
    shape[1],
  )
