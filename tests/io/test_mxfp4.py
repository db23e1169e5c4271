"""gpt-oss in MXFP4, as it is published: read as transformers dequantises it."""

import json
import types

import families
import jax
import ml_dtypes
import numpy as np
import pytest
from peers import torch, transformers

from lora_jax.io import export, mxfp4, names, pretrained, safetensors

NAME = "model.layers.0.mlp.experts.down_proj"
TABLE = names.HUGGING_FACE["gpt_oss"]
# Rows of whole blocks; of the least head that its kernels allow.
SIZES = families._SIZES | families._GPT_OSS | {"hidden_size": 64, "intermediate_size": 32}
TOKENS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])


def stored(name, array, dtype="U8"):
  return types.SimpleNamespace(name=name, shape=array.shape, dtype=dtype, load=lambda: array)


def a_pair(shape=(3, 5, 2), least=0, most=255):
  random = np.random.default_rng(0)
  blocks = random.integers(0, 256, (*shape, 16), dtype=np.uint8)
  scales = random.integers(least, most, shape, dtype=np.uint8)
  return blocks, scales


def tensors_of(blocks, scales):
  arrays = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
  return {name: stored(name, array) for name, array in arrays.items()}


PARTS = ("blocks", "scales")


def test_values_are_those_of_the_specification():
  blocks = np.zeros((1, 1, 1, 16), np.uint8)
  blocks[..., :8] = np.arange(0x10, 0x90, 0x12, dtype=np.uint8)[:8]
  blocks[..., 8:] = np.arange(0x88, 0x100, 0x11, dtype=np.uint8)[:8]
  found = mxfp4.joined(tensors_of(blocks, np.full((1, 1, 1), 129, np.uint8)), "folder", TABLE)
  positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  either = positive + [-x for x in positive]
  expected = [4 * either[x] for byte in blocks.flatten() for x in (byte & 15, byte >> 4)]
  assert found[NAME].load().flatten().tolist() == expected


def test_a_kernel_is_what_transformers_makes_of_it_to_the_bit():
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors

  # Scales of which no product is beyond bfloat16.
  blocks, scales = a_pair(most=252)
  tensor = mxfp4.joined(tensors_of(blocks, scales), "folder", TABLE)[NAME]
  theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
  found = tensor.load()
  assert tensor.shape == found.shape == (3, 64, 5) and found.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found.astype(np.float32), theirs.float().numpy())


def write(folder):
  """A model whose experts are in MXFP4; returns it as transformers loads it."""
  torch.manual_seed(0)
  model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES)).to(torch.bfloat16)
  families.write_model(folder, model)
  tensors = safetensors.load_file(folder / "model.safetensors")
  for seed, name in enumerate([x for x in tensors if x.endswith("_proj") and "experts" in x]):
    experts, inputs, outputs = tensors.pop(name).shape
    random = np.random.default_rng(seed)
    shape = (experts, outputs, inputs // 32)
    tensors[f"{name}_blocks"] = random.integers(0, 256, (*shape, 16), dtype=np.uint8)
    tensors[f"{name}_scales"] = random.integers(121, 124, shape, dtype=np.uint8)
  safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  fields = json.loads((folder / "config.json").read_text())
  unconverted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
  fields["quantization_config"] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": unconverted,
  }
  (folder / "config.json").write_text(json.dumps(fields))
  dequantized = transformers.Mxfp4Config(dequantize=True)
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=dequantized, dtype=torch.float32, attn_implementation="eager"
  ).eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mxfp4")
  return folder, write(folder)


def test_a_published_folder_is_read_as_transformers_reads_it_and_exported_dense(
  published, tmp_path
):
  folder, peer = published
  found = pretrained.load(folder)
  assert found.stored_dtype == "bfloat16"
  with torch.no_grad():
    theirs = peer(torch.tensor(TOKENS)).logits.numpy()
  apply = jax.jit(found.family.make_model(found.config).apply)
  ours = apply({"params": found.params}, TOKENS)
  assert np.std(ours) > 0.1
  np.testing.assert_allclose(ours, theirs, atol=2e-3)

  export.save(tmp_path / "dense", found.params, found.config, found.tokenizer)
  assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
  again = pretrained.load(tmp_path / "dense")
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_layers_are_stacked_as_they_are_dequantised(published):
  folder, _ = published
  dense, stacked = pretrained.load(folder), pretrained.load(folder, scan_layers=True)
  for i in range(2):
    np.testing.assert_array_equal(
      stacked.params["blocks"]["mlp"]["experts"]["gate_up"]["kernel"][i],
      dense.params[f"block_{i}"]["mlp"]["experts"]["gate_up"]["kernel"],
    )


BLOCKS, SCALES = a_pair()


@pytest.mark.parametrize(
  ("tensors", "words"),
  [
    (
      {f"{NAME}_blocks": stored("x", BLOCKS)},
      "folder: .*down_proj: is in MXFP4, and the file lacks .*down_proj_scales",
    ),
    ({f"{NAME}_scales": stored("x", SCALES)}, "the file lacks .*down_proj_blocks"),
    (
      tensors_of(BLOCKS, SCALES) | {NAME: stored(NAME, np.zeros((3, 64, 5)))},
      "is in MXFP4, and the file holds it as numbers too",
    ),
    (
      tensors_of(BLOCKS, SCALES) | {f"{NAME}_scales": stored("x", SCALES, "BF16")},
      "x: its dtype BF16 is not U8, as MXFP4 needs",
    ),
    (tensors_of(BLOCKS, SCALES[:2]), r"scales \(2, 5, 2\) are not \(experts, out, in / 32, 16\)"),
    (tensors_of(BLOCKS[..., :8], SCALES), r"blocks \(3, 5, 2, 8\) and scales"),
    (tensors_of(BLOCKS[0], SCALES[0]), r"blocks \(5, 2, 16\) and scales"),
  ],
)
def test_blocks_and_scales_that_do_not_go_together_are_refused(tensors, words):
  with pytest.raises(ValueError, match=words):
    mxfp4.joined(tensors, "folder", TABLE)


def test_scales_that_are_no_numbers_are_refused_and_values_beyond_any_dtype():
  broken = SCALES.copy()
  broken[1, 2, 0] = 255
  with pytest.raises(ValueError, match="down_proj_scales: holds scales that are no numbers"):
    mxfp4.joined(tensors_of(BLOCKS, broken), "folder", TABLE)[NAME].load()
  huge = mxfp4.joined(tensors_of(*a_pair(least=254)), "folder", TABLE)[NAME].load()
  assert not np.isfinite(huge.astype(np.float32)).all()  # which whoever loads it looks for


def test_a_kernel_of_another_size_than_the_configuration_says_is_refused(published, tmp_path):
  folder, _ = published
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  tensors = safetensors.load_file(tmp_path / "model.safetensors")
  for part in PARTS:
    tensors[f"{NAME}_{part}"] = tensors[f"{NAME}_{part}"][:, :-1]
  safetensors.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"down_proj -> block_0.*: shape \(5, 32, 63\), the config"):
    pretrained.load(tmp_path)
