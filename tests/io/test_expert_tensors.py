"""The kernels of experts in files, each a tensor of its own, and as one leaf."""

import types

import families
import gguf
import jax
import numpy as np
import pytest
from peers import torch, transformers

from lora_jax.io import expert_tensors, gguf_model, names, pretrained, safetensors
from lora_jax.io import gguf as gguf_files
from lora_jax.models import llama
from lora_jax.weights import GGUFBlocks, is_weight, materialize

OWNER = "model.layers.{}.mlp.experts"
NAME = "Qwen 3, experts"
TABLE = names.HUGGING_FACE["qwen3_moe"]
TOKENS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])


def stored(name, shape, dtype="F32"):
  values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name)
  return types.SimpleNamespace(name=name, shape=shape, dtype=dtype, load=lambda: values)


def a_file(layers=2, experts=3):
  shapes = {"gate": (4, 5), "up": (4, 5), "down": (5, 4)}
  names = {
    f"{OWNER.format(i)}.{n}.{kind}_proj.weight": shape
    for i in range(layers)
    for n in range(experts)
    for kind, shape in shapes.items()
  }
  tensors = {name: stored(name, shape) for name, shape in names.items()}
  return tensors | {"model.norm.weight": stored("model.norm.weight", (5,))}


def test_the_kernels_of_experts_are_joined_and_taken_apart_again():
  tensors = a_file()
  joined = expert_tensors.joined(tensors, "folder", TABLE)
  assert {name: tensor.shape for name, tensor in joined.items()} == {
    "model.norm.weight": (5,),
    **{f"{OWNER.format(i)}.gate_up_proj": (3, 8, 5) for i in range(2)},
    **{f"{OWNER.format(i)}.down_proj": (3, 5, 4) for i in range(2)},
  }
  whole = {name: tensor.load() for name, tensor in joined.items()}
  gate = tensors[f"{OWNER.format(1)}.2.gate_proj.weight"].load()
  np.testing.assert_array_equal(whole[f"{OWNER.format(1)}.gate_up_proj"][2, :4], gate)
  again = expert_tensors.apart(whole, TABLE)
  assert again.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(again[name], tensor.load())


def test_kernels_that_a_file_has_joined_are_left_as_they_are():
  name = f"{OWNER.format(0)}.gate_up_proj"
  tensors = {name: stored(name, (3, 8, 5))}
  assert expert_tensors.joined(tensors, "folder", TABLE) == tensors


def without(name):
  return {x: tensor for x, tensor in a_file().items() if x != name}


@pytest.mark.parametrize(
  ("tensors", "words"),
  [
    (
      without("model.layers.1.mlp.experts.1.up_proj.weight"),
      r"layers.1.mlp.experts.gate_up_proj: of 3 experts in the file, kernels are missing of the "
      "experts 1",
    ),
    (
      {x: t for x, t in a_file().items() if ".up_proj" not in x},
      "layers.0.mlp.experts.gate_up_proj: of 3 experts .* missing of the experts 0, 1, 2",
    ),
    (
      {x: t for x, t in a_file().items() if "experts.0." not in x},
      "of 2 experts in the file, kernels are missing of the experts 0",
    ),
    (
      a_file() | {"x": stored("x", ()), f"{OWNER.format(0)}.down_proj": stored("x", (3, 5, 4))},
      "layers.0.mlp.experts: holds the kernels of its experts twice",
    ),
    (
      a_file()
      | {
        f"{OWNER.format(0)}.2.up_proj.weight": stored(f"{OWNER.format(0)}.2.up_proj.weight", (4, 6))
      },
      r"experts.2.up_proj.weight: shape \(4, 6\), where the others .* have \(4, 5\)",
    ),
    (
      a_file()
      | {
        f"{OWNER.format(0)}.2.up_proj.weight": stored(
          f"{OWNER.format(0)}.2.up_proj.weight", (4, 5), "F16"
        )
      },
      "experts.2.up_proj.weight: shape .* or another dtype than",
    ),
    (
      {f"{OWNER.format(0)}.0.{x}_proj.weight": stored("x", (4,)) for x in ("gate", "up", "down")},
      r"x: shape \(4,\) is no kernel of experts",
    ),
  ],
)
def test_experts_that_lack_a_kernel_or_have_a_strange_one_are_refused(tensors, words):
  with pytest.raises(ValueError, match=words):
    expert_tensors.joined(tensors, "folder", TABLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("experts")
  families.write(folder, NAME)
  return folder


def test_both_spellings_of_a_folder_are_read_alike(folder, tmp_path):
  tensors = safetensors.load_file(folder / "model.safetensors")
  assert "model.layers.0.mlp.experts.4.up_proj.weight" in tensors
  joined = {
    name: tensor.load()
    for name, tensor in expert_tensors.joined(
      safetensors.open_folder(folder), folder, TABLE
    ).items()
  }
  assert joined["model.layers.0.mlp.experts.gate_up_proj"].shape == (5, 48, 32)
  for path in folder.iterdir():
    if path.suffix == ".json":
      (tmp_path / path.name).write_bytes(path.read_bytes())
  safetensors.save_file(joined, tmp_path / "model.safetensors")
  one, other = pretrained.load(folder), pretrained.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_layers_are_stacked_and_blocks_of_gguf_are_kept(folder, tmp_path):
  found, path = pretrained.load(folder), tmp_path / "model.gguf"
  wider = gguf_model.save(path, found.params, found.config, found.tokenizer, dtype="q8_0")
  assert wider["blk.0.ffn_gate_inp.weight"] == "float32"
  assert wider["blk.0.ffn_down_exps.weight"] == "float16"  # of rows of 24
  kinds = {name: tensor.kind.name for name, tensor in gguf_files.read(path).tensors.items()}
  assert kinds["blk.1.ffn_gate_exps.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
  dense = pretrained.load(path, scan_layers=True)
  kept = pretrained.load(path, scan_layers=True, keep_blocks=GGUFBlocks.of)
  leaf = kept.params["blocks"]["mlp"]["experts"]["gate_up"]["kernel"]
  assert is_weight(leaf) and leaf.shape == (2, 5, 32, 48)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(materialize(x), y, rtol=1e-6),
    kept.params,
    dense.params,
    is_leaf=is_weight,
  )


def test_a_gguf_file_is_named_as_llama_cpp_names_it_and_read_by_transformers(tmp_path):
  # transformers does not read how wide an expert is, and takes 768.
  torch.manual_seed(0)
  fields = families._SIZES | families.KINDS[NAME].fields | {"moe_intermediate_size": 768}
  peer = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields)).eval()
  for parameter in peer.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
  families.write_model(tmp_path / "folder", peer)
  found, path = pretrained.load(tmp_path / "folder"), tmp_path / "gguf" / "model.gguf"
  path.parent.mkdir()
  gguf_model.save(path, found.params, found.config, found.tokenizer)
  known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
  wanted = {
    known.get_name(f"model.layers.1.mlp.{x}", try_suffixes=(".weight",)) + ".weight"
    for x in ("gate", "experts.gate_proj", "experts.up_proj", "experts.down_proj")
  }
  assert wanted <= gguf_files.read(path).tensors.keys()
  again = pretrained.load(path)
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  assert again.config.experts == found.config.experts
  other = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  with torch.no_grad():
    theirs = other.eval()(torch.tensor(TOKENS)).logits.numpy()
  ours = jax.jit(llama.Llama(again.config).apply)({"params": again.params}, TOKENS)
  np.testing.assert_allclose(theirs, ours, atol=1e-4)
