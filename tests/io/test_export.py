"""Folders written for transformers, read by transformers."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch, transformers
from tiny_llama import ROPE, TOKENS, write_tiny

from lora_jax.io import export, pretrained
from lora_jax.models import llama


@pytest.fixture
def tiny(tmp_path, smollm2):
  folder = tmp_path / "tiny"
  write_tiny(folder, smollm2.tokenizer)
  return folder


def test_an_exported_model_gives_its_logits_in_torch(tmp_path, smollm2):
  model = write_tiny(tmp_path / "source", smollm2.tokenizer, rope_parameters=ROPE)
  loaded = pretrained.load(tmp_path / "source")
  export.save(tmp_path / "copy", loaded.params, loaded.config, loaded.tokenizer)
  copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
  theirs, ours = model.state_dict(), copy.state_dict()
  assert theirs.keys() == ours.keys()
  for name, tensor in theirs.items():
    assert torch.equal(tensor, ours[name]), name
  with torch.no_grad():
    assert torch.equal(model(torch.tensor(TOKENS)).logits, copy(torch.tensor(TOKENS)).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scanned_layers_are_exported_one_by_one_in_their_dtype(tmp_path, tiny, dtype):
  loaded = pretrained.load(tiny, dtype=jnp.dtype(dtype), scan_layers=True)
  export.save(tmp_path / "copy", loaded.params, loaded.config, loaded.tokenizer)
  copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
  assert copy.dtype == getattr(torch, dtype)
  back = pretrained.load(tmp_path / "copy", dtype=jnp.dtype(dtype), scan_layers=True)
  assert back.config == loaded.config
  jax.tree.map(np.testing.assert_array_equal, back.params, loaded.params)


@pytest.mark.slow
def test_smollm2_exported_gives_our_logits_in_torch_and_its_tokenizer(tmp_path, smollm2):
  export.save(tmp_path / "smollm2", smollm2.params, smollm2.config, smollm2.tokenizer)
  copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "smollm2")
  ids = tokenizer("The capital of France is Paris; 1969 saw  2 steps.").input_ids
  assert ids == smollm2.tokenizer.encode("The capital of France is Paris; 1969 saw  2 steps.")
  ours = jax.jit(llama.Llama(smollm2.config).apply)({"params": smollm2.params}, np.asarray([ids]))
  with torch.no_grad():
    theirs = copy(torch.tensor([ids])).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=0)
  assert copy.generation_config.eos_token_id == smollm2.tokenizer.eos_id
  shutil.rmtree(tmp_path / "smollm2")  # half a gigabyte


def test_an_export_that_cannot_be_whole_leaves_nothing(tmp_path, tiny):
  loaded = pretrained.load(tiny)

  def save(params, name="copy"):
    export.save(tmp_path / name, params, loaded.config, loaded.tokenizer)

  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes.txt").write_text("mine")
  with pytest.raises(FileExistsError, match=r"full: holds something already; name a new"):
    save(loaded.params, "full")
  with pytest.raises(TypeError, match=r"norm/scale: a ShapeDtypeStruct and not an array; merge"):
    save(loaded.params | {"norm": {"scale": jax.ShapeDtypeStruct((16,), jnp.float32)}})
  with pytest.raises(
    ValueError, match=r"norm/scale: shape \(17,\), the configuration says \(16,\)"
  ):
    save(loaded.params | {"norm": {"scale": jnp.ones(17)}})
  with pytest.raises(ValueError, match=r"missing: \['norm/scale'\], unexpected: \['bias'\]"):
    save({"bias": jnp.ones(1)} | {k: v for k, v in loaded.params.items() if k != "norm"})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "tiny"]
