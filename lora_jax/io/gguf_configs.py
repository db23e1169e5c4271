"""A model's configuration as the metadata of a GGUF file has it, to and from `LlamaConfig`.

Keys begin with llama.cpp's name of the architecture, `qwen2.block_count`. A file of an architecture
that is not in ARCHITECTURES, or one that asks for something that the model does not compute, is
refused by name and never read as something near it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import checked_fields, configs, gguf_gemma, gpt2_configs
from lora_jax.models.experts import ExpertConfig
from lora_jax.models.gpt2 import GPT2Config
from lora_jax.models.limits import is_number
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.rope import (
  LinearRope,
  Llama3Rope,
  YarnRope,
  rotary_frequencies,
  yarn_attention_factor,
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
  "llama": {},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True},
  "qwen3moe": {"qk_norm": True},
  "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "whole_qk_norm": True},
  "granite": {},
  **{arch: dict(configs.FAMILIES[x.family].switches) for arch, x in gguf_gemma.KNOWN.items()},
}
"""llama.cpp's name of each architecture of Llama's relatives that is read, and the switches that it
has on."""

_GPT2 = "gpt2"
_OF_FAMILY = {
  "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
  "olmo2": "olmo2", "granite": "granite", "gpt2": _GPT2,
}  # fmt: skip
_OF_FAMILY |= {x.family: arch for arch, x in gguf_gemma.KNOWN.items()}
_FAMILY = {"qwen3moe": "qwen3_moe"}  # where it is called otherwise than the architecture
_EXPERTS = {
  "expert_count": "num_experts",
  "expert_used_count": "per_token",
  "expert_feed_forward_length": "width",
}
_FACTORS = {  # of Granite
  "embedding_scale": "embedding_multiplier",
  "attention.scale": "attention_multiplier",
  "residual_scale": "residual_multiplier",
  "logit_scale": "logit_divisor",
}
_YARN_FIXED = {
  "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_log_multiplier": 0.0,
  "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0,
}  # fmt: skip
_SIZES = {
  "embedding_length": "width",
  "feed_forward_length": "mlp_width",
  "block_count": "num_layers",
  "attention.head_count": "num_heads",
  "context_length": "max_length",
}


def architecture(config: LlamaConfig | GPT2Config) -> str:
  """Returns llama.cpp's name for a model.

  Raises ValueError for a family that GGUF files are not written of, and for what llama.cpp does not
  compute in an architecture.
  """
  found = _OF_FAMILY.get(config.family)
  if found is None:
    raise ValueError(
      f"GGUF files of the family {config.family!r} are not supported; supported: "
      f"{', '.join(_OF_FAMILY)}; export the model as a folder"
    )
  if found == _GPT2:
    gpt2_configs.check_gguf(config)
    return found
  wanted = dict(ARCHITECTURES[found])
  if config.family in _FAMILY.values() and config.experts is not None:
    # llama.cpp divides a token's shares by their sum, whatever the file says.
    wanted["experts"] = dataclasses.replace(config.experts, normalized=True)
  if found == "granite":
    wanted |= {ours: getattr(config, ours) for ours in _FACTORS.values()}
  if found in gguf_gemma.KNOWN:
    said = gguf_gemma.completed(found, gguf_gemma.described(found, config), config)
    wanted |= {name: getattr(said, name) for name in gguf_gemma.COMPLETED}
    if config.query_divisor is None and wanted["query_divisor"] == config.head_dim:
      wanted["query_divisor"] = None
  checked_fields.check_switches(config, wanted, f"llama.cpp's architecture {found!r} has no")
  if found == "olmo2" and config.num_heads * config.head_dim != config.width:
    raise ValueError(
      f"head_dim {config.head_dim}: in llama.cpp's architecture 'olmo2' the {config.num_heads} "
      f"heads share the width {config.width}; export the model as a folder"
    )
  return found


def rotates_neighbours(architecture: str) -> bool:
  """Whether rotary positions turn the pairs (x[2r], x[2r + 1]), and not (x[r], x[r + H / 2])."""
  return architecture in ("llama", "granite")


def from_gguf(
  metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_factors_R: np.ndarray | None
) -> LlamaConfig | GPT2Config:
  """Returns the configuration that a GGUF file's metadata describes.

  tie_embeddings: whether the file lacks `output.weight`.
  rope_factors_R: its tensor `rope_freqs.weight`, by which the rotary frequencies are divided.

  Raises ValueError for another architecture, a missing key, or an unknown rope scaling.
  """
  arch = metadata.get("general.architecture")
  if arch == _GPT2:
    return gpt2_configs.from_gguf(metadata, tie_embeddings=tie_embeddings)
  if not isinstance(arch, str) or arch not in ARCHITECTURES:
    supported = ", ".join(map(repr, (*ARCHITECTURES, _GPT2)))
    raise ValueError(f"general.architecture {shown(arch)} is not supported; supported: {supported}")
  experts = metadata.get(f"{arch}.expert_count", 0)
  if experts and arch not in _FAMILY:
    raise ValueError(f"{arch}.expert_count={shown(experts)}: mixtures of experts are not supported")
  gemma = gguf_gemma.KNOWN.get(arch)
  window = metadata.get(f"{arch}.attention.sliding_window", 0)
  if window and gemma is None:
    raise ValueError(
      f"{arch}.attention.sliding_window={shown(window)}: llama.cpp has no windows in this "
      "architecture; take the same model as safetensors"
    )
  sizes = checked_fields.sizes(metadata, {f"{arch}.{key}": ours for key, ours in _SIZES.items()})
  head_dim = metadata.get(f"{arch}.attention.key_length", sizes["width"] // sizes["num_heads"])
  tokens = metadata.get("tokenizer.ggml.tokens")
  config = LlamaConfig(
    **sizes,
    vocab_size=metadata.get(f"{arch}.vocab_size", len(tokens) if isinstance(tokens, list) else 0),
    num_kv_heads=metadata.get(f"{arch}.attention.head_count_kv", sizes["num_heads"]),
    head_dim=head_dim,
    rope_theta=metadata.get(f"{arch}.rope.freq_base", gemma.theta if gemma else 10000.0),
    norm_eps=checked_fields.required(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
    tie_embeddings=tie_embeddings,
    family=gemma.family if gemma else _FAMILY.get(arch, arch),
    experts=_experts_from_gguf(arch, metadata) if arch in _FAMILY else None,
    **ARCHITECTURES[arch],
    **_factors(arch, metadata),
  )
  rotated = metadata.get(f"{arch}.rope.dimension_count", head_dim)
  if not checked_fields.is_(rotated, head_dim):
    raise ValueError(
      f"{arch}.rope.dimension_count={shown(rotated)}: rotating some of a head's {head_dim} "
      "features is not supported"
    )
  values = metadata.get(f"{arch}.attention.value_length", head_dim)
  if not checked_fields.is_(values, head_dim):
    raise ValueError(
      f"{arch}.attention.value_length={shown(values)}: values of another size than the keys' "
      f"{head_dim} are not supported"
    )
  # The sizes have been checked, and what is made from them may be.
  rope = _rope_from_gguf(arch, metadata, rope_factors_R, config)
  config = dataclasses.replace(config, rope_scaling=rope)
  return gguf_gemma.completed(arch, metadata, config) if gemma else config


def _factors(arch: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
  if arch != "granite":
    return {}
  return {
    ours: checked_fields.required(metadata, f"{arch}.{key}") for key, ours in _FACTORS.items()
  }


def to_gguf(config: LlamaConfig | GPT2Config) -> tuple[dict[str, Any], np.ndarray | None]:
  """Returns (metadata, rope_factors_R) of a GGUF file, the inverse of `from_gguf`.

  Raises ValueError as `architecture` does, for heads whose values are narrower than their keys, and
  for a scaling of rotary frequencies that llama.cpp does not have in the architecture.
  """
  arch = architecture(config)
  if arch == _GPT2:
    return gpt2_configs.to_gguf(config), None
  checked_fields.check_values(config, "llama.cpp's attention has no such heads")
  metadata = {f"{arch}.{key}": getattr(config, ours) for key, ours in _SIZES.items()} | {
    f"{arch}.vocab_size": config.vocab_size,
    f"{arch}.attention.head_count_kv": config.num_kv_heads,
    f"{arch}.attention.key_length": config.head_dim,
    f"{arch}.attention.value_length": config.head_dim,
    f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
    f"{arch}.rope.dimension_count": config.head_dim,
    f"{arch}.rope.freq_base": float(config.rope_theta),
  }
  if config.experts is not None:
    metadata |= {f"{arch}.{key}": getattr(config.experts, x) for key, x in _EXPERTS.items()}
  if arch == "granite":
    metadata |= {f"{arch}.{key}": float(getattr(config, x)) for key, x in _FACTORS.items()}
  if arch in gguf_gemma.KNOWN:
    metadata |= gguf_gemma.described(arch, config)
  rope = config.rope_scaling
  match rope:
    case LinearRope():
      scaling = {"type": "linear", "factor": float(rope.factor)}
      return metadata | {f"{arch}.rope.scaling.{key}": x for key, x in scaling.items()}, None
    case Llama3Rope():
      if arch != "llama":
        raise ValueError(
          f"rope_scaling: llama.cpp's architecture {arch!r} has no scaling like Llama 3.1's"
        )
      frequencies_R = rotary_frequencies(config.rope_theta, config.head_dim)
      return metadata, (frequencies_R / rope.scale(frequencies_R)).astype(np.float32)
    case YarnRope(truncate=True, beta_fast=32, beta_slow=1):
      return metadata | {f"{arch}.rope.scaling.{key}": x for key, x in _yarn(rope).items()}, None
    case None:
      return metadata, None
  raise ValueError(
    f"rope_scaling: llama.cpp's architecture {arch!r} has no {shown(rope)}; export the model as a "
    "folder"
  )


def _yarn(rope: YarnRope) -> dict[str, Any]:
  """YaRN in llama.cpp, which multiplies by the recommended attention factor itself."""
  return {
    "type": "yarn",
    "factor": float(rope.factor),
    "original_context_length": rope.original_length,
    "attn_factor": rope.attention_factor / yarn_attention_factor(rope.factor),
  }


def _yarn_from_gguf(scaling: Mapping[str, Any], context_length: int) -> YarnRope:
  """scaling: {key: value}, without the keys' common beginning."""
  # Versions of llama.cpp differ in whether they read these.
  for key, off in _YARN_FIXED.items():
    if not checked_fields.is_(value := scaling.get(key, off), off):
      raise ValueError(f"rope.scaling.{key}={shown(value)} is not supported, only {off}")
  factor = checked_fields.required(scaling, "factor")
  attention = scaling.get("attn_factor", 1.0)
  recommended = yarn_attention_factor(factor)
  return YarnRope(
    factor=factor,
    original_length=scaling.get("original_context_length", context_length),
    attention_factor=attention * recommended if is_number(attention) else attention,
  )


def _experts_from_gguf(arch: str, metadata: Mapping[str, Any]) -> ExpertConfig:
  keys = {f"{arch}.{key}": ours for key, ours in _EXPERTS.items()}
  return ExpertConfig(**checked_fields.sizes(metadata, keys))


def _rope_from_gguf(
  arch: str, metadata: Mapping[str, Any], factors_R: np.ndarray | None, config: LlamaConfig
) -> LinearRope | Llama3Rope | YarnRope | None:
  theta, head_dim = config.rope_theta, config.head_dim
  kind = metadata.get(f"{arch}.rope.scaling.type", "none")
  if kind not in ("none", "linear", "yarn"):
    raise ValueError(
      f"{arch}.rope.scaling.type {shown(kind)} is not supported; supported: 'none', 'linear', "
      "'yarn'"
    )
  if kind != "none" and factors_R is not None:
    raise ValueError(f"{arch}.rope.scaling.type {kind!r} and rope_freqs.weight: scale rope twice")
  if kind == "yarn":
    begin = f"{arch}.rope.scaling."
    scaling = {key.removeprefix(begin): x for key, x in metadata.items() if key.startswith(begin)}
    return _yarn_from_gguf(scaling, config.max_length)
  if kind == "linear":
    return LinearRope(factor=checked_fields.required(metadata, f"{arch}.rope.scaling.factor"))
  if factors_R is None:
    return None
  # The format keeps the divisors that Llama 3.1's scaling gave and not its four numbers. The
  # releases differ from each other in `factor` alone, which is the largest divisor.
  if factors_R.shape == (head_dim // 2,) and (factors_R > 0).all():
    rope = Llama3Rope(factor=round(float(factors_R.max()), 3))
    frequencies_R = rotary_frequencies(theta, head_dim)
    if np.allclose(frequencies_R / factors_R, rope.scale(frequencies_R), rtol=1e-4, atol=0):
      return rope
  raise ValueError(
    "rope_freqs.weight is not Llama 3.1's scaling of rotary frequencies; "
    "take the same model as safetensors, whose config.json says what it is"
  )
