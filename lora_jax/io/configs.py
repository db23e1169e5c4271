"""Converts a model's `config.json` to and from `LlamaConfig`.

`model_type` selects one of FAMILIES. Other families, unknown fields, and values of unsupported
features are refused by name, rather than approximated.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import expert_fields, layer_fields, rope_fields
from lora_jax.io.checked_fields import (
  check_values,
  classes_of,
  given,
  head_fields,
  is_,
  object_of,
  sizes,
)
from lora_jax.io.layer_fields import PATTERN, ROTATED
from lora_jax.io.rope_fields import FULL, LOCAL, RopeStyle
from lora_jax.models.llama_config import LlamaConfig, layer_kinds

Fields = Mapping[str, Any]

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "intermediate_size": "mlp_width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_OPTIONAL = {
  "query_pre_attn_scalar": "query_divisor",
  "attn_logit_softcapping": "attn_softcap",
  "final_logit_softcapping": "logit_softcap",
  "embedding_multiplier": "embedding_multiplier",
  "attention_multiplier": "attention_multiplier",
  "residual_multiplier": "residual_multiplier",
  "logits_scaling": "logit_divisor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How a family's `config.json` is read and written.

  architecture: the class of transformers.
  defaults: transformers' defaults of optional fields.
  fixed: fields of unsupported features, and the only accepted value of each.
  switches: the family's fields of `LlamaConfig`.
  is_local: (fields, layer) -> whether the layer has the window if `layer_types` is absent; None if
    the family has no window.
  rope: the style of the fields of rotary positions.
  experts: the style of the fields of experts, or None.
  unread: fields of the family's files that transformers does not read.
  quantized: the methods of quantization whose files are read, as `quant_method` says.
  """

  architecture: str
  defaults: Fields
  fixed: Fields
  switches: Fields = dataclasses.field(default_factory=dict)
  is_local: Callable[[Fields, int], bool] | None = None
  rope: RopeStyle = dataclasses.field(default_factory=RopeStyle)
  experts: expert_fields.ExpertStyle | None = None
  unread: tuple[str, ...] = ()
  quantized: tuple[str, ...] = ()


_DEFAULTS = {
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "head_dim": None,
}  # fmt: skip
_QWEN = _DEFAULTS | {
  "max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False,
  "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_QWEN_MOE = _DEFAULTS | {
  "max_position_embeddings": 32768, "num_key_value_heads": 4, "use_sliding_window": False,
  "sliding_window": 4096, "max_window_layers": 0,
}  # fmt: skip
_GPT_OSS = _DEFAULTS | {
  "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "max_position_embeddings": 131072,
  "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "layer_types": None,
}  # fmt: skip
_GPT_OSS_ROPE = {
  "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
  "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip
_GEMMA = _DEFAULTS | {
  "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096,
  "layer_types": None, "query_pre_attn_scalar": 256, "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
}  # fmt: skip
_GEMMA_FIXED = {
  "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
  "attention_bias": False,
}  # fmt: skip
_GEMMA_SWITCHES = {
  "activation": "gelu_tanh", "unit_offset": True, "post_norms": True, "scale_embeddings": True,
}  # fmt: skip
_MISTRAL = _DEFAULTS | {
  "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
}  # fmt: skip
_OLMO = _DEFAULTS | {
  "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_key_value_heads": None,
}  # fmt: skip
_OLMO_SWITCHES = {
  "pre_norms": False, "post_norms": True, "qk_norm": True, "whole_qk_norm": True,
}  # fmt: skip
_PHI = _DEFAULTS | {
  "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_key_value_heads": None,
  "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0, "sliding_window": None,
}  # fmt: skip
_SMOLLM = _DEFAULTS | {
  "rope_theta": 2_000_000.0, "tie_word_embeddings": True, "max_position_embeddings": 32768,
  "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": None,
  "layer_types": None, ROTATED: None, "no_rope_layer_interval": 4,
}  # fmt: skip
_GRANITE = _DEFAULTS | {
  "max_position_embeddings": 2048, "num_key_value_heads": None, "embedding_multiplier": 1.0,
  "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
_MINISTRAL = {
  "rms_norm_eps": 1e-5, "head_dim": 128, "max_position_embeddings": 262144, "sliding_window": None,
}  # fmt: skip
_MINISTRAL_ROPE = {
  "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "mscale": 1.0,
  "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}

FAMILIES = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    defaults=_DEFAULTS | {"max_position_embeddings": 2048, "num_key_value_heads": None},
    fixed=_PLAIN,
  ),
  "mistral": Family(
    architecture="MistralForCausalLM",
    defaults=_MISTRAL,
    fixed={"hidden_act": "silu"},
    is_local=lambda fields, layer: True,
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    defaults=_QWEN,
    fixed={"hidden_act": "silu"},
    switches={"qkv_bias": True},
    is_local=lambda fields, layer: layer >= fields["max_window_layers"],
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    defaults=_QWEN | {"head_dim": 128},
    fixed={"hidden_act": "silu", "attention_bias": False},
    switches={"qk_norm": True},
    is_local=lambda fields, layer: layer >= fields["max_window_layers"],
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    defaults=_QWEN_MOE,
    fixed={"hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1},
    switches={"qk_norm": True},
    is_local=lambda fields, layer: True,
    experts=expert_fields.QWEN3_MOE,
  ),
  "gpt_oss": Family(
    architecture="GptOssForCausalLM",
    defaults=_GPT_OSS,
    fixed={"hidden_act": "silu", "attention_bias": True, **expert_fields.CLAMPED},
    switches={"qkv_bias": True, "out_bias": True, "attn_sinks": True},
    is_local=lambda fields, layer: layer % 2 == 0,
    rope=RopeStyle(default=_GPT_OSS_ROPE),
    experts=expert_fields.GPT_OSS,
    quantized=("mxfp4",),
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    defaults=_GEMMA
    | {
      "max_position_embeddings": 8192,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    fixed=_GEMMA_FIXED,
    switches=_GEMMA_SWITCHES,
    is_local=lambda fields, layer: layer % 2 == 0,
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    defaults=_GEMMA
    | {
      "max_position_embeddings": 131072,
      "rope_theta": 1_000_000.0,
      "rope_local_base_freq": 10000.0,
      PATTERN: 6,
    },
    fixed=_GEMMA_FIXED,
    switches=_GEMMA_SWITCHES | {"qk_norm": True},
    is_local=lambda fields, layer: (layer + 1) % fields[PATTERN] != 0,
    rope=RopeStyle(two=True),
  ),
  "phi3": Family(
    architecture="Phi3ForCausalLM",
    defaults=_PHI,
    fixed=_PLAIN | {"lm_head_bias": False},
    switches={"fused": True},
    is_local=lambda fields, layer: True,
    rope=RopeStyle(partial=True, beside=True, renamed={"su": "longrope", "yarn": "longrope"}),
    unread=("auto_map", "full_attn_mod", "interpolate_factor"),
  ),
  "olmo2": Family(
    architecture="Olmo2ForCausalLM", defaults=_OLMO, fixed=_PLAIN, switches=_OLMO_SWITCHES
  ),
  "olmo3": Family(
    architecture="Olmo3ForCausalLM",
    defaults=_OLMO | {"rope_theta": 500_000.0, "sliding_window": 4096, "layer_types": None},
    fixed=_PLAIN,
    switches=_OLMO_SWITCHES,
    is_local=lambda fields, layer: (layer + 1) % 4 != 0,
    rope=RopeStyle(two=True),
  ),
  "smollm3": Family(
    architecture="SmolLM3ForCausalLM",
    defaults=_SMOLLM,
    fixed=_PLAIN,
    is_local=lambda fields, layer: not fields[ROTATED][layer],
    unread=("max_window_layers",),
  ),
  "granite": Family(architecture="GraniteForCausalLM", defaults=_GRANITE, fixed=_PLAIN),
  "ministral": Family(
    architecture="MinistralForCausalLM",
    defaults=_MISTRAL | {"layer_types": None},
    fixed={"hidden_act": "silu"},
    is_local=lambda fields, layer: True,
  ),
  "ministral3": Family(
    architecture="Ministral3ForCausalLM",
    defaults=_MISTRAL | _MINISTRAL,
    fixed={"hidden_act": "silu"},
    is_local=lambda fields, layer: True,
    rope=RopeStyle(grows=True, default=_MINISTRAL_ROPE),
  ),
}
"""By `model_type`."""

# Fields of every family that are read apart from the tables above.
_READ = ("rope_scaling", "rope_parameters", "partial_rotary_factor", "quantization_config")
# Fields that may say what they like: no logit of the model depends on them.
_IGNORED = (
  "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
  "name_or_path", "tokenizer_class", "initializer_range", "use_cache", "pretraining_tp",
  "attention_dropout", "hidden_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop",
  "bos_token_id", "eos_token_id",
  "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
  "forced_eos_token_id", "output_attentions", "output_hidden_states", "output_scores",
  "return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "id2label", "label2id",
  "num_labels", "problem_type", "task_specific_params", "finetuning_task", "prefix", "max_length",
  "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
  "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
  "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
  "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
  "begin_suppress_tokens", "tf_legacy_loss", "use_bfloat16", "torchscript", "attn_implementation",
  "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
  "_flash_attn_2_enabled", "cache_implementation", "is_llama_config", "unsloth_fixed",
  "unsloth_version", "transformers.js_config", "_sliding_window_pattern", "max_sequence_length",
)  # fmt: skip


def from_hugging_face(fields: Fields) -> LlamaConfig:
  """Returns the configuration that a parsed `config.json` describes.

  Raises ValueError for another `model_type`, a missing field, a value of another type or out of
  range, an unknown field that is not null, empty or false, or an unsupported feature (other biases,
  another activation, an unknown rope scaling, quantized weights).
  """
  name = fields.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    supported = ", ".join(map(repr, FAMILIES))
    raise ValueError(f"model_type {shown(name)} is not supported; supported: {supported}")
  family = FAMILIES[name]
  for field, accepted in family.fixed.items():
    if not is_(fields.get(field, accepted), accepted):
      raise ValueError(f"{field}={shown(fields[field])} is not supported, only {accepted!r}")
  if quantized := object_of(fields, "quantization_config"):
    method = quantized.get("quant_method")
    if method not in family.quantized:
      raise ValueError(
        f"quantization_config: quant_method {shown(method)} is not supported of the model_type "
        f"{name!r}: quantized safetensors are not supported but for MXFP4 of gpt_oss; dequantize "
        "the model in transformers and save it again"
      )
  of_experts = family.experts.known if family.experts else ()
  known = {*_SIZES, *family.defaults, *family.fixed, *family.unread, *of_experts, *_READ}
  check_known(name, known, fields)
  found = sizes(fields, _SIZES)
  fields = {**family.defaults, **fields}
  optional = {ours: fields[x] for x, ours in _OPTIONAL.items() if x in family.defaults}
  head_dim = given(fields, "head_dim", found["width"] // found["num_heads"])
  config = LlamaConfig(
    **found,
    num_kv_heads=given(fields, "num_key_value_heads", found["num_heads"]),
    head_dim=head_dim,
    max_length=fields["max_position_embeddings"],
    norm_eps=fields["rms_norm_eps"],
    tie_embeddings=fields["tie_word_embeddings"],
    classes=classes_of(fields),
    family=name,
    experts=family.experts and expert_fields.read(fields, family.experts),
    **family.switches,
    **optional,
  )
  # The sizes are within their limits, so arrays of these sizes can be made.
  rope = rope_fields.read(fields, head_dim, family.rope)
  rotated = layer_fields.rotated(fields, config.num_layers, family.defaults)
  flags = rotated or (True,) * config.num_layers
  window, local_layers = layer_fields.windows(
    fields | {ROTATED: flags}, config.num_layers, family.is_local, family.defaults
  )
  if window is None:
    rope.pop("local_rope_theta", None)
  layers = {"window": window, "local_layers": local_layers, "rotated_layers": rotated}
  return dataclasses.replace(config, **rope, **layers)


def to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_hugging_face`.

  Rope is written in both spellings, for transformers 4 and 5.

  Raises ValueError for heads whose values are narrower than their keys, and for settings without a
  field in the family's files.
  """
  check_values(config, "config.json has no field for it")
  family = FAMILIES.get(config.family)
  if family is None:
    raise ValueError(f"family {config.family!r:.80} is not one of {', '.join(FAMILIES)}")
  fields = {
    **head_fields(family.architecture, config.classes),
    "model_type": config.family,
    **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
    **family.fixed,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    **rope_fields.written(config, family.rope),
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    **{x: getattr(config, ours) for x, ours in _OPTIONAL.items() if x in family.defaults},
  }
  if family.experts and config.experts:
    fields |= expert_fields.written(config.experts, family.experts)
  if family.is_local is not None:
    fields["sliding_window"] = config.window
  if "layer_types" in family.defaults:
    fields["layer_types"] = [LOCAL if local else FULL for local, _ in layer_kinds(config)]
  if ROTATED in family.defaults:
    fields[ROTATED] = [int(rotated) for _, rotated in layer_kinds(config)]
  if "use_sliding_window" in family.defaults:
    fields["use_sliding_window"] = config.window is not None
  if "rope_local_base_freq" in family.defaults:
    fields["rope_local_base_freq"] = fields["rope_parameters"][LOCAL]["rope_theta"]
  _check_written(config, fields)
  return fields


def _check_written(config: LlamaConfig, fields: Fields) -> None:
  """Raises ValueError if the fields do not describe the whole configuration."""
  said = from_hugging_face(fields)
  how = (
    "scan_layers", "remat_policy", "constrain", "attention", "dtype", "param_dtype", "value_dim",
  )  # fmt: skip
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name not in how and value != getattr(said, field.name):
      raise ValueError(
        f"config.json of the family {config.family!r} has no field for {field.name}={shown(value)}"
      )


def check_known(name: str, known: Collection[str], fields: Fields) -> None:
  """Raises ValueError for an unknown field, unless it is off.

  name: the `model_type`.
  known: the fields that are read or ignored, in addition to those ignored for every family.
  """
  for field, value in fields.items():
    # A field that is null, empty or false is off.
    if field not in known and field not in _IGNORED and value not in (None, False, "", [], {}):
      raise ValueError(
        f"{shown(field)}={shown(value)} is not known of the model_type {name!r}; if the model's "
        "logits do not depend on it, delete the field"
      )
