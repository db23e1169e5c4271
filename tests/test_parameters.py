"""The law on a JAX whose primitives have other parameters: the right value, and one warning."""

import re

import jax
import jax.numpy as jnp
import pytest
from functions import LAYERS, normal, scanned
from jax import lax
from jax.extend.core import primitives
from programs import PROGRAMS
from tolerances import assert_close
from weight_table import low_rank

import lora_jax
from lora_jax import adapt, compat, materialize
from lora_jax.parameters import UnknownParametersWarning, checked

W, X = {"w": low_rank(normal(11, 13), "io")}, normal(3, 11)


def renamed(primitive, before: str, after: str):
  """The rules as a release would meet them that has another name for a parameter."""
  rule = lora_jax.RULES[primitive]

  def of_another_release(*operands, **params):
    params = {after if name == before else name: value for name, value in params.items()}
    return rule(*operands, **params)

  return lora_jax.RULES | {primitive: of_another_release}


CASES = {
  "transpose": (primitives.transpose_p, "permutation", lambda p, x: x @ p["w"].T, normal(3, 13)),
  "dot_general": (primitives.dot_general_p, "precision", lambda p, x: x @ p["w"], X),
  "jit": (compat.jit_p, "jaxpr", jax.jit(lambda p, x: x @ p["w"]), X),
  "remat2": (compat.remat_p, "policy", jax.checkpoint(lambda p, x: x @ p["w"]), X),
  "while": (compat.while_p, "body_nconsts", PROGRAMS["while"].f, X),
}


@pytest.mark.parametrize(("primitive", "name", "f", "x"), CASES.values(), ids=CASES)
def test_a_renamed_parameter_costs_a_warning_and_not_the_value(primitive, name, f, x):
  weights = W
  if primitive is compat.while_p:
    weights = {name: low_rank(w, "io") for name, w in PROGRAMS["while"].params.items()}
  rules = renamed(primitive, name, f"{name}_of_2030")
  message = (
    f"JAX {re.escape(compat.VERSION)} gives {primitive.name} the unknown parameter "
    f"'{name}_of_2030' and gives {primitive.name} no parameter '{name}'"
  )
  with pytest.warns(UnknownParametersWarning, match=message) as warned:
    result = adapt(f, rules=rules)(weights, x)
    adapt(f, rules=rules)(weights, x)
  assert len(warned) == 1
  assert_close(result, f(materialize(weights), x))
  with pytest.raises(lora_jax.MaterializationError, match=f"would materialize.*{message}"):
    adapt(f, rules=rules, strict=True)(weights, x)


def test_a_parameter_that_a_rule_does_not_know_may_change_the_result_so_the_rule_is_not_used():
  rule = lora_jax.RULES[primitives.neg_p]
  with (
    pytest.warns(UnknownParametersWarning, match="neg the unknown parameter 'twice'"),
    pytest.raises(lora_jax.NotFactored, match="neg the unknown parameter 'twice'"),
  ):
    rule(W["w"], evaluate=None, twice=True)


def test_a_scan_that_does_not_say_which_operands_it_slices_runs_on_materialized_weights():
  layers = {name: low_rank(w, "sio") for name, w in LAYERS.items()}
  rule = lora_jax.RULES[compat.scan_p]

  def silent(*operands, **params):
    return rule(*operands, **params | {"num_consts": None, "num_carry": None, "ft_in": None})

  f = adapt(scanned, rules=lora_jax.RULES | {compat.scan_p: silent})
  assert_close(f(layers, X), scanned(materialize(layers), X))
  with pytest.raises(lora_jax.MaterializationError, match="which operands a scan slices"):
    adapt(scanned, rules=lora_jax.RULES | {compat.scan_p: silent}, strict=True)(layers, X)


def test_a_rule_of_the_user_s_own_takes_any_parameters_if_it_says_so():
  taken = {}

  def anything(w, **params):
    taken.update(params)
    return w

  rule = checked({lax.sin_p: lambda w, *, accuracy=None: w})[lax.sin_p]
  assert rule(X, evaluate=None, accuracy=None) is X
  adapt(jnp.sin, rules=lora_jax.RULES | {lax.sin_p: anything})(W["w"])
  assert "evaluate" in taken


def test_the_releases_that_are_supported_have_no_parameter_that_is_not_known(recwarn):
  f = adapt(
    lambda p, x: scanned(p, x, body=jax.checkpoint(lambda p, x: jnp.sin(x @ p["up"]) @ p["down"]))
  )
  jax.make_jaxpr(f)({name: low_rank(w, "sio") for name, w in LAYERS.items()}, X)
  assert not [each for each in recwarn if each.category is UnknownParametersWarning]
