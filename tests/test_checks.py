"""Settings are checked where they are given: specs, formats, rules, and what starts from specs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import (
  AdaLoRA,
  DoRA,
  Full,
  LoHa,
  LoKr,
  LoRA,
  OLoRA,
  PiSSA,
  TokenRows,
  VeRA,
  compress,
  eva,
  loftq,
)
from lora_jax.compress import gptq
from lora_jax.train import optimizer
from lora_jax.weights import Format

SPECS = {
  kind: {"rank": 2} if kind is VeRA else {"rank": 2, "alpha": 3.0}
  for kind in (LoRA, DoRA, PiSSA, OLoRA, AdaLoRA, LoHa, LoKr, VeRA)
} | {TokenRows: {"ids": (1, 2)}, Format: {"levels": "int4"}}
PARAMS = {"layer": {"kernel": jnp.ones((4, 6))}}
PATH = "layer/kernel"
SPEC = LoRA(rank=2, alpha=3.0)

# What a field of a type does not take; fields are told apart by their annotations below.
WRONG = {
  "int": [2.0, "2", True, None, float("nan"), np.float32(2), [2]],
  "float": ["16", True, None, float("nan"), float("inf"), -np.inf, np.float32("nan"), [1.0], 1j],
  "bool": ["no", 1, 0.0, None, "False"],
  "Callable": ["kaiming_uniform", 3],
}


def fields(kind):
  """`(name, type)` of the fields that are checked by their types."""
  found = []
  for field in dataclasses.fields(kind):
    annotation = getattr(field.type, "__name__", str(field.type)).removesuffix(" | None")
    if annotation in WRONG:
      found.append((field.name, annotation))
  return found


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
def test_a_setting_of_a_wrong_type_or_that_is_not_finite_is_refused_by_name(kind):
  checked = fields(kind)
  assert checked
  for name, annotation in checked:
    default = {field.name: field.default for field in dataclasses.fields(kind)}[name]
    for wrong in WRONG[annotation]:
      if wrong is None and default is None:
        continue
      with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: {name} "):
        kind(**SPECS[kind] | {name: wrong})


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_are_those_of_python(kind):
  plain = kind(**SPECS[kind])
  of_numpy = {"rank": np.int64(2), "alpha": np.float32(3), "ids": np.array([1, 2])}
  given = {name: of_numpy.get(name, value) for name, value in SPECS[kind].items()}
  spec = kind(**given)
  assert spec == plain
  assert hash(spec) == hash(plain)
  if "rank" in given:
    assert json.dumps([spec.rank, getattr(spec, "scale", 1.0)]) == json.dumps(
      [plain.rank, getattr(plain, "scale", 1.0)]
    )


@pytest.mark.parametrize("dropout", [float("nan"), 1.0, 1, -0.1, "0.1", True])
def test_a_dropout_that_is_no_fraction_is_refused(dropout):
  with pytest.raises((TypeError, ValueError), match="LoRA: dropout "):
    LoRA(rank=2, alpha=3.0, dropout=dropout)


@pytest.mark.parametrize("ids", ["12", 5, (1.5,), (True,), ("1",), None])
def test_tokens_that_are_no_whole_numbers_are_refused(ids):
  with pytest.raises(TypeError, match="TokenRows: ids"):
    TokenRows(ids=ids)


RULES = {
  "a dict": ({"all-linear": SPEC}, "a dict and not a list of .* list\\(rules.items\\(\\)\\)"),
  "a string": ("all-linear", "a str and not a list of"),
  "a spec": (SPEC, "a LoRA and not a list of"),
  "None": (None, "a NoneType and not a list of"),
  "one pair": (("all-linear", SPEC), "the rule 'all-linear' is not a .pattern, spec. pair"),
  "a pattern alone": (["all-linear"], "the rule 'all-linear' is not a .pattern, spec. pair"),
  "three": ([("all-linear", SPEC, 1)], "is not a .pattern, spec. pair"),
  "a class": ([("all-linear", LoRA)], "has the class LoRA and not an instance.*LoRA\\(...\\)"),
  "a name": ([("all-linear", "lora")], "has 'lora', a str and not a spec"),
  "a rank": ([("all-linear", 8)], "has 8, a int and not a spec"),
  "bytes": ([(b"all-linear", SPEC)], "the pattern b'all-linear' is a bytes and not a string"),
  "no pattern": ([(None, SPEC)], "the pattern None is a NoneType and not a string"),
}


@pytest.mark.parametrize(("rules", "words"), RULES.values(), ids=RULES)
def test_rules_that_are_no_list_of_pattern_and_spec_are_refused(rules, words):
  with pytest.raises(TypeError, match=words):
    lora_jax.match(PARAMS, rules)


def test_rules_may_be_any_iterable_of_pairs():
  expected = {PATH: SPEC}
  for rules in (iter([("all-linear", SPEC)]), {"all-linear": SPEC}.items(), [["all-linear", SPEC]]):
    assert lora_jax.match(PARAMS, rules) == expected
  assert lora_jax.match(PARAMS, [("all-linear", compress.NF4)]) == {PATH: compress.NF4}


STARTS = {
  "init": lambda specs: lora_jax.init(jax.random.key(0), PARAMS, specs),
  "eva": lambda specs: eva.start(PARAMS, specs, {}),
  "loftq": lambda specs: loftq.start(PARAMS, specs, dict.fromkeys(specs, compress.NF4)),
  "loftq of a function": lambda specs: loftq.start(PARAMS, specs, abs),
  "quantize": lambda formats: compress.quantize(PARAMS, formats),
  "gptq": lambda formats: gptq.quantize(PARAMS, formats, {}),
  "straight through": lambda formats: compress.straight_through(PARAMS, formats),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_what_starts_from_specs_or_formats_refuses_anything_else_by_its_path(start):
  with pytest.raises(TypeError, match=f"{PATH}: has the class LoRA and not an instance"):
    start({PATH: LoRA})
  with pytest.raises(TypeError, match=f"{PATH}: has 'nf4', a str and not a (spec|format)"):
    start({PATH: "nf4"})
  with pytest.raises(ValueError, match="other/kernel: the tree has no such leaf"):
    start({"other/kernel": SPEC})


def test_a_list_of_rules_in_the_place_of_specs_is_refused():
  with pytest.raises(TypeError, match=r"a list is not a mapping \{path: spec\}.*lora_jax.match"):
    lora_jax.init(jax.random.key(0), PARAMS, [("all-linear", SPEC)])


@pytest.mark.parametrize("rho", [float("nan"), "2", True, 0.5])
def test_a_factor_of_eva_s_budget_that_is_none_is_refused(rho):
  with pytest.raises((TypeError, ValueError), match="EVA: rho"):
    eva.start(PARAMS, {PATH: SPEC}, {}, rho=rho)


def test_one_pattern_in_the_place_of_a_list_is_refused():
  with pytest.raises(TypeError, match=r"give a list of them, \['.\*bias'\]"):
    lora_jax.trainable_mask(PARAMS, also=".*bias")


@pytest.mark.parametrize("rules", [{".*/b": 16.0}, ".*/b", [(".*/b", "16")], [(1, 16.0)]])
def test_learning_rates_by_pattern_are_checked_where_they_are_given(rules):
  with pytest.raises(TypeError, match="not a"):
    optimizer.scale_rates(rules)
  with pytest.raises(ValueError, match=r"the factor of the pattern .* nan is not finite"):
    optimizer.scale_rates([(".*b", float("nan"))])


def test_a_model_adapted_with_alpha_zero_stays_the_base():
  adapters = lora_jax.init(jax.random.key(0), PARAMS, {PATH: LoRA(rank=2, alpha=0)})
  merged = lora_jax.merge(PARAMS, adapters)
  np.testing.assert_array_equal(merged["layer"]["kernel"], PARAMS["layer"]["kernel"])


def test_full_training_has_nothing_to_check():
  assert not fields(Full)
