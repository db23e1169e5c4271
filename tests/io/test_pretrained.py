"""Loading folders that transformers wrote, and folders and files that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch, torch_files
from tiny_llama import ROPE, TOKENS, write_tiny

from lora_jax.io import gguf, pretrained
from lora_jax.models import llama


def assert_logits_agree(loaded, model, atol):
  apply = jax.jit(llama.Llama(loaded.config).apply)
  ours = apply({"params": loaded.params}, jnp.asarray(TOKENS))
  with torch.no_grad():
    theirs = model(torch.tensor(TOKENS)).logits
  np.testing.assert_allclose(ours, theirs.float().numpy(), atol=atol, rtol=1e-4)


@pytest.fixture
def tiny(tmp_path, smollm2):
  folder = tmp_path / "tiny"
  write_tiny(folder, smollm2.tokenizer)
  return folder


@pytest.mark.parametrize(
  "changes",
  [
    {"rope_parameters": ROPE},
    {"tie_word_embeddings": True, "head_dim": 8},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    {"max_shard_size": "1MB"},
  ],
)
def test_a_folder_of_transformers_gives_its_logits(tmp_path, smollm2, changes):
  model = write_tiny(tmp_path, smollm2.tokenizer, **changes)
  assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in changes)
  loaded = pretrained.load(tmp_path)
  assert_logits_agree(loaded, model, atol=1e-4)
  assert loaded.tokenizer.encode("Hello world") == [19556, 905]
  assert loaded.source == str(tmp_path)


def test_scanned_layers_with_rematerialisation_give_the_same_logits(tmp_path, smollm2):
  model = write_tiny(tmp_path, smollm2.tokenizer)
  policy = jax.checkpoint_policies.nothing_saveable
  loaded = pretrained.load(tmp_path, scan_layers=True, remat_policy=policy)
  assert loaded.config.remat_policy is policy
  assert loaded.params["blocks"]["attn"]["query"]["kernel"].shape == (2, 16, 16)
  assert_logits_agree(loaded, model, atol=1e-4)


def test_bfloat16_files_are_loaded_exactly_in_either_dtype(tmp_path, smollm2):
  model = write_tiny(tmp_path, smollm2.tokenizer, dtype=torch.bfloat16)
  loaded = pretrained.load(tmp_path)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
  assert_logits_agree(loaded, model.float(), atol=1e-4)
  half = pretrained.load(tmp_path, dtype=jnp.bfloat16)
  assert half.config.dtype == half.config.param_dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, half.params, loaded.params)


def test_a_second_copy_of_a_tied_embedding_is_accepted_and_another_head_is_not(tmp_path, smollm2):
  write_tiny(tmp_path, smollm2.tokenizer, tie_word_embeddings=True)
  path = tmp_path / "model.safetensors"
  tensors = torch_files.load_file(path)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
  torch_files.save_file(tensors, path)
  assert "head" not in pretrained.load(tmp_path).params
  tensors["lm_head.weight"] += 1
  torch_files.save_file(tensors, path)
  with pytest.raises(ValueError, match=r"ties the embeddings, yet lm_head.weight differs"):
    pretrained.load(tmp_path)


def change_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model_type": "gptj"}, r"config.json: model_type 'gptj' is not supported"),
    (
      {"num_hidden_layers": 1},
      r"tiny: the tensors do not fit the model\n  unexpected .*: model.layers.1.input_layernorm",
    ),
    ({"num_hidden_layers": 3}, r"missing: block_2/attn/key/kernel"),
    ({"num_hidden_layers": 1000}, r"says 1000 layers, there are only 21 tensors"),
    ({"num_hidden_layers": 10**9}, r"config.json: .* num_layers 1000000000 is over the limit of"),
    ({"hidden_size": 2**31}, r"config.json: .* width 2147483648 is over the limit of 1,048,576"),
    ({"head_dim": 10**9}, r"config.json: .* head_dim 1000000000 is over the limit of 16,384"),
    ({"vocab_size": 1 << 24}, r"lm_head.weight -> .*, the configuration says \(16, 16777216\)"),
    ({"tie_word_embeddings": True}, r"ties the embeddings, yet lm_head.weight differs"),
    (
      {"intermediate_size": 32},
      r"mlp.down_proj.weight -> block_0/mlp/down/kernel: shape \(24, 16\), the config.* \(32, 16\)",
    ),
    ({"vocab_size": 100}, r"the tokenizer has ids up to 49151, the embedding only 100 rows"),
  ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(tiny, changes, words):
  change_config(tiny, **changes)
  with pytest.raises(ValueError, match=words):
    pretrained.load(tiny)


@pytest.mark.parametrize("text", ["{", "[1, 2]", ""])
def test_a_config_that_is_no_json_object_is_refused(tiny, text):
  (tiny / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config.json: "):
    pretrained.load(tiny)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tiny, name):
  (tiny / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    pretrained.load(tiny)


def test_a_truncated_safetensors_file_is_refused_by_name(tiny):
  path = tiny / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
    pretrained.load(tiny)


def test_weights_that_are_not_finite_are_refused_by_name(tiny):
  path = tiny / "model.safetensors"
  tensors = torch_files.load_file(path)
  tensors["model.norm.weight"][3] = float("nan")
  torch_files.save_file(tensors, path)
  with pytest.raises(
    ValueError, match=r"model.norm.weight -> norm/scale: holds values that are no"
  ):
    pretrained.load(tiny)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_model_is_inspected_without_its_tensors(tmp_path, smollm2, scan_layers):
  write_tiny(tmp_path, smollm2.tokenizer)
  options = {"dtype": jnp.bfloat16, "scan_layers": scan_layers}
  loaded = pretrained.load(tmp_path, **options)
  (tmp_path / "model.safetensors").unlink()
  inspected = pretrained.inspect(tmp_path, **options)
  assert inspected.config == loaded.config
  assert jax.tree.map(lambda x: (x.shape, x.dtype), inspected.params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), loaded.params
  )
  assert {type(leaf) for leaf in jax.tree.leaves(inspected.params)} == {jax.ShapeDtypeStruct}
  assert inspected.tokenizer.encode("Hello world") == [19556, 905]


def test_a_gguf_file_is_inspected_by_its_header(smollm2, monkeypatch):
  def load(tensor):
    raise AssertionError(f"{tensor.name} is read")

  monkeypatch.setattr(gguf.GGUFTensor, "load", load)
  inspected = pretrained.inspect(pretrained.DEFAULT)
  assert inspected.config == smollm2.config
  assert jax.tree.map(jnp.shape, inspected.params) == jax.tree.map(jnp.shape, smollm2.params)
