"""The law of `adapt` and its structural twin, over the tables of programs and of weights."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jaxprs import compilations, full_size_values
from programs import PROGRAMS, Program
from tolerances import assert_close
from weight_table import WEIGHTS, Kind, with_weights

import lora_jax
from lora_jax import adapt, is_weight, materialize

all_programs = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
all_kinds = pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)


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


@all_kinds
@all_programs
def test_the_adapted_function_of_the_tree_is_the_function_of_the_materialized_tree(program, kind):
  params, x = arguments(program, kind)
  assert_close(adapt(program.f)(params, x), program.f(materialize(params), x), kind.dtype)


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, id=name, marks=[pytest.mark.slow] if name != "float32" else [])
    for name, kind in WEIGHTS.items()
  ],
)
@all_programs
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


@all_kinds
@all_programs
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
  assert full_size_values(strict, (params, x), matrices) <= full_size_values(
    program.f, (bare, x), matrices
  )

  def adapted_gradient(train, frozen, x):
    return loss(strict(lora_jax.join(train, frozen), x))

  def bare_gradient(x):
    return loss(program.f(bare, x))

  train, frozen = lora_jax.partition(params, lora_jax.trainable_mask(params))
  if not program.reverse:
    return
  by = (0, 2) if is_float(x) else 0
  bare_by_x = jax.grad(bare_gradient) if is_float(x) else bare_gradient
  assert full_size_values(
    jax.grad(adapted_gradient, by), (train, frozen, x), matrices
  ) <= full_size_values(bare_by_x, (x,), matrices)
