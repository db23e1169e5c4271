"""Converts the metadata of a GGUF file to and from `LlamaConfig`.

Keys begin with llama.cpp's name of the architecture, `qwen2.block_count`. An architecture that is
not in ARCHITECTURES, or an unsupported feature, is refused by name rather than approximated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import checked_fields, configs, gguf_gemma, gguf_layers, gpt2_configs
from lora_jax.io.checked_fields import SWITCHES
from lora_jax.models.experts import ExpertConfig
from lora_jax.models.gpt2 import GPT2Config
from lora_jax.models.limits import is_number
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.rope import (
  LinearRope,
  Llama3Rope,
  LongRope,
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
  "smollm3": {},
  "mistral3": {},
  "phi3": {"fused": True},
  "gpt-oss": {"qkv_bias": True, "out_bias": True, "attn_sinks": True},
  **{arch: dict(configs.FAMILIES[x.family].switches) for arch, x in gguf_gemma.KNOWN.items()},
}
"""llama.cpp's name of each architecture of Llama's relatives that is read, and the switches that it
has on."""

_GPT2 = "gpt2"
_OF_FAMILY = {
  "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
  "olmo2": "olmo2", "olmo3": "olmo2", "granite": "granite", "smollm3": "smollm3",
  "ministral": "llama", "ministral3": "mistral3", "phi3": "phi3", "gpt_oss": "gpt-oss",
  "gpt2": _GPT2,
}  # fmt: skip
_OF_FAMILY |= {x.family: arch for arch, x in gguf_gemma.KNOWN.items()}
_FAMILY = {"qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "mistral3": "ministral3"}
_WITH_EXPERTS = {"qwen3moe": {}, "gpt-oss": {"clamped": True, "biases": True}}
_EXPERTS = {
  "expert_count": "num_experts",
  "expert_used_count": "per_token",
  "expert_feed_forward_length": "width",
}
_FACTORS = {  # for Granite
  "embedding_scale": "embedding_multiplier",
  "attention.scale": "attention_multiplier",
  "residual_scale": "residual_multiplier",
  "logit_scale": "logit_divisor",
}
_YARN_FIXED = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_ext_factor": 1.0}
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""The tensors that rotary frequencies are divided by: all of them, or by the length of a text."""
_SIZES = {
  "embedding_length": "width",
  "feed_forward_length": "mlp_width",
  "block_count": "num_layers",
  "attention.head_count": "num_heads",
  "context_length": "max_length",
}


def architecture(config: LlamaConfig | GPT2Config) -> str:
  """Returns llama.cpp's name for a model.

  Raises ValueError for a family without GGUF files, and for features that llama.cpp does not
  support in an architecture.
  """
  found = _OF_FAMILY.get(config.family)
  if found is None:
    raise ValueError(
      f"GGUF files of the family {config.family!r} are not supported; supported: "
      f"{', '.join(_OF_FAMILY)}; export the model as a folder"
    )
  if found == _GPT2:
    assert isinstance(config, GPT2Config)
    gpt2_configs.check_gguf(config)
    return found
  assert isinstance(config, LlamaConfig)
  wanted = dict(ARCHITECTURES[found])
  if found in _WITH_EXPERTS and config.experts is not None:
    # llama.cpp always divides a token's probabilities by their sum, regardless of the file.
    switches = {"clamped": False, "biases": False} | _WITH_EXPERTS[found]
    wanted["experts"] = dataclasses.replace(config.experts, normalized=True, **switches)
  if found == "granite":
    wanted |= {ours: getattr(config, ours) for ours in _FACTORS.values()}
  if found in gguf_gemma.KNOWN:
    said = gguf_gemma.completed(found, gguf_gemma.described(found, config), config)
    wanted |= {name: getattr(said, name) for name in gguf_gemma.COMPLETED}
    if config.query_divisor is None and wanted["query_divisor"] == config.head_dim:
      wanted["query_divisor"] = None
  else:
    plain = {x: SWITCHES[x] for x in gguf_layers.COMPLETED} | {"rope_scaling": None}
    said = gguf_layers.described(found, config)
    said = gguf_layers.completed(found, said, dataclasses.replace(config, **plain))
    wanted |= {name: getattr(said, name) for name in gguf_layers.COMPLETED}
  checked_fields.check_switches(config, wanted, f"llama.cpp's architecture {found!r} has no")
  return found


def rotates_neighbours(architecture: str) -> bool:
  """Whether rotary positions rotate the pairs (x[2r], x[2r + 1]), not (x[r], x[r + H / 2])."""
  return architecture in ("llama", "granite", "smollm3", "mistral3")


def from_gguf(
  metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_factors: Mapping[str, np.ndarray]
) -> LlamaConfig | GPT2Config:
  """Returns the configuration that a GGUF file's metadata describes.

  tie_embeddings: whether the file lacks `output.weight`.
  rope_factors: its tensors among ROPE_FACTORS, {name: factors_R}.

  Raises ValueError for another architecture, a missing key, or an unknown rope scaling.
  """
  arch = metadata.get("general.architecture")
  if arch == _GPT2:
    return gpt2_configs.from_gguf(metadata, tie_embeddings=tie_embeddings)
  if not isinstance(arch, str) or arch not in ARCHITECTURES:
    supported = ", ".join(map(repr, (*ARCHITECTURES, _GPT2)))
    raise ValueError(f"general.architecture {shown(arch)} is not supported; supported: {supported}")
  experts = metadata.get(f"{arch}.expert_count", 0)
  if experts and arch not in _WITH_EXPERTS:
    raise ValueError(f"{arch}.expert_count={shown(experts)}: mixtures of experts are not supported")
  gemma = gguf_gemma.KNOWN.get(arch)
  window = metadata.get(f"{arch}.attention.sliding_window", 0)
  if window and gemma is None and arch not in gguf_layers.WINDOWS:
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
    experts=_experts_from_gguf(arch, metadata) if arch in _WITH_EXPERTS else None,
    **ARCHITECTURES[arch],
    **_factors(arch, metadata),
  )
  rotated = metadata.get(f"{arch}.rope.dimension_count", head_dim)
  if not checked_fields.is_(rotated, head_dim) and arch != "phi3":
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
  # The sizes have been checked, so arrays of these sizes can be made.
  complete = gguf_gemma.completed if gemma else gguf_layers.completed
  config = complete(arch, metadata, config)
  rope = _rope_from_gguf(arch, metadata, rope_factors, config)
  return dataclasses.replace(config, rope_scaling=rope)


def _factors(arch: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
  if arch != "granite":
    return {}
  return {
    ours: checked_fields.required(metadata, f"{arch}.{key}") for key, ours in _FACTORS.items()
  }


def to_gguf(
  config: LlamaConfig | GPT2Config,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns (metadata, rope_factors) of a GGUF file, the inverse of `from_gguf`.

  Raises ValueError as `architecture` does, for heads whose values are narrower than their keys, and
  for a scaling of rotary frequencies that llama.cpp does not support in the architecture.
  """
  arch = architecture(config)
  if isinstance(config, GPT2Config):
    return gpt2_configs.to_gguf(config), {}
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
  describe = gguf_gemma.described if arch in gguf_gemma.KNOWN else gguf_layers.described
  metadata |= describe(arch, config)
  scaling, factors = _rope_to_gguf(arch, config)
  return metadata | {f"{arch}.rope.scaling.{key}": x for key, x in scaling.items()}, factors


def _rope_to_gguf(arch: str, config: LlamaConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The metadata of the scaling of rotary frequencies, and the tensors of its factors."""
  rope = config.rope_scaling
  match rope:
    case LinearRope():
      return {"type": "linear", "factor": float(rope.factor)}, {}
    case Llama3Rope():
      if arch != "llama":
        raise ValueError(
          f"rope_scaling: llama.cpp's architecture {arch!r} has no scaling like Llama 3.1's"
        )
      frequencies_R = rotary_frequencies(config.rope_theta, config.head_dim)
      divisors_R = (frequencies_R / rope.scale(frequencies_R)).astype(np.float32)
      return {}, {ROPE_FACTORS[0]: divisors_R}
    case YarnRope(beta_fast=32, beta_slow=1) if rope.truncate == _truncates(arch):
      return _yarn(arch, rope), {}
    case LongRope() if arch == "phi3":
      scaling = {
        "type": "longrope",
        "original_context_length": rope.original_length,
        "attn_factor": float(rope.attention_factor),
      }
      factors = zip(ROPE_FACTORS[1:], (rope.long_factors, rope.short_factors), strict=True)
      return scaling, {name: np.asarray(x, np.float32) for name, x in factors}
    case None:
      return {}, {}
  raise ValueError(
    f"rope_scaling: llama.cpp's architecture {arch!r} has no {shown(rope)}; export the model as a "
    "folder"
  )


def _truncates(arch: str) -> bool:
  """Whether models of an architecture round the ends of YaRN's ramp to whole features."""
  return arch != "gpt-oss"


def _yarn(arch: str, rope: YarnRope) -> dict[str, Any]:
  """The metadata of YaRN; llama.cpp itself multiplies by the recommended attention factor."""
  log_multiplier = 1.0 if arch == "mistral3" else 0.0
  recommended = yarn_attention_factor(rope.factor, 1.0, log_multiplier)
  return {
    "type": "yarn",
    "factor": float(rope.factor),
    "original_context_length": rope.original_length,
    "attn_factor": rope.attention_factor / recommended,
    **({"yarn_log_multiplier": log_multiplier} if log_multiplier else {}),
  }


def _yarn_from_gguf(arch: str, scaling: Mapping[str, Any], context_length: int) -> YarnRope:
  """scaling: {key: value}, without the common prefix of the keys."""

  def check(key: str, *accepted: float) -> None:
    if not any(checked_fields.is_(scaling.get(key, accepted[0]), x) for x in accepted):
      supported = " or ".join(map(str, accepted))
      raise ValueError(
        f"rope.scaling.{key}={shown(scaling[key])} is not supported, only {supported}"
      )

  # Versions of llama.cpp differ in whether they read these.
  for key, off in _YARN_FIXED.items():
    check(key, off)
  if arch != "mistral3":
    check("yarn_log_multiplier", 0.0)
  factor = checked_fields.required(scaling, "factor")
  recommended = yarn_attention_factor(factor, 1.0, scaling.get("yarn_log_multiplier", 0.0))
  # Some writers put the recommended factor here, and llama.cpp multiplies by it once.
  check("yarn_attn_factor", 1.0, float(np.float32(recommended)))
  attention = scaling.get("attn_factor", 1.0)
  return YarnRope(
    factor=factor,
    original_length=scaling.get("original_context_length", context_length),
    attention_factor=attention * recommended if is_number(attention) else attention,
    truncate=_truncates(arch),
  )


def _experts_from_gguf(arch: str, metadata: Mapping[str, Any]) -> ExpertConfig:
  keys = {f"{arch}.{key}": ours for key, ours in _EXPERTS.items()}
  return ExpertConfig(**checked_fields.sizes(metadata, keys), **_WITH_EXPERTS[arch])


def _rope_from_gguf(
  arch: str, metadata: Mapping[str, Any], factors: Mapping[str, np.ndarray], config: LlamaConfig
) -> LinearRope | Llama3Rope | LongRope | YarnRope | None:
  theta, head_dim = config.rope_theta, config.head_dim
  kinds = ("none", "linear", "yarn", *(("longrope",) if arch == "phi3" else ()))
  kind = metadata.get(f"{arch}.rope.scaling.type", "none")
  if kind not in kinds:
    raise ValueError(
      f"{arch}.rope.scaling.type {shown(kind)} is not supported; supported: "
      f"{', '.join(map(repr, kinds))}"
    )
  if kind in ("linear", "yarn") and factors:
    raise ValueError(
      f"{arch}.rope.scaling.type {kind!r} and {next(iter(factors))} scale rope twice"
    )
  begin = f"{arch}.rope.scaling."
  scaling = {key.removeprefix(begin): x for key, x in metadata.items() if key.startswith(begin)}
  if kind == "yarn":
    return _yarn_from_gguf(arch, scaling, config.max_length)
  if kind == "linear":
    return LinearRope(factor=checked_fields.required(metadata, f"{arch}.rope.scaling.factor"))
  if kind == "longrope" or (arch == "phi3" and factors):
    # Older files have the factors but do not name a scaling.
    return _longrope_from_gguf(scaling, factors, config.max_length)
  factors_R = factors.get(ROPE_FACTORS[0])
  if factors_R is None:
    return None
  # The format stores the divisors of Llama 3.1's scaling rather than its four parameters. The
  # releases differ only in `factor`, which is the largest divisor.
  if factors_R.shape == (head_dim // 2,) and (factors_R > 0).all():
    rope = Llama3Rope(factor=round(float(factors_R.max()), 3))
    frequencies_R = rotary_frequencies(theta, head_dim)
    if np.allclose(frequencies_R / factors_R, rope.scale(frequencies_R), rtol=1e-4, atol=0):
      return rope
  raise ValueError(
    "rope_freqs.weight is not Llama 3.1's scaling of rotary frequencies; "
    "take the same model as safetensors, whose config.json says what it is"
  )


def _longrope_from_gguf(
  scaling: Mapping[str, Any], factors: Mapping[str, np.ndarray], context_length: int
) -> LongRope:
  """scaling: {key: value}, without the common prefix of the keys."""
  for name in ROPE_FACTORS[1:]:
    if name not in factors or factors[name].ndim != 1:
      raise ValueError(
        f"{name}: a list of numbers is needed, and "
        f"{f'its shape is {factors[name].shape}' if name in factors else 'the file lacks it'}"
      )
  long_factors, short_factors = (tuple(factors[x].tolist()) for x in ROPE_FACTORS[1:])
  return LongRope(
    short_factors=short_factors,
    long_factors=long_factors,
    original_length=scaling.get("original_context_length", context_length),
    attention_factor=scaling.get("attn_factor", 1.0),
  )
