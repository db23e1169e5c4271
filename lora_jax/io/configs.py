"""A model's configuration as files write it down, to and from `LlamaConfig`.

Only `llama` is spoken: a file of another architecture, or one that asks for something that the
model does not compute, is refused by name and never read as something near it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.models.llama import LlamaConfig, value_features
from lora_jax.models.rope import LinearRope, Llama3Rope, rotary_frequencies

_SIZES_HF = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "intermediate_size": "mlp_width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_SIZES_GGUF = {
  "llama.embedding_length": "width",
  "llama.feed_forward_length": "mlp_width",
  "llama.block_count": "num_layers",
  "llama.attention.head_count": "num_heads",
  "llama.context_length": "max_length",
}
# Fields by which a Hugging Face configuration may ask for more than the model does, and the one
# value of each that is accepted.
_FIXED_HF = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


def from_hugging_face(fields: Mapping[str, Any]) -> LlamaConfig:
  """Returns the configuration that a parsed `config.json` describes.

  Raises ValueError for another `model_type`, a missing field, or a feature which is not supported
  (attention or MLP biases, another activation, an unknown rope scaling, quantised weights).
  """
  if fields.get("model_type") != "llama":
    raise ValueError(
      f"model_type {fields.get('model_type')!r} is not supported; supported: 'llama'"
    )
  for field, accepted in _FIXED_HF.items():
    if fields.get(field, accepted) != accepted:
      raise ValueError(f"{field}={fields[field]!r} is not supported, only {accepted!r}")
  if fields.get("quantization_config"):
    raise ValueError("quantization_config: quantised safetensors are not supported")
  sizes = _sizes(fields, _SIZES_HF)
  # Version 5 of transformers writes `rope_parameters`, with theta in it; the older ones wrote
  # `rope_theta` and `rope_scaling`.
  rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
  # Absent fields take the values that transformers' LlamaConfig gives them.
  return LlamaConfig(
    **sizes,
    num_kv_heads=fields.get("num_key_value_heads") or sizes["num_heads"],
    head_dim=fields.get("head_dim") or sizes["width"] // sizes["num_heads"],
    max_length=fields.get("max_position_embeddings", 2048),
    rope_theta=rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
    rope_scaling=_rope_from_hugging_face(rope),
    norm_eps=fields.get("rms_norm_eps", 1e-6),
    tie_embeddings=fields.get("tie_word_embeddings", False),
  )


def to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_hugging_face`.

  Rope is written in both spellings, so that transformers 4 and 5 read it alike.

  Raises ValueError for heads whose values are narrower than their keys.
  """
  _check_values(config, "config.json has no field for it")
  scaling = _rope_to_hugging_face(config)
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{theirs: getattr(config, ours) for theirs, ours in _SIZES_HF.items()},
    **_FIXED_HF,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def from_gguf(
  metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_factors_R: np.ndarray | None
) -> LlamaConfig:
  """Returns the configuration that a GGUF file's metadata describes.

  tie_embeddings: whether the file lacks `output.weight`.
  rope_factors_R: its tensor `rope_freqs.weight`, by which the rotary frequencies are divided.

  Raises ValueError for another architecture, a missing key, or an unknown rope scaling.
  """
  architecture = metadata.get("general.architecture")
  if architecture != "llama":
    raise ValueError(f"general.architecture {architecture!r} is not supported; supported: 'llama'")
  if experts := metadata.get("llama.expert_count", 0):
    raise ValueError(f"llama.expert_count={experts}: mixtures of experts are not supported")
  sizes = _sizes(metadata, _SIZES_GGUF)
  head_dim = metadata.get("llama.attention.key_length", sizes["width"] // sizes["num_heads"])
  rotated = metadata.get("llama.rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise ValueError(
      f"llama.rope.dimension_count={rotated}: rotating some of a head's {head_dim} features is "
      "not supported"
    )
  rope_theta = metadata.get("llama.rope.freq_base", 10000.0)
  return LlamaConfig(
    **sizes,
    vocab_size=metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
    num_kv_heads=metadata.get("llama.attention.head_count_kv", sizes["num_heads"]),
    head_dim=head_dim,
    rope_theta=rope_theta,
    rope_scaling=_rope_from_gguf(metadata, rope_factors_R, rope_theta, head_dim),
    norm_eps=_required(metadata, "llama.attention.layer_norm_rms_epsilon"),
    tie_embeddings=tie_embeddings,
  )


def to_gguf(config: LlamaConfig) -> tuple[dict[str, Any], np.ndarray | None]:
  """Returns (metadata, rope_factors_R) of a GGUF file, the inverse of `from_gguf`.

  Raises ValueError for heads whose values are narrower than their keys.
  """
  _check_values(config, "llama.cpp's attention has no such heads")
  metadata = {theirs: getattr(config, ours) for theirs, ours in _SIZES_GGUF.items()} | {
    "llama.vocab_size": config.vocab_size,
    "llama.attention.head_count_kv": config.num_kv_heads,
    "llama.attention.key_length": config.head_dim,
    "llama.attention.value_length": config.head_dim,
    "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
    "llama.rope.dimension_count": config.head_dim,
    "llama.rope.freq_base": float(config.rope_theta),
  }
  rope = config.rope_scaling
  match rope:
    case LinearRope():
      scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope.factor}
      return metadata | scaling, None
    case Llama3Rope():
      frequencies_R = rotary_frequencies(config.rope_theta, config.head_dim)
      return metadata, (frequencies_R / rope.scale(frequencies_R)).astype(np.float32)
  return metadata, None


def _check_values(config: LlamaConfig, reason: str) -> None:
  if value_features(config) != config.head_dim:
    raise ValueError(
      f"value_dim {config.value_dim}: a head's values are narrower than its {config.head_dim} "
      f"features of keys, and {reason}; write the model as a program (compress.artifact), or "
      "compress it without the step value_heads"
    )


def _required(fields: Mapping[str, Any], key: str) -> Any:
  if key not in fields:
    raise ValueError(f"lacks {key}")
  return fields[key]


def _sizes(fields: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, int]:
  sizes = {ours: _required(fields, theirs) for theirs, ours in table.items()}
  for theirs, ours in table.items():
    if not isinstance(sizes[ours], int) or sizes[ours] < 1:
      raise ValueError(f"{theirs} must be a positive integer, not {sizes[ours]!r}")
  return sizes


def _rope_from_hugging_face(rope: Mapping[str, Any]) -> LinearRope | Llama3Rope | None:
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("partial_rotary_factor: rotating some of a head's features is not supported")
  kind = rope.get("rope_type", rope.get("type", "default"))
  match kind:
    case "default":
      return None
    case "linear":
      return LinearRope(factor=_required(rope, "factor"))
    case "llama3":
      return Llama3Rope(
        factor=_required(rope, "factor"),
        low_freq_factor=_required(rope, "low_freq_factor"),
        high_freq_factor=_required(rope, "high_freq_factor"),
        original_length=_required(rope, "original_max_position_embeddings"),
      )
  raise ValueError(
    f"rope scaling of type {kind!r} is not supported; supported: 'default', 'linear', 'llama3'"
  )


def _rope_to_hugging_face(config: LlamaConfig) -> dict[str, Any] | None:
  rope = config.rope_scaling
  match rope:
    case None:
      return None
    case LinearRope():
      return {"rope_type": "linear", "factor": rope.factor}
    case Llama3Rope():
      return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_length,
      }


def _rope_from_gguf(
  metadata: Mapping[str, Any], factors_R: np.ndarray | None, theta: float, head_dim: int
) -> LinearRope | Llama3Rope | None:
  kind = metadata.get("llama.rope.scaling.type", "none")
  if kind not in ("none", "linear"):
    raise ValueError(
      f"llama.rope.scaling.type {kind!r} is not supported; supported: 'none', 'linear'"
    )
  if kind == "linear":
    return LinearRope(factor=_required(metadata, "llama.rope.scaling.factor"))
  if factors_R is None:
    return None
  # The format keeps the divisors that Llama 3.1's scaling gave and not its four numbers. The
  # releases differ from each other in `factor` alone, which is the largest divisor.
  rope = Llama3Rope(factor=round(float(factors_R.max()), 3))
  frequencies_R = rotary_frequencies(theta, head_dim)
  if factors_R.shape != frequencies_R.shape or not np.allclose(
    frequencies_R / factors_R, rope.scale(frequencies_R), rtol=1e-4, atol=0
  ):
    raise ValueError(
      "rope_freqs.weight is not Llama 3.1's scaling of rotary frequencies; "
      "take the same model as safetensors, whose config.json says what it is"
    )
  return rope
