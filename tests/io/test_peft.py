"""Adapters in PEFT's layout, against `peft` itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import lora_jax
from lora_jax import LowRank, tree
from lora_jax.io import export, safetensors
from lora_jax.io import peft as peft_io
from lora_jax.models import llama

TOKENS = np.array([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm2):
  """(folder that transformers loads, config, params) of a random Llama with an untied head."""
  folder = tmp_path_factory.mktemp("tiny") / "model"
  config = llama.LlamaConfig(
    vocab_size=smollm2.config.vocab_size,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
  )
  params = llama.Llama(config).init(jax.random.key(0), jnp.asarray(TOKENS))["params"]
  export.save(folder, params, config, smollm2.tokenizer)
  return folder, config, params


def trained(params, rules, stacked=False):
  """Adapters as they might be after training, and the weights with them."""
  axes = None
  if stacked:
    kernel, other = lora_jax.Axes("sio", ("dot_general",)), lora_jax.Axes("", ())
    leaves = tree.flatten(params)
    axes = {path: kernel if leaf.ndim == 3 else other for path, leaf in leaves.items()}
  specs = lora_jax.match(params, rules, axes)
  adapters = lora_jax.init(jax.random.key(1), params, specs, axes)
  adapters = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapters
  )
  return adapters, lora_jax.attach(params, adapters)


def our_logits(config, weights):
  apply = lora_jax.adapt(llama.Llama(config).apply, strict=True)
  return np.asarray(apply({"params": weights}, jnp.asarray(TOKENS)))


def peft_logits(folder, adapter):
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  model = peft.PeftModel.from_pretrained(base, adapter)
  loading = model.load_adapter(adapter, "again")
  assert not loading.unexpected_keys
  assert not [key for key in loading.missing_keys if "lora" in key]
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


RULES = {
  "one_rank": [("all-linear", lora_jax.LoRA(rank=4, alpha=6.0))],
  "patterns_of_rank_and_alpha": [
    (r"block_1/attn/(query|key)/kernel", lora_jax.LoRA(rank=2, alpha=10.0)),
    ("mlp", lora_jax.LoRA(rank=3, alpha=3.0, rslora=True)),
    (r"head/kernel", lora_jax.LoRA(rank=5, alpha=1.0)),
  ],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_an_adapter_written_here_gives_the_same_logits_in_peft(tiny, tmp_path, rules):
  folder, config, params = tiny
  adapters, weights = trained(params, rules)
  peft_io.save(tmp_path / "adapter", adapters, full={}, base_model="tiny")
  np.testing.assert_allclose(
    peft_logits(folder, tmp_path / "adapter"), our_logits(config, weights), atol=1e-4
  )


def test_stacked_layers_are_written_as_modules_and_read_back_stacked(tiny, tmp_path):
  folder, config, params = tiny
  stacked = llama.stack_layers(params)
  adapters, weights = trained(stacked, RULES["one_rank"], stacked=True)
  peft_io.save(tmp_path / "adapter", adapters, full={}, base_model="tiny")
  scanned = dataclasses.replace(config, scan_layers=True)
  np.testing.assert_allclose(
    peft_logits(folder, tmp_path / "adapter"), our_logits(scanned, weights), atol=1e-4
  )
  loaded = peft_io.load(tmp_path / "adapter", tree.flatten(stacked))
  for path, adapter in adapters.items():
    np.testing.assert_array_equal(loaded.factors[path].a, adapter.a)
    np.testing.assert_array_equal(loaded.factors[path].b, adapter.b)
    assert loaded.factors[path].scale == adapter.scale


def test_leaves_trained_in_full_travel_as_modules_to_save(tiny, tmp_path):
  folder, config, params = tiny
  full = {
    "norm/scale": params["norm"]["scale"] * 1.5,
    "head/kernel": params["head"]["kernel"] * 0.5,
    "block_1/mlp_norm/scale": params["block_1"]["mlp_norm"]["scale"] + 1,
  }
  adapters, _ = trained(params, RULES["one_rank"])
  weights = lora_jax.attach(tree.replace(params, full), adapters)
  peft_io.save(tmp_path / "adapter", adapters, full=full, base_model="tiny")
  np.testing.assert_allclose(
    peft_logits(folder, tmp_path / "adapter"), our_logits(config, weights), atol=1e-4
  )
  loaded = peft_io.load(tmp_path / "adapter", tree.flatten(params))
  assert loaded.full.keys() == full.keys()
  for path, leaf in full.items():
    np.testing.assert_array_equal(loaded.full[path], leaf)


@pytest.mark.parametrize(
  "options",
  [
    {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
      "r": 4,
      "lora_alpha": 8,
      "target_modules": ["q_proj", "v_proj"],
      "rank_pattern": {"layers.1.self_attn.v_proj": 2},
      "alpha_pattern": {"q_proj": 3},
      "modules_to_save": ["lm_head"],
    },
  ],
  ids=["all_linear", "rslora", "patterns"],
)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(tiny, tmp_path, options):
  folder, config, params = tiny
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options))
  with torch.no_grad():
    expected = model(torch.tensor(TOKENS)).logits.numpy()
  model.save_pretrained(tmp_path)
  loaded = peft_io.load(tmp_path, tree.flatten(params))
  adapters = {
    path: LowRank(None, a=jnp.asarray(f.a), b=jnp.asarray(f.b), scale=f.scale, roles="io")
    for path, f in loaded.factors.items()
  }
  weights = lora_jax.attach(tree.replace(params, loaded.full), adapters)
  np.testing.assert_allclose(our_logits(config, weights), expected, atol=1e-4)


@pytest.fixture
def written(tiny, tmp_path):
  _, _, params = tiny
  adapters, _ = trained(params, RULES["one_rank"])
  peft_io.save(tmp_path / "adapter", adapters, full={}, base_model="tiny")
  return tmp_path / "adapter", tree.flatten(params)


def edit_config(folder, **fields):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"r": 8}, "not .rank, in. and .out, rank. of the rank 8"),
    ({"r": 0}, "r at least 1"),
    ({"use_dora": True}, "use_dora=True is not read"),
    ({"peft_type": "LOHA"}, "'LOHA'"),
  ],
)
def test_a_config_that_is_not_of_the_tensors_or_of_another_method_is_refused(
  written, fields, words
):
  folder, paths = written
  edit_config(folder, **fields)
  with pytest.raises(ValueError, match=words):
    peft_io.load(folder, paths)


def test_damaged_and_missing_files_are_named(written, tmp_path):
  folder, paths = written
  tensors = folder / "adapter_model.safetensors"
  content = tensors.read_bytes()
  tensors.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match=r"adapter_model.safetensors: not a whole safetensors file"):
    peft_io.load(folder, paths)
  tensors.unlink()
  with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file"):
    peft_io.load(folder, paths)
  (folder / "adapter_config.json").write_text("{")
  with pytest.raises(ValueError, match="not a LoRA adapter's config"):
    peft_io.load(folder, paths)
  with pytest.raises(FileNotFoundError, match="an adapter's folder holds"):
    peft_io.load(tmp_path / "nothing", paths)


def test_tensors_that_fit_nothing_are_listed(written):
  folder, paths = written
  file = folder / "adapter_model.safetensors"
  tensors = safetensors.load_file(file)
  name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
  strange = {"base_model.model.visual.proj.lora_A.weight": tensors.pop(name)}
  safetensors.save_file(tensors | strange, file)
  with pytest.raises(
    ValueError, match=r"2 tensors fit nothing.*q_proj.lora_A.*visual.proj"
  ) as error:
    peft_io.load(folder, paths)
  assert "it has no lora_B" in str(error.value)


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
  adapter = LowRank(None, a=jnp.ones((4, 2)), b=jnp.ones((2, 3, 5)), scale=1.0, roles="ioo")
  with pytest.raises(ValueError, match="not the factors of a linear layer"):
    peft_io.save(tmp_path / "x", {"block_0/attn/query/kernel": adapter}, full={}, base_model="")
  with pytest.raises(ValueError, match="no adapter to save"):
    peft_io.save(tmp_path / "x", {}, full={}, base_model="")
  (tmp_path / "notes.txt").write_text("mine")
  adapter = LowRank(None, a=jnp.ones((4, 2)), b=jnp.ones((2, 3)), scale=1.0, roles="io")
  with pytest.raises(FileExistsError, match="holds something that is no adapter"):
    peft_io.save(tmp_path, {"block_0/attn/query/kernel": adapter}, full={}, base_model="")
  assert (tmp_path / "notes.txt").read_text() == "mine"
