"""From a config to adapters and how they train: every method of configs/adapters.py."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tolerances import assert_close

import lora_jax
from configs import adapters as presets
from configs import quickstart
from experiments import methods, parts
from lora_jax import AdaLoRA, DoRA, Full, LoRA, TokenRows, compress, tree
from lora_jax.models import llama
from lora_jax.train import step


def section(method="lora", **changes):
  return quickstart.get_config(f"method={method}").adapter.to_dict() | changes


def rules_of(**fields):
  return methods.rules_of(ml_collections.ConfigDict(section(**fields)))


def test_the_settings_are_the_fields_of_the_spec():
  assert rules_of() == [("all-linear", LoRA(rank=8, alpha=16.0))]
  assert rules_of(method="rslora", rank=4) == [
    ("all-linear", LoRA(rank=4, alpha=16.0, rslora=True))
  ]
  assert rules_of(method="lora_fa", dropout=0.1)[0][1] == LoRA(
    rank=8, alpha=16.0, train_a=False, dropout=0.1
  )
  assert rules_of(method="dora")[0][1] == DoRA(rank=8, alpha=16.0)
  assert rules_of(method="adalora")[0][1] == AdaLoRA(rank=12, alpha=24.0)
  assert rules_of(method="norm") == [("norm", Full())]


def test_a_target_may_differ_in_some_settings_be_of_another_method_or_be_left_out():
  targets = (
    ("block_0/.*", None),
    ("mlp", {"rank": 16, "alpha": 4.0}),
    ("norm", {"method": "full"}),
    ("embed/embedding", {"method": "token_rows", "ids": (3, 5)}),
    "attention",
  )
  assert rules_of(targets=targets, also_train=("head/kernel",)) == [
    ("head/kernel", Full()),
    ("block_0/.*", None),
    ("mlp", LoRA(rank=16, alpha=4.0)),
    ("norm", Full()),
    ("embed/embedding", TokenRows(ids=(3, 5))),
    ("attention", LoRA(rank=8, alpha=16.0)),
  ]


def test_a_config_that_went_through_json_means_the_same():
  targets = [["mlp", {"rank": 16}], "attention"]
  assert rules_of(targets=targets)[0] == ("mlp", LoRA(rank=16, alpha=16.0))


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"dropuot": 0.1}, "the method lora has no setting dropuot; its settings are rank, alpha"),
    ({"method": "norm", "rank": 8}, "the method full has no setting rank; its settings are none"),
    ({"targets": (("mlp", {"iterations": 3}),)}, "targets 'mlp': .* has no setting iterations"),
    ({"targets": (("mlp", {"method": "dora"}),)}, "targets 'mlp': .* dora lacks rank, alpha"),
    ({"targets": (("mlp", {"method": "lroa"}),)}, "the method 'lroa' is unknown; use one of lora"),
    ({"targets": (("mlp", {"method": "adalora"}),)}, "targets 'mlp': adalora is for a whole run"),
    ({"method": "adalora", "targets": (("mlp", {"every": 3}),)}, "has no setting every"),
  ],
)
def test_a_setting_that_would_be_ignored_is_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    rules_of(**fields)


def test_a_method_changed_on_the_command_line_must_fit_the_settings():
  config = quickstart.get_config()
  config.adapter.method = "dora"
  with pytest.raises(ValueError, match=r"dora has no setting dropout, train_a; .* constant_norm"):
    methods.rules_of(config.adapter)
  config.adapter.method = "adalora"
  with pytest.raises(ValueError, match="adapter: adalora lacks the settings target_rank"):
    methods.rules_of(config.adapter)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("method=lroa", "the method 'lroa' is unknown; there are lora, rslora"),
    ("method=norm,rank=4", "the method norm has no rank, and rank=4 was asked for"),
    ("methods=dora", "no argument 'methods'"),
  ],
)
def test_an_argument_that_means_nothing_is_refused(text, words):
  with pytest.raises(ValueError, match=words):
    quickstart.get_config(text)


def test_every_setting_of_a_method_stands_in_its_config():
  for name, method in presets.METHODS.items():
    spec = methods.SPECS[method.settings["method"]]
    fields = {field.name for field in dataclasses.fields(spec)} - {"initializer"}
    assert fields <= method.settings.keys(), name


# ---- every method in training


@pytest.fixture(scope="module")
def tiny():
  """(model, params, axes) of a Llama with scanned layers; what is compiled is not optimised."""
  config = llama.LlamaConfig(
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=16,
    tie_embeddings=True,
    scan_layers=True,
  )
  model = llama.Llama(config)
  params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params)
  jax.config.update("jax_disable_most_optimizations", True)
  yield model, params, parts.trace_axes(model, params)
  jax.config.update("jax_disable_most_optimizations", False)


def batch_of(seed):
  tokens = np.random.default_rng(seed).integers(0, 40, (4, 8)).astype(np.int32)
  return {
    "tokens": tokens,
    "at": np.full((4, 1), 5, np.int32),
    "targets": tokens[:, :1] % 2,
    "weights": np.ones((4, 1), np.float32),
  }


def run_of(name, tiny):
  """(state, frozen, train_step, the adapters at their start) as the main program makes them."""
  model, params, axes = tiny
  config = quickstart.get_config(f"method={name},smoke")
  config.adapter.update({key: 4 for key in ("rank", "target_rank") if key in config.adapter})
  tx, _ = methods.make_optimizer(config)
  specs = lora_jax.match(params, methods.rules_of(config.adapter), axes)
  task = parts.make_task(config)
  base, adapters = methods.start(
    config.adapter,
    jax.random.key(0),
    params,
    specs,
    axes,
    task.run(model.apply),
    task.mask,
    [batch_of(n) for n in range(8)],
  )
  weights = lora_jax.attach(base, adapters)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  apply = lora_jax.adapt(model.apply, strict=True)
  train_step = methods.make_train_step(config, task, apply, tx, adapters)
  return step.init_state(trainable, tx), frozen, train_step, adapters


# Those that start, train or choose their leaves in a way of their own; the rest, which differ in
# their Weight alone, are slow here and quick in the tests of the adapters.
EVERYDAY = ("lora", "eva", "adalora")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow)
    for name in presets.METHODS
    if name != "bias"
  ],
)
def test_every_method_starts_as_the_base_and_learns(name, tiny):
  _, params, _ = tiny
  state, frozen, train_step, adapters = run_of(name, tiny)
  if name != "loftq":  # whose base is another
    assert_close(lora_jax.merge(params, adapters), params)
  losses = []
  for _ in range(4):
    state, metrics = train_step(state, frozen, batch_of(0))
    assert metrics["finite"]
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]


def test_eva_starts_from_the_inputs_of_real_tokens_alone(tiny):
  batch = batch_of(0)
  batch["weights"][3] = 0
  np.testing.assert_array_equal(
    parts.make_task(quickstart.get_config()).mask(batch),
    np.array([[True] * 6 + [False] * 2] * 3 + [[False] * 8]),
  )


@pytest.mark.slow
def test_loftq_makes_a_base_whose_adapters_make_up_for_a_part_of_what_it_lost(tiny):
  _, params, axes = tiny
  state, frozen, _, adapters = run_of("loftq", tiny)
  started = tree.flatten(lora_jax.materialize(lora_jax.join(state.trainable, frozen)))
  formats = lora_jax.match(params, [("all-linear", compress.NF4)], axes)
  rounded = tree.flatten(lora_jax.materialize(compress.quantize(params, formats, axes)))
  dense = tree.flatten(params)
  assert adapters.keys() == formats.keys()
  for path in formats:
    lost, lost_by_rounding = (jnp.linalg.norm(x[path] - dense[path]) for x in (started, rounded))
    assert lost < 0.95 * lost_by_rounding


def test_a_format_that_is_none_is_refused(tiny, monkeypatch):
  monkeypatch.setitem(presets.METHODS["loftq"].settings, "format", "nf5")
  with pytest.raises(ValueError, match=r"adapter\.format 'nf5' is unknown; use one of nf4, int4"):
    run_of("loftq", tiny)


def test_loftq_of_a_base_that_is_quantised_already_is_refused(tiny):
  model, params, axes = tiny
  formats = lora_jax.match(params, [("all-linear", compress.NF4)], axes)
  with pytest.raises(ValueError, match="attn/key/kernel: is quantized or compressed already"):
    run_of("loftq", (model, compress.quantize(params, formats, axes), axes))


def test_a_model_without_biases_says_so(tiny):
  with pytest.raises(ValueError, match="the preset 'bias' matches no leaf"):
    run_of("bias", tiny)


@pytest.mark.slow
def test_lora_plus_trains_b_at_a_multiple_of_the_rate(tiny):
  """At the first update of Adam every number moves by the rate."""
  rates = {}
  for name in ("lora", "lora_plus"):
    state, frozen, train_step, _ = run_of(name, tiny)
    state, _ = train_step(state, frozen, batch_of(0))
    moved = jax.tree.map(lambda x: float(jnp.abs(x).max()), state.trainable)
    rates[name] = moved["blocks"]["mlp"]["up"]["kernel"].b
  peak = {name: presets.METHODS[name].peak for name in rates}
  expected = 16 * peak["lora_plus"] / peak["lora"]
  np.testing.assert_allclose(rates["lora_plus"] / rates["lora"], expected, rtol=1e-3)
