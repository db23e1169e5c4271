"""Loading GGUF files: small ones made from a model of transformers, and damaged ones."""

import random
import weakref

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch, transformers
from tokenizers import pre_tokenizers

from lora_jax import families
from lora_jax.io import configs, names, pretrained
from lora_jax.models import llama
from lora_jax.weights import GGUFBlocks, is_weight, materialize

ROPE = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
VOCABULARY = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]
TOKENS = [[5, 90, 17, 3, 3, 250, 0, 64, 2, 11, 40, 8]]


@pytest.fixture(scope="module")
def model():
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=65536,
    rope_parameters=ROPE,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  return model


def in_pairs(kernel: np.ndarray, heads: int) -> np.ndarray:
  """The order of rows that llama.cpp's converter gives queries and keys."""
  rows, columns = kernel.shape
  return kernel.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, fallback=None, others=None):
  """With matrices of a kind, of `fallback` where their rows are no blocks; `others` by name."""
  config = model.config
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_vocab_size(config.vocab_size)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(ROPE["rope_theta"])
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(VOCABULARY)
  writer.add_token_types([3] + [1] * (len(VOCABULARY) - 1))
  writer.add_token_merges(MERGES)
  writer.add_eos_token_id(0)

  tensors = model.state_dict()
  shapes = families.param_shapes(configs.from_hugging_face(config.to_dict()))
  paths = names.assign(tensors, names.LLAMA_HF, shapes)
  theirs = names.file_names(shapes, names.LLAMA_GGUF)
  for name, path_in_model in paths.items():
    array = tensors[name].numpy()
    if "q_proj" in name:
      array = in_pairs(array, config.num_attention_heads)
    if "k_proj" in name:
      array = in_pairs(array, config.num_key_value_heads)
    used = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
    used = (others or {}).get(theirs[path_in_model], used)
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[used][0]:
      used = fallback
    data = gguf.quants.quantize(np.ascontiguousarray(array), used)
    writer.add_tensor(theirs[path_in_model], data, raw_dtype=used)
  scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
  divisors = ROPE["rope_theta"] ** -(np.arange(0, 16, 2) / 16) / scaled
  writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_an_untied_head_and_scaled_rotations_give_the_logits_of_transformers(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model)
  loaded = pretrained.load(path)
  assert loaded.config.rope_scaling == llama.Llama3Rope(factor=8.0)
  assert not loaded.config.tie_embeddings
  ours = jax.jit(llama.Llama(loaded.config).apply)({"params": loaded.params}, jnp.asarray(TOKENS))
  with torch.no_grad():
    theirs = model(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_quantised_kernels_are_near_the_ones_they_were_made_from(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model, gguf.GGMLQuantizationType.BF16)
  found = pretrained.load(path).params["block_1"]["attn"]["key"]["kernel"]
  original = model.model.layers[1].self_attn.k_proj.weight.detach().numpy().T
  np.testing.assert_allclose(found, original, rtol=2**-8)


def test_the_vocabulary_in_the_file_makes_the_tokenizer(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model)
  tokenizer = pretrained.load(path).tokenizer
  ab, space_ab = (VOCABULARY.index(token) for token in ("ab", "Ġab"))
  assert tokenizer.encode("ab ab<|end|>") == [ab, space_ab, 0]
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 0, 0)


@pytest.mark.timeout(120)
def test_a_damaged_file_loads_or_is_refused_with_a_value_error(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model)
  data = path.read_bytes()
  header = data.index(b"rope_freqs.weight") + 64
  rng = random.Random(0)
  refused = 0
  for _ in range(150):
    changed = bytearray(data)
    changed[rng.randrange(header)] = rng.randrange(256)
    path.write_bytes(changed)
    try:
      pretrained.load(path)
    except ValueError as error:
      assert str(path) in str(error)
      refused += 1
  assert 10 < refused < 150


def as_gguf_blocks(data, kind, columns, dtype):
  return GGUFBlocks.of(data, kind, columns, dtype)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_blocks_that_are_kept_stand_for_what_is_dequantised(tmp_path, model, scan_layers):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model, gguf.GGMLQuantizationType.Q8_0, fallback=gguf.GGMLQuantizationType.F16)
  dense = pretrained.load(path, scan_layers=scan_layers).params
  kept = pretrained.load(path, scan_layers=scan_layers, keep_blocks=as_gguf_blocks).params
  weights = [x for x in jax.tree.leaves(kept, is_leaf=is_weight) if is_weight(x)]
  # The down projections have rows of 48 numbers, which are no blocks of 32.
  assert len(weights) == (1 + 1 + 6 if scan_layers else 1 + 1 + 6 * 2)
  jax.tree.map(np.testing.assert_array_equal, materialize(kept), dense)
  numbers = sum(np.prod(x.shape) for x in weights)
  assert sum(x.nbytes for x in weights) == numbers * 34 / 32


def test_kept_blocks_are_no_option_where_there_are_none(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model)
  with pytest.raises(ValueError, match="holds no quantized blocks to keep"):
    pretrained.load(path, keep_blocks=as_gguf_blocks)


def test_layers_of_different_kinds_are_not_stacked_in_their_blocks(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  kinds = gguf.GGMLQuantizationType
  write_gguf(
    path, model, kinds.Q8_0, fallback=kinds.F16, others={"blk.1.attn_q.weight": kinds.Q4_0}
  )
  with pytest.raises(
    ValueError, match="attn/query/kernel: its layers are of different kinds, Q4_0"
  ):
    pretrained.load(path, scan_layers=True, keep_blocks=as_gguf_blocks)
  kept = pretrained.load(path, keep_blocks=as_gguf_blocks).params
  assert kept["block_1"]["attn"]["query"]["kernel"].kind == "Q4_0"


def test_each_parameter_is_handed_over_before_the_next_is_loaded(tmp_path, model):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, model)
  alive = []

  def each(name, array):
    alive.append(weakref.ref(array))
    assert sum(x() is not None for x in alive) == 1
    return (name, array.shape)

  params = pretrained.load(path, each=each).params
  assert params["norm"]["scale"] == ("norm/scale", (32,))
