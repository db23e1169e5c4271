"""The law of `adapt` and its structural twin, over the tables of programs and of weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import compilations, full_size_values
from programs import PROGRAMS, Program
from tolerances import assert_close
from weight_table import WEIGHTS, Kind, low_rank, with_weights

import lora_jax
from lora_jax import adapt, is_weight, materialize

all_programs = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def pairs(*everyday: str, some: tuple[str, ...] = (), formed: bool = True):
  """The rows of the table of programs with those of the table of weights.

  Every program runs at every commit with the weights named in `everyday`. With those in `some`,
  every 20th program does, other ones for each weight. The rest are slow tests. `formed=False`
  leaves out the weights that are always materialized.
  """
  found = []
  for column, (weight, kind) in enumerate(WEIGHTS.items()):
    if kind.is_formed and not formed:
      continue
    for row, (name, program) in enumerate(PROGRAMS.items()):
      why = program.refused or program.refused_for.get(weight, "")
      program = program._replace(refused=why)
      often = weight in everyday or (weight in some and (row + column) % 20 == 0)
      marks = [] if often else [pytest.mark.slow]
      found.append(pytest.param(program, kind, id=f"{name}-{weight}", marks=marks))
  return pytest.mark.parametrize(("program", "kind"), found)


def arguments(program: Program, kind: Kind):
  """The adapted parameters and the input, with a `float` mask of what can be differentiated."""
  params = with_weights(program.params, program.roles, kind)
  x = program.x.astype(kind.model_dtype) if is_float(program.x) else program.x
  return params, x


def is_float(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def loss(out) -> jax.Array:
  """A number that depends on every float of a result, and on each in another way."""
  floats = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(out) if is_float(leaf)]
  return sum(jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) for y in floats)


def differentiate(f, program: Program):
  """(params, x) -> (result, derivative) in every float leaf; forward where reverse cannot be."""

  def g(params, x):
    floats, rest = lora_jax.partition((params, x), jax.tree.map(is_float, (params, x)))

    def of_floats(floats):
      out = f(*lora_jax.join(floats, rest))
      return loss(out), out

    if program.reverse:
      gradient, out = jax.grad(of_floats, has_aux=True)(floats)
      return out, gradient
    tangents = jax.tree.map(jnp.cos, floats)
    _, derivative, out = jax.jvp(of_floats, (floats,), (tangents,), has_aux=True)
    return out, derivative

  return g


# The numbers are what is looked at here, and most of the time is the compiler's.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pairs(some=("bfloat16-base", "nf4", "gguf", "dora", "lokr"))
def test_the_adapted_function_of_the_tree_is_the_function_of_the_materialized_tree(program, kind):
  params, x = arguments(program, kind)
  assert_close(adapt(program.f)(params, x), program.f(materialize(params), x), kind.dtype)


@pairs("float32", some=("bfloat16-model", "nested", "masked"))
def test_values_and_gradients_under_jit_are_the_oracle_s_and_a_second_call_compiles_nothing(
  program, kind
):
  params, x = arguments(program, kind)
  adapted = quick_jit(differentiate(adapt(program.f), program))
  oracle = quick_jit(differentiate(lambda params, x: program.f(materialize(params), x), program))
  assert_close(adapted(params, x), oracle(params, x), kind.dtype)
  with compilations() as events:
    adapted(params, x)
  assert not events


@pairs("float32", some=("bfloat16-model", "gated", "dora", "factored"), formed=False)
def test_strict_mode_forms_no_full_size_value_or_says_why_it_would(program, kind):
  params, x = arguments(program, kind)
  strict = adapt(program.f, strict=True)
  if program.refused:
    with pytest.raises(lora_jax.MaterializationError, match=program.refused):
      strict(params, x)
    return

  # The bare model has values of the matrix's shape too: its transposes and casts.
  bare = materialize(params)
  weights = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
  matrices = {
    tuple(n for n, role in zip(w.shape, w.all_roles, strict=True) if role != "s") for w in weights
  }
  allowed = full_size_values(program.f, (bare, x), matrices) + program.parts
  assert full_size_values(strict, (params, x), matrices) <= allowed

  def adapted_gradient(train, frozen, x):
    return loss(strict(lora_jax.join(train, frozen), x))

  def bare_gradient(x):
    return loss(program.f(bare, x))

  train, frozen = lora_jax.partition(params, lora_jax.trainable_mask(params))
  if not program.reverse:
    return
  by = (0, 2) if is_float(x) else 0
  bare_by_x = jax.grad(bare_gradient) if is_float(x) else bare_gradient
  allowed = full_size_values(bare_by_x, (x,), matrices) + program.parts
  assert full_size_values(jax.grad(adapted_gradient, by), (train, frozen, x), matrices) <= allowed


# ---- transformations outside


W, X = low_rank(normal(11, 13), "io"), normal(3, 11)
TWO = [low_rank(W.w, "io", seed=n) for n in (1, 2)]
STACKED = jax.tree.map(lambda *xs: jnp.stack(xs), *TWO)


def dense(p, x):
  return jnp.sin(x @ p["w"])


def total(p, x):
  return jnp.sum(dense(p, x) ** 2)


@pytest.mark.parametrize(
  "transform",
  [
    jax.jacfwd,
    jax.jacrev,
    jax.hessian,
    lambda f, by: lambda p, x: jax.jvp(f, (p, x), jax.tree.map(jnp.cos, (p, x))),
    lambda f, by: lambda p, x: jax.linearize(f, p, x)[1](*jax.tree.map(jnp.cos, (p, x))),
    lambda f, by: lambda p, x: jax.vjp(f, p, x)[1](jnp.float32(2)),
    lambda f, by: jax.grad(lambda p, x: jnp.sum(jax.grad(f, 1)(p, x) ** 2), by),
    lambda f, by: jax.jit(jax.value_and_grad(jax.checkpoint(f), by)),
  ],
  ids=["jacfwd", "jacrev", "hessian", "jvp", "linearize", "vjp", "grad of grad", "jit grad remat"],
)
def test_derivatives_of_the_adapted_function_are_those_of_the_dense_one(transform):
  small = {"w": low_rank(normal(3, 2), "io")}, normal(2, 3)
  adapted = transform(adapt(total), (0, 1))
  oracle = transform(lambda p, x: total(materialize(p), x), (0, 1))
  assert_close(adapted(*small), oracle(*small))


def test_many_adapters_are_applied_by_vmap_to_one_base_each_with_its_gradient():
  axes = ({"w": dataclasses.replace(W, w=None, a=0, b=0)}, None)
  adapters = {"w": dataclasses.replace(STACKED, w=W.w)}

  for f in (adapt(dense), jax.grad(adapt(total))):
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *(f({"w": w}, X) for w in TWO))
    assert_close(jax.jit(jax.vmap(f, axes))(adapters, X), expected)


def test_many_adapters_on_one_base_form_no_full_size_value_for_any_of_them():
  axes = ({"w": dataclasses.replace(W, w=None, a=0, b=0)}, None)
  adapters = {"w": dataclasses.replace(STACKED, w=W.w)}
  mapped = jax.vmap(adapt(dense, strict=True), axes)
  assert full_size_values(mapped, (adapters, X), {(11, 13)}) == 0


def test_inputs_are_mapped_by_vmap():
  actual = jax.vmap(adapt(dense), (None, 0))({"w": W}, X)
  assert_close(actual, dense({"w": W.materialize()}, X))


def test_a_stack_of_weights_is_scanned_and_mapped_outside():
  def step(x, w):
    return x, adapt(dense, strict=True)({"w": w}, x)

  expected = jnp.stack([dense({"w": w.materialize()}, X) for w in TWO])
  assert_close(jax.lax.scan(step, X, STACKED)[1], expected)
  assert_close(jax.vmap(lambda w: step(X, w)[1])(STACKED), expected)


def test_the_shapes_are_found_without_arrays():
  abstract = jax.eval_shape(lambda: ({"w": W}, X))
  assert jax.eval_shape(adapt(dense, strict=True), *abstract).shape == (3, 13)


def test_an_adapted_function_inside_an_adapted_function_is_no_different():
  f = adapt(lambda p, x: adapt(dense)(p, x) @ p["w"].T, strict=True)
  assert_close(f({"w": W}, X), dense({"w": W.materialize()}, X) @ W.materialize().T)


# ---- arguments


def test_what_is_no_array_reaches_the_function_as_it_is():
  seen = {}

  def f(p, x, *args, activation, flag, **kwargs):
    seen.update(args=args, flag=flag, **kwargs)
    return activation(x @ p["w"]) if flag else x

  y = adapt(f)({"w": W}, X, "text", None, 3, activation=jnp.tanh, flag=True, layers=(1, 2.5))
  assert seen == {"args": ("text", None, 3), "flag": True, "layers": (1, 2.5)}
  assert_close(y, jnp.tanh(X @ W.materialize()))


def test_weights_may_come_by_keyword_and_in_several_arguments():
  def f(first, *, second, x):
    return (x @ first) @ second["w"].T

  y = adapt(f, strict=True)(TWO[0], second={"w": TWO[1]}, x=X)
  assert_close(y, f(TWO[0].materialize(), second={"w": TWO[1].materialize()}, x=X))


def test_numpy_arrays_and_tracers_are_arrays():
  f = adapt(dense, strict=True)
  expected = f({"w": W}, X)
  assert_close(f({"w": jax.tree.map(np.asarray, W)}, np.asarray(X)), expected)
  assert_close(jax.jit(lambda x: f({"w": W}, x))(X), expected)


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), np.float32(3), np.bool_(True)])
def test_a_numpy_scalar_reaches_the_function_as_it_is(number):
  seen = []

  def f(p, x, number):
    seen.append(number)
    rows = x[: int(number)].reshape(-1, x.shape[-1])
    return sum(number * (rows @ p["w"]) for _ in range(int(number)))

  expected = int(number) * number * (X[: int(number)] @ W.materialize())
  assert_close(adapt(f, strict=True)({"w": W}, X, number), expected)
  assert seen == [number] and type(seen[0]) is type(number)
  by_number = jax.grad(
    lambda number: jnp.sum(adapt(lambda p, x, n: n * (x @ p["w"]))({"w": W}, X, number))
  )
  assert_close(by_number(np.float32(2)), jnp.sum(X @ W.materialize()))


def test_static_arguments_of_an_outer_jit_stay_static():
  def f(p, x, power):
    return sum(x @ p["w"] for _ in range(power))

  adapted = jax.jit(adapt(f), static_argnums=2)
  assert_close(adapted({"w": W}, X, 3), 3 * X @ W.materialize())


def test_without_a_weight_the_function_itself_is_called():
  def f(x):
    assert not isinstance(x, jax.core.Tracer)
    return x

  assert adapt(f)(X) is X
  assert adapt(dense).__name__ == "dense"


def test_a_dropout_key_gives_the_same_noise_as_without_the_transform():
  def f(p, x, key):
    return (x * jax.random.bernoulli(key, 0.5, x.shape)) @ p["w"]

  key = jax.random.key(3)
  assert_close(adapt(f, strict=True)({"w": W}, X, key), f({"w": W.materialize()}, X, key))


# ---- errors


def test_a_weight_that_the_function_reaches_by_closure_is_a_clear_error():
  named = W.with_path("block_0/query/kernel")
  with pytest.raises(
    TypeError, match=r"block_0/query/kernel: a Weight met a JAX function.*by closure is not seen"
  ):
    adapt(lambda p, x: jnp.dot(x, named) + x @ p["w"])({"w": W}, X)


@pytest.mark.parametrize(
  "f", [jnp.dot, jnp.matmul, lambda x, w: x @ w, lambda x, w: x + w, lambda x, w: jnp.sin(w)]
)
def test_a_weight_that_meets_a_function_which_was_not_adapted_says_what_to_do(f):
  for run in (f, jax.jit(f)):
    with pytest.raises(TypeError, match=r"a Weight met a JAX function.*lora_jax\.adapt\(f\)"):
      run(X, W)


@pytest.mark.parametrize(
  ("weight", "path"),
  [(W, "0/block/w"), (W.with_path("block/w"), "block/w")],
  ids=["by its place among the arguments", "by the path that attach gave it"],
)
def test_strict_mode_names_the_weight(weight, path):
  with pytest.raises(lora_jax.MaterializationError, match=f"^{path}: sin would materialize this"):
    adapt(lambda p: jnp.sin(p["block"]["w"]), strict=True)({"block": {"w": weight}})


def test_strict_mode_names_a_weight_given_by_keyword():
  with pytest.raises(lora_jax.MaterializationError, match=r"^params/w: sin would"):
    adapt(lambda params: jnp.sin(params["w"]), strict=True)(params={"w": W})


# ---- what users add


def test_a_rule_of_the_user_s_own_is_used():
  def sin(w, **_):
    return jnp.zeros(w.shape)

  rules = lora_jax.RULES | {jax.lax.sin_p: sin}
  f = adapt(lambda p: jnp.sin(p["w"]), strict=True, rules=rules)
  assert_close(f({"w": W}), jnp.zeros((11, 13)))


def test_a_rule_of_the_user_s_own_is_given_arrays():
  seen = []

  def mul(x, y, **_):
    seen.extend(each for each in (x, y) if not is_weight(each))
    raise lora_jax.NotFactored("it only looks")

  rules = lora_jax.RULES | {jax.lax.mul_p: mul}
  row = jnp.arange(13.0)
  assert_close(adapt(lambda p: p["w"] * row, rules=rules)({"w": W}), W.materialize() * row)
  assert [type(each) for each in seen] == [type(row)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(lora_jax.Weight):
  """A user's own kind of weight: it says what it is and how it is contracted, no more."""

  d: jax.Array
  path: str = dataclasses.field(default="", metadata={"static": True})

  def materialize(self):
    return jnp.diag(self.d)

  def dot_general(self, other, dimension_numbers, *, weight_is_lhs, **params):
    if weight_is_lhs or dimension_numbers != (((1,), (0,)), ((), ())):
      raise lora_jax.NotFactored("only x @ w is")
    return other * self.d


def test_a_weight_of_the_user_s_own_kind_is_applied_by_its_methods_and_else_materialized():
  w = Diagonal(normal(11))
  assert (w.shape, w.ndim, w.dtype) == ((11, 11), 2, jnp.float32)
  product = adapt(lambda p, x: x @ p["w"], strict=True)
  assert full_size_values(product, ({"w": w}, X), {(11, 11)}) == 0
  assert_close(product({"w": w}, X), X * w.d)

  def transposed(p, x):
    return x @ p["w"].T

  assert_close(adapt(transposed)({"w": w}, X), X * w.d)
  with pytest.raises(lora_jax.MaterializationError, match="Diagonal has no factored form of trans"):
    adapt(transposed, strict=True)({"w": w}, X)


def test_a_low_rank_update_of_a_user_s_own_kind_of_weight_is_factored():
  base = Diagonal(normal(11))
  w = lora_jax.LowRank(base, normal(11, 2), normal(2, 11))
  assert_close(adapt(dense, strict=True)({"w": w}, X), dense({"w": w.materialize()}, X))
  assert not any(jax.tree.leaves(w.trainable().w))


@pytest.mark.parametrize(
  "program",
  [
    pytest.param(p, id=name, marks=[pytest.mark.slow] if row % 4 else [])
    for row, (name, p) in enumerate(PROGRAMS.items())
    if p.vmap
  ],
)
def test_vmap_over_adapters_gives_what_each_adapter_gives_alone(program):
  params, x = arguments(program, WEIGHTS["float32"])
  train, frozen = lora_jax.partition(params, lora_jax.trainable_mask(params))
  members = [jax.tree.map(lambda leaf, c=c: c * leaf, train) for c in (1.0, -0.5)]

  def f(train):
    return adapt(program.f)(lora_jax.join(train, frozen), x)

  together = quick_jit(jax.vmap(f))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
  for n, member in enumerate(members):
    alone = program.f(materialize(lora_jax.join(member, frozen)), x)
    assert_close(jax.tree.map(lambda leaf, n=n: leaf[n], together), alone)
