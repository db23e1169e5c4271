"""Settings of layers that GGUF files leave implicit in some architectures.

They are the layers with the window, the layers without rotary positions, and the growth of queries.
A file has some of them, and llama.cpp hardcodes the rest (github.com/ggml-org/llama.cpp,
src/models/smollm3.cpp, olmo2.cpp, openai-moe.cpp, mistral3.cpp and phi3.cpp). Gemma's are in
`gguf_gemma`.

llama.cpp differs from the model in two ways that a file cannot express. It rounds the ends of
YaRN's ramp in gpt-oss, which the model does not; files are read with the model's ends. It has no
window in Phi 3; the window is read, and a model whose context exceeds its window is not written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import checked_fields
from lora_jax.models.llama_config import LlamaConfig, rotary_features
from lora_jax.models.rope import YarnRope

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
ORIGINAL_LENGTH = "rope.scaling.original_context_length"
_GROWTH = "attention.temperature_scale"
_UNROTATED = 4  # every fourth layer of a SmolLM 3 is not rotated

PERIODS = {"olmo2": 4, "gpt-oss": 2}
"""Of so many layers in a row all but the last have the window, where the file has one."""
WINDOWS = (*PERIODS, "phi3")
"""Architectures whose files may have a window."""
NEED_HEAD = ("olmo2", "gpt-oss")
"""Those that have a head of their own."""
SHARE_WIDTH = ("olmo2", "phi3")
"""Those whose heads share the width of the model."""

COMPLETED = (
  "window", "local_layers", "local_rope_theta", "rotated_layers", "query_growth", "query_length",
  "rotary_dim",
)  # fmt: skip
"""The fields of a configuration that `completed` sets."""


def local_layers(
  arch: str, metadata: Mapping[str, Any], period: int, num_layers: int
) -> tuple[bool, ...]:
  """For each layer whether it has the window, by the file's pattern or otherwise by a period.

  Raises ValueError for a pattern without one entry per layer.
  """
  pattern = metadata.get(f"{arch}.{PATTERN}", period)
  if type(pattern) is int and pattern > 0:
    return tuple(i % pattern < pattern - 1 for i in range(num_layers))
  if isinstance(pattern, list) and len(pattern) == num_layers:
    return tuple(map(bool, pattern))
  raise ValueError(
    f"{arch}.{PATTERN}={shown(pattern)} is neither a period nor a list of {num_layers} layers"
  )


def completed(arch: str, metadata: Mapping[str, Any], config: LlamaConfig) -> LlamaConfig:
  """Returns a configuration with the explicit and implicit settings of its layers.

  config: with its sizes and its rotary positions, which have been checked.

  Raises ValueError for a pattern of windows without one entry per layer, and for an invalid window,
  growth or number of rotated features.
  """
  if arch == "gpt-oss":
    checked_fields.required(metadata, f"{arch}.{WINDOW}")
  window = metadata.get(f"{arch}.{WINDOW}", 0) or None
  changes: dict[str, Any] = {}
  match arch:
    case "smollm3":
      rotated = tuple((i + 1) % _UNROTATED != 0 for i in range(config.num_layers))
      changes["rotated_layers"] = () if all(rotated) else rotated
    case "mistral3":
      length = metadata.get(f"{arch}.{ORIGINAL_LENGTH}", config.max_length)
      changes |= {"query_growth": metadata.get(f"{arch}.{_GROWTH}", 0.0), "query_length": length}
    case "phi3":
      features = metadata.get(f"{arch}.rope.dimension_count", config.head_dim)
      whole = checked_fields.is_(features, config.head_dim)
      changes |= {"window": window, "rotary_dim": None if whole else features}
    case "olmo2" | "gpt-oss" if window is not None:
      local = local_layers(arch, metadata, PERIODS[arch], config.num_layers)
      if any(local):
        changes |= {"window": window, "local_layers": () if all(local) else local}
      if arch == "olmo2":
        changes["family"] = "olmo3"
        changes["local_rope_theta"] = config.rope_theta if any(local) else None
  return dataclasses.replace(config, **changes)


def described(arch: str, config: LlamaConfig) -> dict[str, Any]:
  """Returns the metadata of the layers.

  Raises ValueError for settings that files of the architecture cannot have. `completed` detects all
  other differences between the model and the metadata.
  """
  where = f"llama.cpp's architecture {arch!r}"
  if arch in NEED_HEAD and config.tie_embeddings:
    raise ValueError(
      f"{where} has no head that is tied to the embedding; export the model as a folder"
    )
  if arch in SHARE_WIDTH and config.num_heads * config.head_dim != config.width:
    raise ValueError(
      f"head_dim {config.head_dim}: in {where} the {config.num_heads} heads share the width "
      f"{config.width}; export the model as a folder"
    )
  if arch == "phi3":
    if config.window is not None and config.window < config.max_length:
      raise ValueError(f"{where} has no window={config.window}; export the model as a folder")
    # Older versions of llama.cpp use a window unless the file explicitly disables it.
    return {
      f"{arch}.{WINDOW}": config.window or 0,
      f"{arch}.rope.dimension_count": rotary_features(config),
    }
  if arch == "mistral3" and config.query_growth is not None:
    rope = config.rope_scaling
    if isinstance(rope, YarnRope) and rope.original_length != config.query_length:
      raise ValueError(
        f"{where} has one length for the growth of queries and for YaRN, and the model has "
        f"{config.query_length} and {rope.original_length}; export the model as a folder"
      )
    return {
      f"{arch}.{_GROWTH}": float(config.query_growth),
      f"{arch}.{ORIGINAL_LENGTH}": config.query_length,
    }
  if arch == "gpt-oss" and config.window is None:
    raise ValueError(f"{where} has no window=None; export the model as a folder")
  if arch in PERIODS and config.window is not None:
    return {f"{arch}.{WINDOW}": config.window}
  return {}
