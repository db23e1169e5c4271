"""Every method on every kernel: what must hold of all of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import compilations, full_size_values
from method_table import KERNELS, METHODS, Kernel, Row
from tolerances import assert_close

import lora_jax
from lora_jax import Axes, adapt, attach, init, join, merge, partition, trainable_mask, unmerge

KEY = jax.random.key(0)
# At every commit: LoRA on every kernel, variants of a method on one, the other methods on two.
VARIANTS = (
  "rsLoRA",
  "DoRA, the norm not constant",
  "LoKr, both decomposed",
  "PiSSA, randomised",
  "Full",
)
FEW = ("matrix", "layers")


def is_everyday(method: str, kernel: str) -> bool:
  if method in VARIANTS:
    return kernel == "matrix"
  return method == "LoRA" or kernel in FEW


PAIRS = [
  pytest.param(
    row,
    kernel,
    id=f"{method}-{name}",
    marks=[] if is_everyday(method, name) else [pytest.mark.slow],
  )
  for method, row in METHODS.items()
  for name, kernel in KERNELS.items()
  if name not in row.undefined
]
every_pair = pytest.mark.parametrize(("row", "kernel"), PAIRS)
every_method = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)


def fresh(row: Row, kernel: Kernel, dtype: str = "float32"):
  """Params and their adapters at the start."""
  params = {"w": normal(*kernel.shape).astype(dtype)}
  axes = {"w": Axes(kernel.roles, ("dot_general",))}
  return params, init(KEY, params, {"w": row.spec}, axes)


def trained(adapters):
  """The adapters somewhere in training: no trained part is at its start."""
  train, rest = partition(adapters, {path: x.trainable() for path, x in adapters.items()})
  leaves, treedef = jax.tree.flatten(train)
  moved = [x + 0.3 * normal(n + 2, *x.shape)[0] for n, x in enumerate(leaves)]
  return join(jax.tree.unflatten(treedef, moved), rest)


def float64(tree):
  return jax.tree.map(
    lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def effective(row: Row, kernel: Kernel, w, adapter):
  """The effective weight by the row's formula, matrix by matrix."""
  rest = adapter.roles
  stack = kernel.shape[: len(kernel.shape) - len(rest)]
  count = math.prod(stack)
  inputs = math.prod(n for n, x in zip(kernel.shape[len(stack) :], rest, strict=True) if x == "i")
  parts = {}
  for name, part in adapter.parts.items():
    sizes = {"s": (), "i": (inputs,), "r": (part.shape[-1],), "o": (-1,)}
    layout = adapter.LAYOUTS[name]
    if layout.startswith("sr") and len(layout) > 2:
      sizes["r"] = (part.shape[len(stack)],)
    own = part.shape[len(stack) :] if layout == "s" else [n for x in layout for n in sizes[x]]
    parts[name] = part.reshape(count, *own)
  matrices = w.reshape(count, inputs, -1)
  of_one = [
    row.formula(matrices[n], {name: part[n] for name, part in parts.items()}, adapter)
    for n in range(count)
  ]
  return jnp.stack(of_one).reshape(w.shape)


@every_pair
def test_a_fresh_adapter_is_the_identity(row, kernel):
  params, adapters = fresh(row, kernel)
  actual = jax.jit(adapt(kernel.f))(attach(params, adapters), kernel.x)
  expected = jax.jit(kernel.f)(params, kernel.x)
  if row.exact_start:
    np.testing.assert_array_equal(actual, expected)
  assert_close(actual, expected)
  assert_close(merge(params, adapters), params)


@every_pair
def test_the_effective_weight_is_the_formula_s_in_float64(row, kernel):
  with jax.enable_x64(True):
    params, adapters = fresh(row, kernel, "float64")
    # What is sealed is no leaf, and would stay in float32.
    adapters = float64(trained(lora_jax.unseal(adapters)))
    actual = attach(params, adapters)["w"].materialize()
    expected = effective(row, kernel, params["w"], adapters["w"])
    assert actual.dtype == jnp.float64
    assert np.abs(expected - params["w"]).max() > 1e-3  # the method changes something
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@every_pair
def test_values_and_gradients_are_the_formula_s_in_float64(row, kernel):
  with jax.enable_x64(True):
    params, adapters = fresh(row, kernel, "float64")
    # What is sealed is no leaf, and would stay in float32.
    adapters = float64(trained(lora_jax.unseal(adapters)))
    x = float64(kernel.x)
    train, rest = partition(adapters, {"w": adapters["w"].trainable()})

    def factored(train):
      return adapt(kernel.f, strict=True)(attach(params, join(train, rest)), x)

    def formed(train):
      w = effective(row, kernel, params["w"], join(train, rest)["w"])
      return kernel.f({"w": w}, x)

    y, pullback = jax.vjp(factored, train)
    expected_y, expected_pullback = jax.vjp(formed, train)
    np.testing.assert_allclose(y, expected_y, rtol=1e-9, atol=1e-9)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float64)).reshape(y.shape)
    actual, expected = pullback(cotangent), expected_pullback(cotangent)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      assert np.abs(theirs).max() > 0
      np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9 * np.abs(theirs).max())


@every_pair
def test_unmerge_restores_the_base_to_rounding(row, kernel):
  params, adapters = fresh(row, kernel)
  adapters = trained(adapters)
  merged = merge(params, adapters)
  restored = unmerge(merged, adapters)
  size = float(max(np.abs(merged["w"]).max(), np.abs(params["w"]).max()))
  np.testing.assert_allclose(restored["w"], params["w"], rtol=0, atol=size * 2**-20)


@every_pair
def test_training_moves_what_trains_and_leaves_the_rest_bit_identical(row, kernel):
  params, adapters = fresh(row, kernel)
  weights = attach(params, adapters)
  mask = trainable_mask(weights)
  target = normal(*jax.eval_shape(kernel.f, params, kernel.x).shape)

  def loss(train, rest):
    return jnp.mean((adapt(kernel.f)(join(train, rest), kernel.x) - target) ** 2)

  train, rest = partition(weights, mask)

  @jax.jit
  def step(train, rest):
    return jax.tree.map(lambda x, g: x - 0.05 * g, train, jax.grad(loss)(train, rest))

  after = train
  for _ in range(3):
    after = step(after, rest)
  assert loss(after, rest) < loss(train, rest)
  changed = jax.tree.map(lambda x, y: bool((x != y).any()), join(after, rest), weights)
  assert jax.tree.leaves(changed) == jax.tree.leaves(mask)
  detached = lora_jax.detach(join(after, rest), adapters)
  assert jax.tree.structure(detached) == jax.tree.structure(adapters)
  assert_close(merge(params, detached)["w"], join(after, rest)["w"].materialize())


@every_pair
def test_strict_mode_takes_it_and_nothing_of_full_size_is_formed(row, kernel):
  params, adapters = fresh(row, kernel)
  weights = attach(params, trained(adapters))
  train, rest = partition(weights, trainable_mask(weights))

  def loss(train):
    return jnp.sum(adapt(kernel.f, strict=True)(join(train, rest), kernel.x))

  assert np.isfinite(loss(train))
  matrix = tuple(n for n in kernel.shape if n in (11, 13, 17))
  formed = full_size_values(jax.grad(loss), (train,), {matrix})
  of_the_base = full_size_values(kernel.f, (params, kernel.x), {matrix})  # its transpose
  assert (formed > of_the_base) == row.dense


@every_pair
def test_a_second_call_compiles_nothing(row, kernel):
  params, adapters = fresh(row, kernel)
  step = jax.jit(adapt(kernel.f))
  step(attach(params, adapters), kernel.x).block_until_ready()
  others = attach(params, trained(adapters))
  jax.block_until_ready(others)
  with compilations() as events:
    step(others, kernel.x).block_until_ready()
  assert events == []


@every_method
def test_a_leaf_s_start_does_not_depend_on_the_other_targets(row):
  params = {"x": normal(11, 13), "y": normal(13, 11)}
  one, both = (init(KEY, params, dict.fromkeys(paths, row.spec)) for paths in ("y", "xy"))
  jax.tree.map(np.testing.assert_array_equal, one["y"], both["y"])


@every_method
def test_the_summary_counts_what_trains_from_shapes_alone(row):
  params, adapters = fresh(row, KERNELS["matrix"])
  abstract = jax.eval_shape(lambda: params)
  report = lora_jax.summary(abstract, {"w": row.spec})
  train, _ = partition(adapters, {"w": adapters["w"].trainable()})
  assert report.trainable == sum(x.size for x in jax.tree.leaves(train)) > 0


def test_every_kernel_that_a_method_leaves_out_is_one_of_the_table():
  assert all(row.undefined.keys() <= KERNELS.keys() for row in METHODS.values())


@pytest.mark.parametrize(
  ("row", "kernel", "words"),
  [
    pytest.param(row, KERNELS[name], words, id=f"{method}-{name}")
    for method, row in METHODS.items()
    for name, words in row.undefined.items()
  ],
)
def test_where_a_method_is_not_defined_the_error_says_so(row, kernel, words):
  with pytest.raises(ValueError, match=rf"^w: .*{words}"):
    fresh(row, kernel)
