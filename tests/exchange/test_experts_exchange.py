"""Adapters of stacks of experts and of routers, from and to peft's `target_parameters`."""

import dataclasses
import functools
import json

import families
import jax
import numpy as np
import pytest
from peers import peft
from torch_models import Twins, in_peft, made_by_peft, shaken

import lora_jax
from lora_jax import exchange
from lora_jax.io import configs, names, pretrained, safetensors
from lora_jax.models import llama

TOKENS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
LORA = lora_jax.LoRA(rank=3, alpha=2.0)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
  """The two models by the kind's name, layers apart or stacked."""

  @functools.cache
  def make(name="Qwen 3, experts", scan=False):
    folder = tmp_path_factory.mktemp("family")
    families.write(folder, name)
    found = pretrained.load(folder, scan_layers=scan)
    model = llama.Llama(found.config)
    return Twins(
      functools.partial(families.make, name),
      found.params,
      lambda params, tokens: model.apply({"params": params}, tokens),
      TOKENS,
      {"table": names.HUGGING_FACE[found.config.family]},
    )

  return make


def made(model, rules):
  specs = lora_jax.match(model.params, rules, model.axes)
  return shaken(model.params, lora_jax.init(jax.random.key(1), model.params, specs, model.axes))


STACKED = pytest.param(True, marks=pytest.mark.slow, id="layers stacked")


@pytest.mark.parametrize("name", ["Qwen 3, experts", "gpt-oss"])
@pytest.mark.parametrize("scan", [pytest.param(False, id="layers apart"), STACKED])
@pytest.mark.parametrize(
  ("parameters", "options"),
  [
    (BOTH, {}),
    (BOTH[:1], {"target_modules": ["q_proj", "o_proj"]}),
    (BOTH[1:], {"use_rslora": True}),
    (
      [*BOTH, "mlp.gate.weight"],
      {
        "rank_pattern": {r".*\.gate_up_proj": 5, "down_proj": 1},
        "alpha_pattern": {"layers.1.mlp.experts.down_proj": 7, "(gate|router).weight": 0.5},
      },
    ),
  ],
  ids=["both", "one, with attention", "the other, stabilised", "with the router, by patterns"],
)
def test_an_adapter_of_peft_on_parameters_is_read(twins, tmp_path, parameters, options, scan, name):
  model = twins(name, scan)
  if name == "gpt-oss":  # which calls its router otherwise
    parameters = [x.replace("gate.weight", "router.weight") for x in parameters]
  config = peft.LoraConfig(
    **{"r": 3, "lora_alpha": 2.0, "target_modules": [], "task_type": "CAUSAL_LM"} | options,
    target_parameters=parameters,
  )
  expected = made_by_peft(model, config, tmp_path)
  adapters = model.load(tmp_path)
  stacked = [path for path in adapters if "/experts/" in path]
  assert len(stacked) == len([x for x in parameters if "experts" in x]) * (1 if scan else 2)
  assert abs(expected - model.logits({})).max() > 0.1
  np.testing.assert_allclose(model.logits(adapters), expected, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "scan"),
  [
    pytest.param("Qwen 3, experts", False, id="Qwen"),
    pytest.param("Qwen 3, experts", True, id="Qwen, layers stacked", marks=pytest.mark.slow),
    pytest.param("gpt-oss", False, id="gpt-oss", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize(
  "pattern",
  [
    [("all-linear", LORA)],
    [(".*/experts/down/kernel", LORA)],
    [(".*/experts/gate_up/kernel", LORA), ("attention", lora_jax.LoRA(rank=2, alpha=3.0))],
    [(".*/router/kernel", LORA), ("mlp", lora_jax.LoRA(rank=2, alpha=3.0))],
    [("mlp", lora_jax.PiSSA(rank=2, alpha=2.0))],
  ],
  ids=["all-linear", "down", "gate_up and attention", "router", "PiSSA"],
)
def test_an_adapter_made_here_gives_the_same_logits_in_peft_and_is_read_back(
  twins, tmp_path, pattern, name, scan
):
  model = twins(name, scan)
  adapters = made(model, pattern)
  model.save(tmp_path / "adapter", adapters)
  expected = model.logits(adapters)
  np.testing.assert_allclose(in_peft(model, tmp_path / "adapter"), expected, atol=1e-4)
  np.testing.assert_allclose(model.logits(model.load(tmp_path / "adapter")), expected, atol=1e-4)


def test_stacked_layers_of_experts_are_written_and_read(twins, tmp_path):
  model = twins(scan=True)
  adapters = made(model, [("mlp", LORA)])
  model.save(tmp_path / "adapter", adapters)
  expected = model.logits(adapters)
  np.testing.assert_allclose(in_peft(model, tmp_path / "adapter"), expected, atol=1e-4)
  np.testing.assert_allclose(model.logits(model.load(tmp_path / "adapter")), expected, atol=1e-4)


def test_experts_of_one_layer_are_adapted_alone(twins, tmp_path):
  model = twins()
  adapters = made(model, [("block_1/.*/(down|gate_up)/kernel", LORA)])
  model.save(tmp_path / "adapter", adapters)
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert config["target_modules"] == []
  assert config["target_parameters"] == [
    "model.layers.1.mlp.experts.down_proj",
    "model.layers.1.mlp.experts.gate_up_proj",
  ]
  np.testing.assert_allclose(
    in_peft(model, tmp_path / "adapter"), model.logits(adapters), atol=1e-4
  )


def test_the_factors_lie_as_peft_nests_its_wrappers(twins, tmp_path):
  model = twins()
  adapters = made(model, [("mlp", LORA)])
  model.save(tmp_path / "adapter", adapters)
  tensors = safetensors.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  assert {name: x.shape for name, x in tensors.items() if name.startswith(PREFIX)} == {
    f"{PREFIX}.base_layer.lora_A.weight": (15, 32),
    f"{PREFIX}.base_layer.lora_B.weight": (48, 15),
    f"{PREFIX}.lora_A.weight": (15, 24),
    f"{PREFIX}.lora_B.weight": (32, 15),
  }
  adapter = adapters["block_0/mlp/experts/down/kernel"]
  a = tensors[f"{PREFIX}.lora_A.weight"].reshape(5, 3, 24)
  b = tensors[f"{PREFIX}.lora_B.weight"].reshape(32, 3, 5)
  np.testing.assert_array_equal(a[4], np.asarray(adapter.a)[4].T)
  np.testing.assert_array_equal(b[..., 4], np.asarray(adapter.b)[4].T)


@pytest.fixture
def adapter(twins, tmp_path):
  """A folder with an adapter of both stacks."""
  twins().save(tmp_path / "adapter", made(twins(), [("mlp", LORA)]))
  return tmp_path / "adapter"


def rewrite(folder, fields=None, drop=(), change=None):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | (fields or {})))
  tensors = safetensors.load_file(folder / "adapter_model.safetensors")
  kept = {name: x for name, x in tensors.items() if name not in drop} | (change or {})
  safetensors.save_file(kept, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"fields": {"target_parameters": ["mlp.experts.w1"]}},
      "1 of target_parameters and their factors are not there: mlp.experts.w1",
    ),
    (
      {"drop": [f"{PREFIX}.lora_A.weight"]},
      "not there: model.layers.0.mlp.experts.lora_A.weight",
    ),
    (
      {"fields": {"target_parameters": ["mlp.experts.down_proj"]}},
      "tensors fit nothing in the model: model.layers.0.mlp.experts.base_layer.lora_A.weight",
    ),
    (
      {"fields": {"target_parameters": None}},
      "tensors fit nothing in the model: model.layers.0.mlp.experts.base_layer.lora_A.weight",
    ),
    (
      {"change": {f"{PREFIX}.lora_A.weight": np.zeros((15, 32), np.float32)}},
      r"shape \(15, 32\), where the model and the rank say \(15, 24\)",
    ),
    (
      {"fields": {"use_dora": True}},
      "PEFT has no DoRA of model.layers.0.mlp.experts.down_proj, a parameter",
    ),
  ],
)
def test_a_folder_that_does_not_fit_is_refused(twins, adapter, changes, words):
  rewrite(adapter, **changes)
  with pytest.raises(ValueError, match=words):
    twins().load(adapter)


@pytest.mark.parametrize(
  ("method", "words"),
  [
    (
      lora_jax.LoRA(rank=2, alpha=2.0, dropout=0.1),
      "PEFT has no dropout of model.layers.0.mlp.experts.down_proj, a parameter",
    ),
    (lora_jax.DoRA(rank=2, alpha=2.0), "PEFT has no DoRA of model.layers.0.mlp.experts.down_proj"),
    (lora_jax.Full(), "down/kernel: is trained in full, and PEFT saves a module whole"),
  ],
  ids=["dropout", "DoRA", "Full"],
)
def test_what_peft_cannot_do_to_experts_is_refused_before_it_is_trained(twins, method, words):
  model = twins()
  specs = lora_jax.match(model.params, [(".*/experts/down/kernel", method)], model.axes)
  adapters = lora_jax.init(jax.random.key(1), model.params, specs, model.axes)
  with pytest.raises(ValueError, match=words):
    exchange.check(adapters, model.params, model.axes, **model.settings)


def test_biases_of_experts_are_trained_in_full_and_merged_alone(twins):
  model = twins("gpt-oss")
  adapters = made(model, [("block_0/attn/.*/bias", lora_jax.Full()), ("attention", LORA)])
  exchange.check(adapters, model.params, model.axes, **model.settings)
  adapters = made(model, [("bias", lora_jax.Full()), ("attention", LORA)])
  with pytest.raises(ValueError, match="mlp/experts/down/bias: is trained in full, and PEFT saves"):
    exchange.check(adapters, model.params, model.axes, **model.settings)


def test_llama_cpp_is_given_no_factors_of_experts(twins, tmp_path):
  model = twins()
  config = configs.from_hugging_face(model.torch().config.to_dict())
  adapters = made(model, [("mlp", LORA)])
  with pytest.raises(ValueError, match="down/kernel: a GGUF file of 'qwen3moe' has no such matrix"):
    exchange.save_gguf(tmp_path / "a.gguf", adapters, model.params, model.axes, config=config)
  attention = made(model, [("attention", LORA)])
  exchange.save_gguf(tmp_path / "a.gguf", attention, model.params, model.axes, config=config)
  apart = dataclasses.replace(config.experts, normalized=False)
  unnormalized = dataclasses.replace(config, experts=apart)
  with pytest.raises(ValueError, match=r"llama.cpp's architecture 'qwen3moe' has no experts="):
    exchange.save_gguf(
      tmp_path / "b.gguf", attention, model.params, model.axes, config=unnormalized
    )
