"""A model's configuration as files write it down, to and from `LlamaConfig`.

Only `llama` is spoken: a file of another architecture, or one that asks for something that the
model does not compute, is refused by name and never read as something near it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.models.llama import LinearRope, Llama3Rope, LlamaConfig

_REQUIRED_HF = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "intermediate_size": "mlp_width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_REQUIRED_GGUF = {
  "llama.embedding_length": "width",
  "llama.feed_forward_length": "mlp_width",
  "llama.block_count": "num_layers",
  "llama.attention.head_count": "num_heads",
  "llama.context_length": "max_length",
  "llama.attention.layer_norm_rms_epsilon": "norm_eps",
}
# What a Hugging Face configuration may ask for that the model does not do: field -> accepted value.
_FIXED_HF = {
  "attention_bias": False,
  "mlp_bias": False,
  "hidden_act": "silu",
  "pretraining_tp": 1,
}


def from_hugging_face(fields: Mapping[str, Any]) -> LlamaConfig:
  """Returns the configuration that a parsed `config.json` describes.

  Raises ValueError for another `model_type`, a missing field, or a feature which is not supported
  (attention or MLP biases, another activation, an unknown rope scaling, ...).
  """
  if fields.get("model_type") != "llama":
    raise ValueError(
      f"config.json: model_type {fields.get('model_type')!r} is not supported; supported: 'llama'"
    )
  for field, accepted in _FIXED_HF.items():
    if fields.get(field, accepted) != accepted:
      raise ValueError(
        f"config.json: {field}={fields[field]!r} is not supported, only {accepted!r}"
      )
  sizes = _required(fields, _REQUIRED_HF, "config.json")
  # Version 5 of transformers writes `rope_parameters`, with theta in it; the older ones wrote
  # `rope_theta` and `rope_scaling`.
  rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
  head_dim = fields.get("head_dim") or sizes["width"] // sizes["num_heads"]
  # Absent fields take the values that transformers' LlamaConfig gives them.
  return LlamaConfig(
    **sizes,
    num_kv_heads=fields.get("num_key_value_heads") or sizes["num_heads"],
    head_dim=head_dim,
    max_length=fields.get("max_position_embeddings", 2048),
    rope_theta=rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
    rope_scaling=_rope_from_hugging_face(rope),
    norm_eps=fields.get("rms_norm_eps", 1e-6),
    tie_embeddings=fields.get("tie_word_embeddings", False),
  )


def to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_hugging_face`.

  Rope is written in both spellings, so that transformers 4 and 5 read it alike.
  """
  scaling = _rope_to_hugging_face(config)
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{theirs: getattr(config, ours) for theirs, ours in _REQUIRED_HF.items()},
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
  sizes = _required(metadata, _REQUIRED_GGUF, "the GGUF metadata")
  head_dim = metadata.get("llama.attention.key_length", sizes["width"] // sizes["num_heads"])
  turned = metadata.get("llama.rope.dimension_count", head_dim)
  if turned != head_dim:
    raise ValueError(
      f"llama.rope.dimension_count={turned}: rotating a part of {head_dim} features of a head is "
      "not supported"
    )
  vocab_size = metadata.get("llama.vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
  return LlamaConfig(
    **sizes,
    vocab_size=vocab_size,
    num_kv_heads=metadata.get("llama.attention.head_count_kv", sizes["num_heads"]),
    head_dim=head_dim,
    rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
    rope_scaling=_rope_from_gguf(metadata, rope_factors_R, head_dim),
    tie_embeddings=tie_embeddings,
  )


def _required(fields: Mapping[str, Any], table: Mapping[str, str], where: str) -> dict[str, Any]:
  if absent := [theirs for theirs in table if theirs not in fields]:
    raise ValueError(f"{where} lacks {', '.join(absent)}")
  return {ours: fields[theirs] for theirs, ours in table.items()}


def _rope_from_hugging_face(rope: Mapping[str, Any]) -> LinearRope | Llama3Rope | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind == "linear":
    return LinearRope(**_required(rope, {"factor": "factor"}, "config.json: rope_scaling"))
  if kind == "llama3":
    table = {
      "factor": "factor",
      "low_freq_factor": "low_freq_factor",
      "high_freq_factor": "high_freq_factor",
      "original_max_position_embeddings": "original_length",
    }
    return Llama3Rope(**_required(rope, table, "config.json: rope_scaling"))
  raise ValueError(
    f"config.json: rope_scaling of type {kind!r} is not supported; "
    "supported: 'default', 'linear', 'llama3'"
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
  metadata: Mapping[str, Any], factors_R: np.ndarray | None, head_dim: int
) -> LinearRope | Llama3Rope | None:
  kind = metadata.get("llama.rope.scaling.type", "none")
  if kind not in ("none", "linear"):
    raise ValueError(
      f"llama.rope.scaling.type {kind!r} is not supported; supported: 'none', 'linear'"
    )
  if kind == "linear":
    return LinearRope(**_required(metadata, {"llama.rope.scaling.factor": "factor"}, "the GGUF"))
  if factors_R is None:
    return None
  # The format keeps the divisors that Llama 3.1's scaling gave and not its four numbers. Every
  # release differs from the others in `factor` alone, which is the largest divisor.
  rope = Llama3Rope(factor=float(factors_R.max()))
  theta = metadata.get("llama.rope.freq_base", 10000.0)
  frequencies_R = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  if factors_R.shape != frequencies_R.shape or not np.allclose(
    frequencies_R / factors_R, rope.scale(frequencies_R), rtol=1e-4, atol=0
  ):
    raise ValueError(
      "rope_freqs.weight is not Llama 3.1's scaling of rotary frequencies; "
      "take the same model as safetensors, whose config.json says what it is"
    )
  return rope
