"""Configurations as files write them, and what is refused in them."""

import dataclasses

import numpy as np
import pytest
from peers import transformers

from lora_jax.io import configs, gguf, gguf_configs, pretrained
from lora_jax.io.assets import resolve
from lora_jax.models import llama, rope

LLAMA_3 = {
  "rope_type": "llama3",
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
OLD = {  # as the hub has it for meta-llama/Llama-3.2-1B, written by transformers 4
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 128000,
  "eos_token_id": 128001,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": LLAMA_3,
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "vocab_size": 128256,
}
LLAMA_3_2_1B = llama.LlamaConfig(
  vocab_size=128256,
  width=2048,
  mlp_width=8192,
  num_layers=16,
  num_heads=32,
  num_kv_heads=8,
  head_dim=64,
  max_length=131072,
  rope_theta=500000.0,
  rope_scaling=llama.Llama3Rope(factor=32.0),
  norm_eps=1e-5,
  tie_embeddings=True,
)


@pytest.fixture(scope="module")
def metadata():
  return gguf.read(resolve(pretrained.DEFAULT)).metadata


def from_gguf(metadata, rope_factors_R=None):
  factors = {} if rope_factors_R is None else {"rope_freqs.weight": rope_factors_R}
  return gguf_configs.from_gguf(metadata, tie_embeddings=True, rope_factors=factors)


def test_a_config_of_transformers_4_and_of_5_are_read_alike():
  assert configs.from_hugging_face(OLD) == LLAMA_3_2_1B
  new = transformers.LlamaConfig(**OLD).to_dict()
  assert "rope_theta" not in new
  assert configs.from_hugging_face(new) == LLAMA_3_2_1B


@pytest.mark.parametrize(
  "scaling",
  [
    None,
    llama.LinearRope(factor=2.0),
    llama.Llama3Rope(factor=8.0, original_length=512),
    llama.DynamicRope(factor=2.0, original_length=131072),
    llama.YarnRope(factor=4.0, original_length=512, attention_factor=1.2, beta_fast=8.0),
    llama.YarnRope(factor=4.0, original_length=512, attention_factor=0.5, truncate=False),
    llama.LongRope(
      short_factors=(1.5,) * 32, long_factors=(4.0,) * 32, original_length=8192,
      attention_factor=1.1,
    ),
  ],
)  # fmt: skip
def test_what_is_written_is_read_back_by_us_and_by_transformers(scaling):
  config = dataclasses.replace(LLAMA_3_2_1B, rope_scaling=scaling)
  fields = configs.to_hugging_face(config)
  assert configs.from_hugging_face(fields) == config
  theirs = transformers.LlamaConfig(**fields).to_dict()
  assert configs.from_hugging_face(theirs) == config


def test_absent_fields_take_transformers_defaults():
  sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
  fields = {key: OLD[key] for key in sizes | {"num_attention_heads", "model_type"}}
  theirs = transformers.LlamaConfig(**fields).to_dict()
  assert configs.from_hugging_face(fields) == configs.from_hugging_face(theirs)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"model_type": "mixtral"}, "'mixtral' is not supported; supported: 'llama', 'mistral'"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    (
      {"rope_scaling": {"rope_type": "axial"}},
      "'axial' is not supported; supported: 'default', 'l",
    ),
    (
      {"rope_scaling": {"type": "linear", "mrope_section": [1]}},
      r"'mrope_section'=\[1\] is not kn",
    ),
    (
      {"rope_parameters": {"type": "linear", "factor": 2.0}},
      "rope_scaling .* is another scaling than",
    ),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized safetensors are not supported"),
    ({"hidden_size": "2048"}, "hidden_size must be a positive integer, not '2048'"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, not 0"),
    ({"rms_norm_eps": None}, "norm_eps must be a number from 1e-30 to 0.1, not None"),
  ],
)
def test_what_the_model_does_not_do_is_refused_by_name(change, words):
  with pytest.raises(ValueError, match=words):
    configs.from_hugging_face(OLD | change)


def test_a_missing_size_is_named():
  fields = {key: value for key, value in OLD.items() if key != "hidden_size"}
  with pytest.raises(ValueError, match="lacks hidden_size"):
    configs.from_hugging_face(fields)


def test_the_gguf_metadata_gives_the_config_of_smollm2(metadata):
  assert from_gguf(metadata) == llama.LlamaConfig(
    vocab_size=49152,
    width=576,
    mlp_width=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_length=8192,
    rope_theta=100000.0,
    norm_eps=np.float32(1e-5).item(),
    tie_embeddings=True,
  )


def test_llama_3s_scaling_is_recognised_in_the_divisors_of_a_gguf_file(metadata):
  theirs = transformers.LlamaConfig(**OLD)
  scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0].numpy()
  divisors = (500000.0 ** -(np.arange(0, 64, 2) / 64) / scaled).astype(np.float32)
  fields = {**metadata, "llama.rope.freq_base": 500000.0}
  assert from_gguf(fields, divisors).rope_scaling == llama.Llama3Rope(factor=32.0)
  with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3.1's scaling"):
    from_gguf(fields, divisors**2)
  with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3.1's scaling"):
    from_gguf(fields, divisors[:-1])


def test_linear_scaling_is_read_from_gguf_metadata(metadata):
  fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
  assert from_gguf({**metadata, **fields}).rope_scaling == llama.LinearRope(factor=4.0)


@pytest.mark.parametrize("attention", [1.0, 1.5])
def test_yarn_is_written_to_gguf_metadata_and_read_from_it(attention):
  recommended = rope.yarn_attention_factor(4.0)
  scaling = llama.YarnRope(
    factor=4.0, original_length=8192, attention_factor=attention * recommended
  )
  config = dataclasses.replace(LLAMA_3_2_1B, rope_scaling=scaling)
  metadata, factors = gguf_configs.to_gguf(config)
  assert not factors
  assert metadata["llama.rope.scaling.attn_factor"] == pytest.approx(attention)
  read = from_gguf(metadata | {"general.architecture": "llama"})
  assert read.rope_scaling.attention_factor == pytest.approx(attention * recommended)
  assert dataclasses.replace(read, rope_scaling=scaling) == config


@pytest.mark.parametrize(
  "scaling",
  [
    llama.DynamicRope(factor=2.0, original_length=131072),
    llama.YarnRope(factor=4.0, original_length=512, attention_factor=1.2, beta_fast=8.0),
    llama.YarnRope(factor=4.0, original_length=512, attention_factor=1.2, truncate=False),
  ],
)
def test_a_scaling_that_llama_cpp_does_not_have_is_refused_by_name(scaling):
  config = dataclasses.replace(LLAMA_3_2_1B, rope_scaling=scaling)
  with pytest.raises(ValueError, match=f"'llama' has no {type(scaling).__name__}"):
    gguf_configs.to_gguf(config)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"general.architecture": "bert"}, "'bert' is not supported; supported: 'llama', 'qwen2"),
    ({"llama.expert_count": 8}, "expert_count=8: mixtures of experts are not supported"),
    ({"llama.rope.dimension_count": 32}, "rotating some of a head's 64 features"),
    ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported; supported: 'none', 'l"),
    ({"llama.rope.scaling.type": "yarn"}, "lacks factor"),
    (
      {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_beta_fast": 8.0},
      "rope.scaling.yarn_beta_fast=8.0 is not supported, only 32.0",
    ),
    ({"llama.attention.head_count": [9, 9]}, r"head_count must be a positive integer, not \[9, 9"),
    ({"llama.attention.head_count_kv": "3"}, "num_kv_heads must be a positive integer, not '3'"),
  ],
)
def test_what_the_model_does_not_do_is_refused_in_gguf_metadata(metadata, change, words):
  with pytest.raises(ValueError, match=words):
    from_gguf({**metadata, **change})


def test_a_missing_key_of_gguf_metadata_is_named(metadata):
  fields = {key: value for key, value in metadata.items() if "epsilon" not in key}
  with pytest.raises(ValueError, match=r"lacks llama.attention.layer_norm_rms_epsilon"):
    from_gguf(fields)
