"""The fields of configs: each is held to its range before anything is read, and named."""

import math

import pytest
from ml_collections import ConfigDict

from configs import (
  adapters,
  classify,
  compress,
  detect,
  e2e,
  embed,
  glue,
  images,
  quickstart,
  sft,
  speech,
  translate,
)
from configs import methods as methods_config
from experiments import config_checks
from lora_jax import tasks

CONFIGS = {
  "quickstart": lambda: quickstart.get_config(),
  "a sweep": lambda: quickstart.get_config("sweep"),
  "e2e": lambda: e2e.get_config(),
  "translate": lambda: translate.get_config(),
  "classify": lambda: classify.get_config(),
  "images": lambda: images.get_config("cifar"),
  "X-rays, head alone": lambda: images.get_config("pneumonia,model=mobilenet,method=head"),
  "detect": lambda: detect.get_config(),
  "spoken orders": lambda: speech.get_config("coffee"),
  "spoken digits, head alone": lambda: speech.get_config("digits,method=head"),
  "sft": lambda: sft.get_config(),
  "sft on a file": lambda: sft.get_config("data=mine.jsonl,full"),
  "methods": lambda: methods_config.get_config(),
  "embed": lambda: embed.get_config(),
  **{name: lambda name=name: glue.get_config(name) for name in glue.TASKS},
  "the head alone": lambda: glue.get_config("sst2,method=head"),
  "a sweep of glue": lambda: glue.get_config("cola,sweep"),
} | {f"method={m}": lambda m=m: quickstart.get_config(f"method={m}") for m in adapters.METHODS}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_configs_that_are_here_are_in_range(make):
  config_checks.check_run(make())


def test_the_config_of_a_compression_is_in_range():
  config_checks.check(compress.get_config(), config_checks.COMPRESSION)


def numbers(config, prefix=""):
  """The fields that hold numbers."""
  for name in config:
    value = config[name]
    if hasattr(value, "items"):
      yield from numbers(value, f"{prefix}{name}.")
    elif isinstance(value, int | float):
      yield f"{prefix}{name}"


def test_every_field_of_a_run_has_a_rule_and_every_rule_a_field():
  """So that a field which is added is checked."""
  found = set()
  for make in CONFIGS.values():
    config = make().to_dict()
    of_others = {"sweep.grid", "sweep.members", "optimizer.rates"}  # checked where they are used
    for section, fields in config.items():
      names = [f"{section}.{x}" for x in fields] if isinstance(fields, dict) else [section]
      found |= set(names) - of_others
  ruled = config_checks.RUN.keys() | {f"adapter.{name}" for name in config_checks.ADAPTERS}
  for task in tasks.TASKS:
    ruled |= config_checks.rules_of_task(task).keys()
  by_spec = {"adapter.method", "adapter.targets", "adapter.also_train", "adapter.format"}
  assert found - by_spec == ruled


def test_every_number_of_a_compression_has_a_rule(monkeypatch):
  of_others = {  # in `compression_checks`, which says how they belong together
    "factorize.budget", "factorize.energy", "factorize.multiple", "text.calibration",
    "text.held_out", "text.batch_size", "report.prompt", "report.repeats",
  }  # fmt: skip
  ruled = set()
  monkeypatch.setattr(config_checks, "check", lambda config, rules, *lacked: ruled.update(rules))
  config = compress.get_config()
  for source in ("texts.txt", ""):  # running text, or the batches of a task
    config.text.source = source
    config_checks.check_compression(config)
  assert set(numbers(config)) - ruled == of_others


# Numbers that may be as large as float32 has them.
LARGE = {
  "adapter.alpha", "adapter.d_initial", "adapter.deviation", "adapter.orthogonality", "adapter.rho",
  "data.neutral", "distill.hidden", "distill.temperature", "optimizer.clip_norm", "optimizer.eps",
  "optimizer.peak_learning_rate", "optimizer.weight_decay",
}  # fmt: skip
SIGNED = {"adapter.alpha", "adapter.d_initial"}
WRONG = [math.nan, math.inf, -math.inf, -1e300, -(2**64), 2**64, 10**400, "8", None, (1,), 1e300]


@pytest.mark.parametrize("method", ["lora", "adalora", "vera", "eva", "lokr"])
def test_a_number_that_is_none_or_out_of_range_is_refused_with_its_field(method):
  config = quickstart.get_config(f"method={method}")
  fields = list(numbers(config))
  assert len(fields) > 25
  may_be = {"adapter.iterations", "adapter.factor", "adapter.fan_in", "data.quoted"}
  for field in fields:
    for wrong in WRONG:
      if wrong is None and field in may_be:
        continue
      if wrong in (2**64, -(2**64)) and field in LARGE and (wrong > 0 or field in SIGNED):
        continue
      if field == "optimizer.clip_norm" and wrong == math.inf:
        continue  # clips nothing
      changed = config.to_dict()
      section, _, name = field.rpartition(".")
      (changed[section] if section else changed)[name] = wrong
      changed = ConfigDict(changed)
      with pytest.raises(ValueError, match=rf"^{field} is .*; it must be ") as caught:
        config_checks.check_run(changed)
      assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
  ("field", "values"),
  [
    ("task.learn", ["first", "", None, 1]),
    ("task.template", ["", " ", 1]),
    ("task.date", ["", None, 20260101]),
    ("data.too_long", ["cut", "", None]),
    ("data.packed_length", [-1, None, "8"]),
  ],
)
def test_the_fields_of_conversations(field, values):
  section, _, name = field.rpartition(".")
  for wrong in values:
    config = sft.get_config()
    with config.ignore_type(), config.unlocked():
      config[section][name] = wrong
    with pytest.raises(ValueError, match=rf"^{field} is .*; it must be "):
      config_checks.check_run(config)
  del config[section][name]
  with pytest.raises(ValueError, match=f"^{field} is missing; it must be "):
    config_checks.check_run(config)


@pytest.mark.parametrize(
  ("field", "values"),
  [
    ("seed", [-1, 2**32, 2**64, 1.5, True]),
    ("optimizer.b1", [1.0, -0.1, 2, 1 - 1e-12]),
    ("optimizer.b2", [1.0, 2, 1 - 1e-12]),
    ("optimizer.eps", [0.0, -1e-8, 1e-50]),
    ("optimizer.peak_learning_rate", [0.0, -1e-3, 1e-60]),
    ("optimizer.weight_decay", [-0.1]),
    ("optimizer.clip_norm", [0.0, -1.0]),
    ("train.steps", [0, -1, 2**31, 10.0]),
    ("data.train", [-0.1, 1.1]),
    ("distill.hard", [-0.1, 1.1]),
    ("distill.temperature", [0.0, -1.0]),
    ("mesh.data", [-2]),
    ("model.dtype", ["float64", "int8", "", "x"]),
    ("model.source", ["", " "]),
    ("data.buckets", [(), (0,), (8.0,), 8]),
    ("data.source", ["", (), [], ("a.csv", ""), ("a.csv", 3), 2024, None]),
    ("data.test_source", [(), ("a.csv", ""), 2024, None]),
  ],
)
def test_the_ends_of_ranges(field, values):
  for wrong in values:
    config = quickstart.get_config()
    section, _, name = field.rpartition(".")
    with config.ignore_type(), config.unlocked():
      (config[section] if section else config)[name] = wrong
    with pytest.raises(ValueError, match=rf"^{field} is .*; it must be "):
      config_checks.check_run(config)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("seed", 2**32 - 1), ("optimizer.b1", 0.0), ("optimizer.clip_norm", math.inf),
    ("optimizer.peak_learning_rate", 1e30), ("optimizer.b2", 0.999999), ("mesh.data", -1),
    ("optimizer.eps", 1e-30), ("data.source", ("a.csv", "b.json")), ("data.source", ["a.csv"]),
    ("data.test_source", ""), ("data.test_source", ("a.csv",)), ("data.test_source", "a.csv"),
  ],
)  # fmt: skip
def test_what_is_still_in_range(field, value):
  config = quickstart.get_config()
  section, _, name = field.rpartition(".")
  with config.ignore_type(), config.unlocked():
    (config[section] if section else config)[name] = value
  config_checks.check_run(config)
