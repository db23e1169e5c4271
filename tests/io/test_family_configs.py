"""The config.json of each family: what the hub has, what transformers makes of it, what is refused.

The files are those of transformers 4, with the fields that the released models have.
"""

import copy
import dataclasses
import pathlib
import re

import pytest
from peers import transformers

from lora_jax import families
from lora_jax.io import configs
from lora_jax.models import llama
from lora_jax.models.llama_config import locality

COMMON = {
  "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16",
  "transformers_version": "4.43.1", "use_cache": True, "rms_norm_eps": 1e-06,
  "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
QWEN_2_5 = COMMON | {  # Qwen/Qwen2.5-0.5B
  "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896,
  "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
  "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
  "num_key_value_heads": 2, "rope_theta": 1000000.0, "sliding_window": 32768,
  "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
  "vocab_size": 151936,
}  # fmt: skip
QWEN_3 = COMMON | {  # Qwen/Qwen3-0.6B
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
  "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
  "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
  "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3_MOE = COMMON | {  # Qwen/Qwen3-30B-A3B
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
  "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
  "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
  "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
  "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
  "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
  "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
  "vocab_size": 151936,
}  # fmt: skip
GPT_OSS = COMMON | {  # openai/gpt-oss-20b, but for what is quantised
  "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4,
  "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
  "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
  "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
  "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
  "num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "rope_type": "yarn", "truncate": False,
  },
  "rope_theta": 150000,
  "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
  "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
MISTRAL = COMMON | {  # mistralai/Mistral-7B-v0.1
  "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
  "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
  "vocab_size": 32000,
}  # fmt: skip
GEMMA_2 = COMMON | {  # google/gemma-2-2b
  "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
  "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
  "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
  "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
  "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
  "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096,
  "vocab_size": 256000,
}  # fmt: skip
GEMMA_3 = COMMON | {  # google/gemma-3-1b-pt
  "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
  "attn_logit_softcapping": None, "cache_implementation": "hybrid",
  "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
  "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
  "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
  "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
  "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
PHI_4_MINI = COMMON | {  # microsoft/Phi-4-mini-instruct, with factors that are all alike
  "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
  "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0,
  "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
  "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
  "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
  "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
  "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
  "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
  "vocab_size": 200064,
}  # fmt: skip
OLMO_2 = COMMON | {  # allenai/OLMo-2-1124-7B
  "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
  "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
  "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 32, "pad_token_id": 100277, "rope_scaling": None, "rope_theta": 500000,
  "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
OLMO_3 = OLMO_2 | {  # allenai/Olmo-3-1025-7B
  "architectures": ["Olmo3ForCausalLM"],
  "model_type": "olmo3",
  "max_position_embeddings": 65536,
  "rope_scaling": {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
  },
  "sliding_window": 4096,
}
SMOLLM_3 = COMMON | {  # HuggingFaceTB/SmolLM3-3B
  "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
  "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
  "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
  "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
  "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
  "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
  "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
GRANITE = COMMON | {  # ibm-granite/granite-3.1-2b-instruct
  "architectures": ["GraniteForCausalLM"], "attention_bias": False,
  "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu",
  "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
  "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
  "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
  "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 5000000.0,
  "tie_word_embeddings": True, "vocab_size": 49155,
}  # fmt: skip
MINISTRAL = MISTRAL | {
  "architectures": ["MinistralForCausalLM"],
  "head_dim": 128,
  "model_type": "ministral",
  "layer_types": ["full_attention"] + ["sliding_attention"] * 31,
  "sliding_window": 32768,
}
MINISTRAL_3 = COMMON | {  # the text model of mistralai/Ministral-3-3B-Base-2512
  "architectures": ["Ministral3ForCausalLM"], "head_dim": 128, "hidden_act": "silu",
  "hidden_size": 3072, "intermediate_size": 9216, "max_position_embeddings": 262144,
  "model_type": "ministral3", "num_attention_heads": 32, "num_hidden_layers": 26,
  "num_key_value_heads": 8,
  "rope_parameters": {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
    "max_position_embeddings": 262144, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384, "rope_theta": 1000000.0, "rope_type": "yarn",
    "type": "yarn",
  },
  "sliding_window": None, "tie_word_embeddings": True, "vocab_size": 131072,
}  # fmt: skip
ALL = {
  "Qwen2": QWEN_2_5, "Qwen3": QWEN_3, "Mistral": MISTRAL, "Gemma2": GEMMA_2,
  "Gemma3Text": GEMMA_3, "Qwen3Moe": QWEN_3_MOE, "GptOss": GPT_OSS, "Phi3": PHI_4_MINI,
  "Olmo2": OLMO_2, "Olmo3": OLMO_3, "SmolLM3": SMOLLM_3, "Granite": GRANITE,
  "Ministral": MINISTRAL, "Ministral3": MINISTRAL_3,
}  # fmt: skip


def read(fields, **changes):
  return configs.from_hugging_face(fields | changes)


def by_transformers(name, fields):
  # It changes the objects that it is given.
  return getattr(transformers, f"{name}Config")(**copy.deepcopy(fields)).to_dict()


def test_the_docs_name_every_family_that_is_read():
  page = (pathlib.Path(__file__).parents[2] / "docs" / "guide" / "models.md").read_text()
  rows = re.findall(r"^\| ([a-z0-9_, ]+) \| [^|]+ \|$", page, re.MULTILINE)
  assert sorted(", ".join(rows).split(", ")) == sorted(families.FAMILIES)


def test_qwen_2_has_biases_and_uses_its_window_only_where_it_says_so():
  config = read(QWEN_2_5)
  assert (config.family, config.qkv_bias, config.qk_norm) == ("qwen2", True, False)
  assert (config.window, config.head_dim, config.tie_embeddings) == (None, 64, True)
  config = read(QWEN_2_5, use_sliding_window=True, max_window_layers=20)
  assert config.window == 32768
  assert locality(config) == (False,) * 20 + (True,) * 4


def test_qwen_3_has_norms_of_heads_whose_size_is_its_own():
  config = read(QWEN_3)
  assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, True, 128)


def test_qwen_3_moe_has_experts_that_both_spellings_count():
  config = read(QWEN_3_MOE)
  assert (config.qk_norm, config.window, config.mlp_width) == (True, None, 6144)
  assert config.experts == llama.ExpertConfig(num_experts=128, per_token=8, width=768)
  counted = {key: value for key, value in QWEN_3_MOE.items() if key != "num_experts"}
  assert configs.from_hugging_face(counted | {"num_local_experts": 128}) == config
  assert read(QWEN_3_MOE, norm_topk_prob=False, mlp_only_layers=None).experts.normalized is False


def test_gpt_oss_has_sinks_biases_and_clamped_experts():
  config = read(GPT_OSS)
  assert config.qkv_bias and config.out_bias and config.attn_sinks
  assert config.experts == llama.ExpertConfig(
    num_experts=32, per_token=4, width=2880, clamped=True, biases=True
  )
  assert locality(config) == (True, False) * 12
  assert isinstance(config.rope_scaling, llama.YarnRope) and config.rope_scaling.factor == 32
  assert read(GPT_OSS, layer_types=None) == config
  assert read(GPT_OSS, rope_scaling=None) == config  # its scaling where none is said


def test_mistral_has_its_window_in_every_layer_and_none_where_it_is_null():
  config = read(MISTRAL)
  assert (config.window, config.local_layers) == (4096, ())
  assert read(MISTRAL, sliding_window=None).window is None


def test_gemma_2_has_a_window_in_every_other_layer_and_caps():
  config = read(GEMMA_2)
  assert (config.attn_softcap, config.logit_softcap, config.query_divisor) == (50.0, 30.0, 256)
  assert config.activation == "gelu_tanh"
  assert config.unit_offset and config.post_norms and config.scale_embeddings
  assert config.tie_embeddings
  assert locality(config) == (True, False) * 13
  assert (config.window, config.local_rope_theta) == (4096, None)


def test_gemma_3_has_a_window_in_five_of_six_layers_with_their_own_frequencies():
  config = read(GEMMA_3, rope_scaling={"rope_type": "linear", "factor": 8.0})
  assert locality(config) == ((True,) * 5 + (False,)) * 4 + (True,) * 2
  assert (config.window, config.local_rope_theta, config.rope_theta) == (512, 10000, 1000000)
  assert config.rope_scaling == llama.LinearRope(factor=8.0)
  assert config.qk_norm and config.attn_softcap is None


def test_phi_4_mini_rotates_three_quarters_of_a_head_by_two_lists_of_factors():
  config = read(PHI_4_MINI)
  assert (config.fused, config.head_dim, config.rotary_dim) == (True, 128, 96)
  found = config.rope_scaling
  assert (found.short_factors, found.long_factors) == ((1.0,) * 48, (2.0,) * 48)
  assert found.original_length == 4096
  assert found.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)  # 131072 = 2⁵ · 4096, 2¹²
  assert config.window == 262144
  old = read(PHI_4_MINI, rope_scaling=PHI_4_MINI["rope_scaling"] | {"type": "su"})
  assert old == config


def test_phi_is_written_with_the_three_fields_that_transformers_4_admits():
  config = read(PHI_4_MINI)
  assert configs.to_hugging_face(config)["rope_scaling"] == PHI_4_MINI["rope_scaling"]
  other = dataclasses.replace(
    config, rope_scaling=dataclasses.replace(config.rope_scaling, attention_factor=1.5)
  )
  fields = configs.to_hugging_face(other)
  assert fields["rope_scaling"] is None
  assert configs.from_hugging_face(by_transformers("Phi3", fields)) == other


def test_olmo_norms_what_is_added_and_all_heads_at_once():
  config = read(OLMO_2)
  assert (config.pre_norms, config.post_norms) == (False, True)
  assert config.qk_norm and config.whole_qk_norm and config.rope_theta == 500000


def test_olmo_3_scales_the_frequencies_of_the_layers_without_a_window_alone():
  config = read(OLMO_3)
  assert locality(config) == (True, True, True, False) * 8
  assert (config.local_rope_theta, config.rope_theta) == (500000, 500000)
  assert config.rope_scaling == llama.YarnRope(
    factor=8.0, original_length=8192, attention_factor=1.2079441541679836
  )


def test_smollm_3_rotates_three_of_four_layers():
  config = read(SMOLLM_3)
  assert config.rotated_layers == (True, True, True, False) * 9
  assert read(SMOLLM_3, no_rope_layers=None) == config
  windows = read(SMOLLM_3, layer_types=None, use_sliding_window=True, sliding_window=512)
  assert locality(windows) == (False, False, False, True) * 9


def test_granite_has_its_multipliers():
  config = read(GRANITE)
  assert (config.embedding_multiplier, config.residual_multiplier) == (12.0, 0.22)
  assert (config.attention_multiplier, config.logit_divisor) == (0.015625, 8.0)


def test_ministral_3_multiplies_queries_by_their_positions():
  config = read(MINISTRAL_3)
  assert (config.query_growth, config.query_length) == (0.1, 16384)
  assert config.rope_scaling == llama.YarnRope(
    factor=16.0, original_length=16384, attention_factor=1.0
  )


@pytest.mark.parametrize("name", ALL)
def test_a_config_of_transformers_4_and_of_5_are_read_alike_and_written_back(name):
  config = read(ALL[name])
  assert configs.from_hugging_face(by_transformers(name, ALL[name])) == config
  fields = configs.to_hugging_face(config)
  assert fields["model_type"] == ALL[name]["model_type"]
  assert fields["architectures"] == ALL[name]["architectures"]
  assert configs.from_hugging_face(fields) == config
  assert configs.from_hugging_face(by_transformers(name, fields)) == config


@pytest.mark.parametrize("name", ALL)
def test_absent_fields_take_transformers_defaults(name):
  sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "model_type"}
  fields = {key: ALL[name][key] for key in sizes} | {"num_attention_heads": 32}
  fields["hidden_size"] = 4096
  theirs = by_transformers(name, fields)
  assert configs.from_hugging_face(fields) == configs.from_hugging_face(theirs)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (QWEN_2_5 | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    (QWEN_2_5 | {"use_mrope": True}, "'use_mrope'=True is not known of the model_type 'qwen2'"),
    (QWEN_2_5 | {"attention_bias": True}, "'attention_bias'=True is not known"),
    (QWEN_2_5 | {"dual_chunk_attention_config": {"a": 1}}, "dual_chunk_attention_config"),
    (QWEN_2_5 | {"use_sliding_window": 1}, "use_sliding_window must be true or false, not 1"),
    (
      QWEN_2_5 | {"use_sliding_window": True, "max_window_layers": "2"},
      "max_window_layers must be an integer from 0, not '2'",
    ),
    (QWEN_3 | {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    (QWEN_3 | {"num_experts": 128}, "'num_experts'=128 is not known of the model_type 'qwen3'"),
    (QWEN_3 | {"layer_types": ["sliding_attention"] * 28}, "no sliding_window is given or used"),
    (QWEN_3_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported: every layer"),
    (QWEN_3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported, only 1"),
    (QWEN_3_MOE | {"num_local_experts": 64}, "num_experts=128 and num_local_experts=64 differ"),
    (QWEN_3_MOE | {"num_experts": "128"}, "num_experts must be a positive integer, not '128'"),
    (QWEN_3_MOE | {"num_experts_per_tok": 129}, "per_token 129 is more than the 128 experts"),
    (QWEN_3_MOE | {"norm_topk_prob": 1}, "normalized must be True or False, not 1"),
    (QWEN_3_MOE | {"shared_expert_intermediate_size": 8}, "'shared_expert_intermediate_size'=8 is"),
    (GPT_OSS | {"swiglu_limit": 6.0}, r"swiglu_limit=6.0 is not supported, only 7.0"),
    (GPT_OSS | {"attention_bias": False}, "attention_bias=False is not supported, only True"),
    (
      GPT_OSS | {"quantization_config": {"quant_method": "fp8"}},
      "quant_method 'fp8' is not supported of the model_type 'gpt_oss'",
    ),
    (
      QWEN_3_MOE | {"quantization_config": {"quant_method": "mxfp4"}},
      "quant_method 'mxfp4' is not supported of the model_type 'qwen3_moe': quantized safetensors",
    ),
    (MISTRAL | {"sliding_window": "4096"}, "window must be a positive integer, not '4096'"),
    (MISTRAL | {"layer_types": ["full_attention"] * 32}, "'layer_types'=.* is not known"),
    (GEMMA_2 | {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    (GEMMA_2 | {"layer_types": ["full_attention"]}, "layer_types must be a list of 26 layers"),
    (GEMMA_2 | {"layer_types": ["linear_attention"] * 26}, "layer_types: 'linear_attention' is"),
    (GEMMA_2 | {"use_bidirectional_attention": True}, "'use_bidirectional_attention'=True is not"),
    (GEMMA_3 | {"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer from 1"),
    (GEMMA_3 | {"rope_parameters": {"full_attention": {}, "other": {}}}, "'other' is neither"),
    (
      GEMMA_3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
      "scaled frequencies of 'sliding_attention' are not supported",
    ),
    (PHI_4_MINI | {"attention_bias": True}, "attention_bias=True is not supported"),
    (PHI_4_MINI | {"partial_rotary_factor": 2.0}, "must be a number above 0 and up to 1, not 2.0"),
    (PHI_4_MINI | {"partial_rotary_factor": 0.0}, "must be a number above 0 and up to 1, not 0.0"),
    (PHI_4_MINI | {"partial_rotary_factor": 0.5}, "short_factors has 48 numbers, and heads of 64"),
    (PHI_4_MINI | {"original_max_position_embeddings": "a"}, "must be a positive integer, not 'a'"),
    (
      PHI_4_MINI | {"rope_scaling": {"type": "longrope", "short_factor": 1.0}},
      "short_factor must be a list of numbers, not 1.0",
    ),
    (OLMO_2 | {"clip_qkv": 8.0}, "'clip_qkv'=8.0 is not known of the model_type 'olmo2'"),
    (OLMO_3 | {"rope_parameters": {"rope_theta": 5e5}}, "has neither 'sliding_attention' nor"),
    (
      OLMO_3 | {"rope_scaling": OLMO_3["rope_scaling"] | {"truncate": False}},
      "truncate is not read by transformers where layers have",
    ),
    (SMOLLM_3 | {"no_rope_layers": [1, 0]}, "must be a list of 0 or 1 for 36 layers"),
    (SMOLLM_3 | {"no_rope_layers": [2] * 36}, "must be a list of 0 or 1 for 36 layers"),
    (GRANITE | {"residual_multiplier": 0}, "residual_multiplier must be a number from 1e-06"),
    (GRANITE | {"logits_scaling": "8"}, "logit_divisor must be a number from 1e-06"),
    (MINISTRAL_3 | {"rope_parameters": {"rope_type": "default"}}, "lacks llama_4_scaling_beta"),
    (MISTRAL | {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "beta'=0.1 is not known"),
    ({"model_type": "gemma4_text"}, "'gemma4_text' is not supported"),
    ({"model_type": "gemma3"}, "'gemma3' is not supported; supported: 'llama', 'mistral', 'qwen2'"),
    ({"model_type": ["qwen2"]}, r"model_type \['qwen2'\] is not supported"),
  ],
)
def test_what_a_family_does_not_do_is_refused_by_name(fields, words):
  with pytest.raises(ValueError, match=words):
    configs.from_hugging_face(fields)


@pytest.mark.parametrize(
  ("fields", "change", "words"),
  [
    (MISTRAL, {"qk_norm": True}, "of the family 'mistral' has no field for qk_norm=True"),
    (MISTRAL, {"family": "llama"}, "of the family 'llama' has no field for window=4096"),
    (QWEN_2_5, {"qkv_bias": False}, "of the family 'qwen2' has no field for qkv_bias=False"),
    (GEMMA_2, {"local_rope_theta": 5.0}, "has no field for local_rope_theta=5.0"),
    (QWEN_3, {"family": "qwen4"}, "family 'qwen4' is not one of llama, mistral"),
  ],
)
def test_what_a_familys_config_has_no_field_for_is_not_written(fields, change, words):
  config = dataclasses.replace(read(fields), **change)
  with pytest.raises(ValueError, match=words):
    configs.to_hugging_face(config)


@pytest.mark.parametrize("name", ALL)
def test_any_value_of_a_field_makes_a_config_or_a_value_error_that_is_short(name):
  odd = [
    None, True, -1, 0, 3, 1.5, 10**30, 1e300, "x", [], [[]], ["sliding_attention"], {}, {"a": 1},
    {"rope_type": []}, {"full_attention": 3, "sliding_attention": {"rope_theta": "x"}},
  ]  # fmt: skip
  extra = (
    "rope_scaling", "partial_rotary_factor", "layer_types", "rope_parameters",
    "sliding_window_pattern", "max_window_layers", "other",
  )  # fmt: skip
  refused = 0
  for field in (*ALL[name], *extra):
    for value in odd:
      try:
        config = configs.from_hugging_face(ALL[name] | {field: value})
      except ValueError as error:
        refused += 1
        assert len(str(error)) < 400
      else:
        assert configs.from_hugging_face(configs.to_hugging_face(config)) == config
  assert refused > 100
