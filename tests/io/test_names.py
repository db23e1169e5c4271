"""The name tables, on the names of real files."""

import pytest

from lora_jax import families
from lora_jax.io import gguf, names, pretrained
from lora_jax.io.assets import resolve


@pytest.fixture(scope="module")
def paths(smollm2):
  return families.param_shapes(smollm2.config)


@pytest.fixture(scope="module")
def hf_names(paths):
  return list(names.file_names(paths, names.LLAMA_HF).values())


def test_every_tensor_of_the_gguf_file_has_its_own_path(paths):
  file = gguf.read(resolve(pretrained.DEFAULT))
  found = names.assign(file.tensors, names.LLAMA_GGUF, paths)
  assert len(found) == 272
  assert set(found.values()) == set(paths)
  assert found["blk.17.ffn_down.weight"] == "block_17/mlp/down/kernel"


def test_names_and_paths_are_inverse(paths, hf_names):
  found = names.assign(hf_names, names.LLAMA_HF, paths)
  assert names.file_names(found.values(), names.LLAMA_HF) == {
    path: name for name, path in found.items()
  }


def test_paths_of_single_and_of_stacked_layers_have_hugging_face_names():
  found = names.file_names(
    ["block_3/attn/query/kernel", "blocks/mlp/down/kernel", "embed/embedding"], names.LLAMA_HF
  )
  assert list(found.values()) == [
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight",
    "model.embed_tokens.weight",
  ]


def test_a_path_without_a_name_is_refused():
  with pytest.raises(ValueError, match="block_0/attn/bias: no tensor name"):
    names.file_names(["block_0/attn/bias"], names.LLAMA_HF)


def test_what_the_configuration_says_already_is_left_out(paths, hf_names):
  frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
  found = names.assign([*hf_names, frequencies], names.LLAMA_HF, paths)
  assert frequencies not in found


def test_one_error_lists_all_that_does_not_fit(paths, hf_names):
  table = names.LLAMA_HF | {"model.embeddings.weight": "embed/embedding"}
  given = [name for name in hf_names if name != "model.norm.weight"]
  given += ["model.layers.30.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
  given += ["model.embeddings.weight", "model.layers.03.mlp.up_proj.weight"]
  with pytest.raises(ValueError) as error:
    names.assign(given, table, paths)
  assert str(error.value).splitlines() == [
    "the tensors do not fit the model",
    "  unmapped (in no row of the table): model.layers.0.self_attn.q_proj.bias, "
    "model.layers.03.mlp.up_proj.weight",
    "  unexpected (the model has no such parameter): "
    "model.layers.30.mlp.up_proj.weight -> block_30/mlp/up/kernel",
    "  missing: norm/scale",
    "  set more than once: embed/embedding by model.embed_tokens.weight and "
    "model.embeddings.weight",
  ]


def test_a_long_list_is_cut_and_counted(paths):
  with pytest.raises(ValueError, match=r"missing: block_0/attn/key/kernel, .* and 264 more"):
    names.assign([], names.LLAMA_HF, paths)
