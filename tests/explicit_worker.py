"""Run by `test_explicit.py` in a process of its own, which has four devices.

Each function without arguments is one statement about adapted functions on a mesh of explicit axes:
`python explicit_worker.py STATEMENT...` prints the names of those that hold.
"""

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jaxprs import full_size_values
from weight_table import MAKERS, low_rank

import lora_jax
from lora_jax import LowRank, adapt, calibration, is_weight, materialize, sharding

MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
P = jax.P


class Case(NamedTuple):
  """A use of a kernel.

  f: (w, x, at) -> y; `at(spec)` is the spec on the mesh, and None on one device.
  shape, roles, spec: of the kernel.
  x, x_spec: the other operand.
  """

  f: Callable
  spec: Any
  x_spec: Any
  shape: tuple[int, ...] = (12, 16)
  roles: str = "io"
  x: jax.Array = normal(8, 4, 12)


def on(spec):
  return spec


def with_mesh(spec):
  return NamedSharding(MESH, spec)


def off(spec):
  del spec


def matmul(w, x, at):
  return x @ w


def reduced(w, x, at):
  return jnp.einsum("btd,df->btf", x, w, out_sharding=at(P("data")))


def scanned(w, x, at):
  def layer(h, w):
    return jnp.sin(jnp.einsum("btd,de->bte", h, w, out_sharding=at(P("data")))), None

  return lax.scan(layer, x, w)[0]


def tied(w, ids, at):
  h = jnp.sin(w.at[ids].get(out_sharding=at(P("data"))))
  return jnp.einsum("btd,vd->btv", h, w, out_sharding=at(P("data", None, "model")))


def looked_up(w, ids, at):
  if at(P()) is None:
    return w[ids]
  return jax.sharding.auto_axes(lambda w, ids: w[ids], out_sharding=P("data", None, "model"))(
    w, ids
  )


def gathered_first(w, x, at):
  """The kernel is gathered over `data` as it is used, and stays cut over `model`."""
  return x @ (w if at(P()) is None else jax.sharding.reshard(w, P(None, "model")))


def heads(w, x, at):
  w = lax.reshape(w, (12, 4, 4), out_sharding=at(P("data", "model", None)))
  return jnp.einsum("btd,dhe->bhte", x, w, out_sharding=at(P("data", "model")))


def broadcast(w, x, at):
  w = lax.broadcast_in_dim(w, (8, *w.shape), (1, 2), out_sharding=at(P("data")))
  return jnp.einsum("btd,bdf->btf", x, w)


def convolved(w, x, at):
  return lax.conv_general_dilated(
    x,
    w,
    (1,),
    "SAME",
    dimension_numbers=("NWC", "WIO", "NWC"),
    out_sharding=at(P("data", None, "model")),
  )


def experts(w, x, at):
  sizes = jnp.array([3, 1, 2, 2])
  if at(P()) is None:
    return lax.ragged_dot(x, w, sizes)
  f = jax.sharding.auto_axes(lax.ragged_dot, out_sharding=P("data", "model"))
  return f(x, w, sizes)


IDS = jnp.arange(8).reshape(4, 2) * 2
CASES = {
  "sequence": Case(matmul, P(), P(None, "data")),
  "batch and sequence": Case(matmul, P(), P("data", "model")),
  "columns": Case(matmul, P(None, "model"), P("data")),
  "rows": Case(reduced, P("model", None), P("data", None, "model")),
  "fsdp": Case(reduced, P("data", None), P("data")),
  "fsdp and columns": Case(
    lambda w, x, at: jnp.einsum("btd,df->btf", x, w, out_sharding=at(P("data", None, "model"))),
    P("data", "model"), P("data"),
  ),
  "fsdp, gathered first": Case(gathered_first, P("data", "model"), P("data")),
  "weight on the left": Case(
    lambda w, x, at: jnp.einsum("df,btd->fbt", w, x, out_sharding=at(P("model", "data"))),
    P("data", "model"), P("data"),
  ),
  "heads": Case(heads, P("data", "model"), P("data")),
  "broadcast": Case(broadcast, P(None, "model"), P("data")),
  "tied embedding": Case(tied, P("model", None), P("data"), (16, 12), x=IDS),
  "embedding": Case(looked_up, P("model", "data"), P("data"), (16, 12), x=IDS),
  "mapped": Case(
    lambda w, x, at: jax.vmap(lambda row: reduced(w, row[None], lambda _: at(P()))[0])(x),
    P("model", None), P(None, None, "model"),
  ),
  "scan": Case(
    scanned, P(None, "model", "data"), P("data"), (3, 12, 12), "sio", normal(8, 4, 12)
  ),
  "experts": Case(experts, P(None, "data", "model"), P("data"), (4, 12, 16), "sio", normal(8, 12)),
  "experts, summed": Case(
    lambda w, x, at: jnp.einsum("end,edk->nk", x, w, out_sharding=at(P("data"))),
    P("model"), P("model", "data"), (4, 12, 16), "sio", normal(4, 8, 12),
  ),
  "convolution": Case(
    convolved, P(None, None, "model"), P("data"), (3, 4, 8), "iio", normal(8, 6, 4)
  ),
}  # fmt: skip


def fits(kind: str, name: str) -> bool:
  case = CASES[name]
  if kind == "token rows":
    return case.roles == "io"
  if kind == "dropout":  # its noise depends on how the operations are batched
    return name in ("rows", "fsdp and columns")
  return True


def put(x, spec):
  return jax.device_put(x, NamedSharding(MESH, spec))


def on_mesh(w, spec):
  """A weight whose parts are sharded as its array."""
  return jax.device_put(w, sharding.lay_out({"w": w}, MESH, [("w", spec)]).shardings["w"])


def values(case, at):
  """(trained, frozen, x) -> (loss, y): the loss depends on every number of y in another way."""

  def f(trained, frozen, x):
    w = lora_jax.join(trained, frozen)
    y = adapt(case.f)(w, x, at) if is_weight(w) else case.f(w, x, at)
    return jnp.sum(jnp.sin(3 * y)), y

  return f


def differentiated(case, at, w, x):
  """(y, the gradients of the trained parts and of x) of a weight, sharded or not."""
  trained, frozen = lora_jax.partition(w, w.trainable())
  by_x = jnp.issubdtype(x.dtype, jnp.floating)
  f = jax.grad(values(case, at), (0, 2) if by_x else 0, has_aux=True)
  return f, (trained, frozen, x)


def types(tree):
  return [(x.shape, x.dtype, getattr(x.sharding, "spec", None)) for x in jax.tree.leaves(tree)]


quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def check(names, kinds, only_types):
  """The types of result and gradients are those of the bare function and of what it is given."""
  failures = []
  for name in names:
    case = CASES[name]
    for kind in kinds:
      if not fits(kind, name):
        continue
      try:
        check_one(case, MAKERS[kind], only_types)
      except Exception as error:
        failures.append(f"{name}, {kind}: {type(error).__name__} {str(error)[:300]}")
  assert not failures, "\n".join(failures)


def check_one(case, make, only_types):
  w = make(normal(*case.shape), case.roles)
  cut, x = on_mesh(w, case.spec), put(case.x, case.x_spec)
  with jax.set_mesh(MESH):
    aval = jax.typeof(jax.jit(materialize)(cut)) if not only_types else cut.aval
    bare = jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)
    expected = jax.eval_shape(lambda w, x: case.f(w, x, on), bare, x)
    f, args = differentiated(case, on, cut, x)
    gradients, y = jax.eval_shape(f, *args)
    assert types(y) == types(expected), (types(y), types(expected))
    by_x = isinstance(gradients, tuple)
    of = (
      jax.eval_shape(lambda *xs: xs, args[0], x) if by_x else jax.eval_shape(lambda x: x, args[0])
    )
    assert types(gradients) == types(of), (types(gradients), types(of))
    if only_types:
      return
    actual = quick(f)(*args)
  f, args = differentiated(case, off, w, case.x)
  oracle = quick(f)(*args)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), actual, oracle)


def every_use_of_a_low_rank_weight_has_the_types_of_the_bare_function():
  check(CASES, ["float32"], only_types=True)


def every_kind_of_weight_has_the_types_of_the_bare_function():
  check(["rows", "tied embedding"], MAKERS, only_types=True)


def values_and_gradients_are_those_of_one_device():
  check(["rows", "fsdp and columns", "tied embedding"], ["float32"], only_types=False)
  check(["rows"], ["dora", "token rows", "int8", "factored", "lokr"], only_types=False)


def gradients_pass_through_a_scan():
  check(["scan"], ["float32"], only_types=False)


def slow_every_kind_of_weight_in_every_use():
  check(CASES, MAKERS, only_types=True)


def slow_values_and_gradients_of_every_use_and_of_every_kind():
  check(CASES, ["float32"], only_types=False)
  check(["fsdp and columns"], MAKERS, only_types=False)


def no_full_size_value_is_formed_on_explicit_axes():
  case = CASES["rows"]
  w = on_mesh(low_rank(normal(12, 16), "io"), case.spec)
  x = put(case.x, case.x_spec)
  trained, frozen = lora_jax.partition(w, w.trainable())

  def loss(trained, frozen, x):
    return jnp.sum(adapt(case.f, strict=True)(lora_jax.join(trained, frozen), x, on))

  with jax.set_mesh(MESH):
    assert full_size_values(jax.grad(loss, (0, 2)), (trained, frozen, x), {(12, 16)}) <= 1


def adapters_need_not_be_sharded_as_their_base_is():
  w = low_rank(normal(12, 16), "io")
  base, x = put(w.w, P("model")), put(normal(8, 4, 12), P("data", None, "model"))
  expected = reduced(w.materialize(), np.asarray(x), off)
  on_rank = (put(w.a, P(None, "data")), put(w.b, P("data", "model")))
  for a, b in ((w.a, w.b), (put(w.a, P()), put(w.b, P())), on_rank):
    each = LowRank(base, a, b, w.scale)
    y = jax.jit(adapt(functools.partial(reduced, at=with_mesh), strict=True))(each, x)
    np.testing.assert_allclose(y, expected, atol=1e-4)  # no mesh is set
    with jax.set_mesh(MESH):
      y = jax.jit(adapt(functools.partial(reduced, at=on), strict=True))(each, x)
      assert jax.typeof(y).sharding.spec == P("data", None, None)
      np.testing.assert_allclose(y, expected, atol=1e-4)
      np.testing.assert_allclose(each.materialize(), w.materialize(), atol=1e-5)
      assert jax.typeof(each.materialize()).sharding.spec == P("model", None)


def shard_map_takes_parts_that_are_not_sharded_as_the_array():
  w = low_rank(normal(12, 16), "io")
  each = LowRank(put(w.w, P("model")), put(w.a, P()), put(w.b, P()), w.scale)
  x = put(normal(8, 12), P("data", "model"))

  def f(w, x):
    partial = jax.shard_map(
      lambda w, x: lax.psum(x @ w, "model"),
      in_specs=(P("model", None), P("data", "model")),
      out_specs=P("data"),
    )
    return partial(w, x)

  with jax.set_mesh(MESH):
    y = jax.jit(adapt(f, strict=True))(each, x)
  np.testing.assert_allclose(y, np.asarray(x) @ w.materialize(), atol=1e-4)


def a_product_that_is_not_yet_summed_over_the_mesh_is_materialized():
  w = on_mesh(low_rank(normal(12, 16), "io"), P("model", None))
  x = put(normal(8, 12), P("data", "model"))

  def f(w, x):
    y = jnp.einsum("bd,df->bf", x, w, out_sharding=P("data", None, unreduced={"model"}))
    return jax.sharding.reshard(y, P("data", None))

  with jax.set_mesh(MESH):
    y = jax.jit(adapt(f))(w, x)
    np.testing.assert_allclose(y, np.asarray(x) @ materialize(w), atol=1e-4)
    with pytest.raises(lora_jax.MaterializationError, match="not yet summed over a mesh axis"):
      adapt(f, strict=True)(w, x)


def axes_of_both_types_in_one_mesh():
  mixed = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
  w = low_rank(normal(12, 16), "io")
  layout = sharding.lay_out({"w": w}, mixed, [("w", P("data", "model"))])
  x = jax.device_put(normal(8, 4, 12), NamedSharding(mixed, P("data")))
  with jax.set_mesh(mixed):
    y = jax.jit(adapt(functools.partial(reduced, at=on), strict=True))(
      jax.device_put(w, layout.shardings["w"]), x
    )
  np.testing.assert_allclose(y, reduced(w.materialize(), np.asarray(x), off), atol=1e-4)


def adapters_are_initialized_merged_and_taken_out_of_a_sharded_base():
  params = {"kernel": put(normal(12, 16), P("model", None))}
  with jax.set_mesh(MESH):
    for spec in (
      lora_jax.LoRA(rank=2, alpha=4.0),
      lora_jax.DoRA(rank=2, alpha=4.0),
      lora_jax.PiSSA(rank=2, alpha=4.0),
    ):
      adapters = lora_jax.init(
        jax.random.key(0), params, lora_jax.match(params, [("kernel", spec)])
      )
      merged = lora_jax.merge(params, adapters)
      assert jax.typeof(merged["kernel"]).sharding.spec == P("model", None)
      base = lora_jax.unmerge(merged, adapters)
      np.testing.assert_allclose(base["kernel"], params["kernel"], atol=1e-4)


COMBINED = {
  "concatenate": lambda ws: jnp.concatenate(ws, axis=1),
  "stack": lambda ws: jnp.stack(ws)[1],
  "pad": lambda ws: jnp.pad(ws[0], ((0, 0), (0, 4))),
  "vector": lambda ws: ws[0] * jnp.arange(1.0, 13.0),
  "sum": lambda ws: ws[0] + ws[1],
  "rev": lambda ws: ws[0][:, ::-1],
  "split": lambda ws: jnp.split(ws[0], 2, axis=1)[1],
}


def kernels_that_are_combined_or_moved_stay_factored():
  x = normal(8, 4, 12)
  ws = [low_rank(normal(12, 12) + n, "io") for n in range(3)]
  for spec in (P(None, "model"), P("model", None), P("data", "model")):
    for name, combine in COMBINED.items():

      def f(ws, x, at, combine=combine):
        w = combine(ws)
        return jnp.einsum("btd,df->btf", x, w, out_sharding=at(P("data", None, "model")))

      expected = f([w.materialize() for w in ws], x, off)
      with jax.set_mesh(MESH):
        on_it = [on_mesh(w, spec) for w in ws], put(x, P("data"))
        actual = jax.jit(adapt(functools.partial(f, at=on), strict=True))(*on_it)
      np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=f"{name}, {spec}")
      assert jax.typeof(actual).sharding.spec == P("data", None, "model"), name


def moments_of_sharded_inputs_are_those_of_one_device():
  x = put(normal(8, 4, 12), P("data", None, "model"))
  params = {"w": put(normal(12, 16), P("model", None))}
  with jax.set_mesh(MESH):
    f = functools.partial(reduced, at=on)
    moments = calibration.second_moments(lambda p, x: f(p["w"], x), params, ["w"], [x])["w"]
  x = np.asarray(x).reshape(-1, 12)
  np.testing.assert_allclose(moments.total, x.T @ x, atol=1e-4)
  assert moments.rows == 32


if __name__ == "__main__":
  assert jax.device_count() == 4, jax.devices()
  for name in sys.argv[1:]:
    try:
      vars(sys.modules["__main__"])[name]()
      print(name, flush=True)
    except Exception:
      traceback.print_exc()
