"""Run by `test_devices.py` in a process of its own, which has four devices.

Each function is one statement about adapted functions on several devices; the name of each that
holds is printed.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from functions import normal
from jax import export
from jax.sharding import AxisType, NamedSharding
from weight_table import factors

import lora_jax
from lora_jax import LowRank, adapt, materialize

X = normal(8, 16)
W = LowRank(normal(16, 12), *factors((16, 12), "io"), scale=0.5, path="w")


def f(w, x):
  return jnp.sin(x @ w)


def loss(apply):
  return lambda w, x: jnp.sum(apply(w, x) ** 2)


def assert_close(x, y):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), x, y)


def mesh(*shape):
  axes = ("data", "tensor")[: len(shape)]
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))


def pmap_outside_of_the_adapted_function():
  parts = X.reshape(4, 2, 16)
  out = jax.pmap(adapt(f, strict=True), in_axes=(None, 0))(W, parts)
  assert_close(out.reshape(8, 12), f(materialize(W), X))


def a_pmapped_step_gives_the_gradient_of_the_whole_batch():
  def step(w, x):
    return jax.lax.psum(jax.grad(loss(adapt(f, strict=True)))(w, x), "data")

  grads = jax.pmap(step, "data", in_axes=(None, 0))(W, X.reshape(4, 2, 16))
  expected = jax.grad(loss(adapt(f)))(W, X)
  assert_close(jax.tree.map(lambda g: g[0], grads), expected)


def jit_with_the_kernel_sharded_by_its_outputs_and_the_rows_by_data():
  on = mesh(2, 2)
  specs = W.partition_specs(jax.P(None, "tensor"))
  assert (specs.w, specs.a, specs.b) == (
    jax.P(None, "tensor"),
    jax.P(None, None),
    jax.P(None, "tensor"),
  )
  shardings = jax.tree.map(lambda spec: NamedSharding(on, spec), specs)
  rows = NamedSharding(on, jax.P("data"))
  step = jax.jit(jax.grad(loss(adapt(f, strict=True))), in_shardings=(shardings, rows))
  assert_close(step(W, X), jax.grad(loss(adapt(f)))(W, X))
  compiled = step.lower(W, X).compile().as_text()
  assert "f32[16,12]{1,0} all-gather" not in compiled  # the base stays where it is


def shard_map_inside_with_the_contracted_axis_sharded():
  def partial_products(w, x):
    return jax.lax.psum(x @ w, "tensor")

  mapped = jax.shard_map(
    partial_products,
    mesh=mesh(2, 2),
    in_specs=(jax.P("tensor", None), jax.P("data", "tensor")),
    out_specs=jax.P("data", None),
  )
  assert_close(adapt(mapped, strict=True)(W, X), X @ materialize(W))
  gradient = jax.grad(loss(adapt(mapped, strict=True)))(W, X)
  assert_close(gradient, jax.grad(loss(lambda w, x: x @ materialize(w)))(W, X))


def shard_map_outside_with_the_rows_sharded():
  mapped = jax.shard_map(
    adapt(f, strict=True), mesh=mesh(4), in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data")
  )
  assert_close(mapped(W, X), f(materialize(W), X))


def an_exported_program_runs_on_the_leaves_of_the_weights():
  leaves, treedef = jax.tree.flatten(W)

  @jax.jit
  def on_leaves(leaves, x):
    return adapt(f, strict=True)(jax.tree.unflatten(treedef, leaves), x)

  exported = export.export(on_leaves)(leaves, X)
  assert_close(exported.call(leaves, X), f(materialize(W), X))
  restored = export.deserialize(bytearray(exported.serialize()))
  assert_close(restored.call(leaves, X), f(materialize(W), X))


def a_batch_in_which_every_row_has_its_own_adapter():
  stack = jax.tree.map(
    lambda x: jnp.stack([x, 2 * x, 3 * x]), lora_jax.partition(W, W.trainable())[0]
  )

  def one(adapter, x):
    return adapt(f, strict=True)(lora_jax.join(adapter, lora_jax.partition(W, W.trainable())[1]), x)

  rows = jnp.array([2, 0, 1, 1, 0, 2, 2, 0])
  chosen = jax.tree.map(lambda x: x[rows], stack)
  expected = [
    f(materialize(LowRank(W.w, (1 + n) * W.a, (1 + n) * W.b, W.scale)), x)
    for n, x in zip(rows.tolist(), X, strict=True)
  ]
  assert_close(jax.jit(jax.vmap(one))(chosen, X), jnp.stack(expected))


if __name__ == "__main__":
  assert jax.device_count() == 4, jax.devices()
  module = sys.modules["__main__"]
  skipped = (f, loss, assert_close, mesh)
  for name, statement in list(vars(module).items()):
    if getattr(statement, "__module__", "") == "__main__" and statement not in skipped:
      statement()
      print(name)
