"""Limits of a model's sizes and values, checked before anything of that size is allocated.

A configuration comes from a file, and a single value in it can exhaust the memory.
"""

import math
from collections.abc import Sequence
from typing import Any

# Larger than in any model, and small enough to trace shapes in seconds and to count elements in
# XLA's integers.
LARGEST = {
  "vocab_size": 1 << 24, "width": 1 << 20, "mlp_width": 1 << 22, "num_layers": 1 << 10,
  "num_heads": 1 << 14, "num_kv_heads": 1 << 14, "head_dim": 1 << 14, "max_length": (1 << 31) - 1,
  "window": (1 << 31) - 1, "num_experts": 1 << 14, "per_token": 1 << 14, "rotary_dim": 1 << 14,
  "query_length": (1 << 31) - 1, "full_kv_heads": 1 << 14, "full_head_dim": 1 << 14,
  "shared_layers": 1 << 10, "per_layer_width": 1 << 14, "per_layer_vocab": 1 << 24,
  "image_size": 1 << 14, "patch_size": 1 << 12, "channels": 1 << 12,
  "conv_channels": 1 << 14, "conv_windows": 1 << 10, "conv_strides": 1 << 10,
  "position_window": 1 << 12, "position_groups": 1 << 14, "decoder_layers": 1 << 10,
  "max_frames": (1 << 31) - 1, "mels": 1 << 12,
  "stem_width": 1 << 14, "divisor": 1 << 10, "least_channels": 1 << 14, "output_stride": 32,
}  # fmt: skip
MOST_SEPARATE_LAYERS = 128
"""The limit for a model whose layers are never stacked: each is traced on its own."""

MOST_LEARNED_POSITIONS = 1 << 24
"""The limit for a model with learned positions, which allocates a table of this length."""
# Outside these ranges, a rotary frequency is not a float32, or RMSNorm is another function.
RANGES = {
  "rope_theta": (1.0, 1e15), "local_rope_theta": (1.0, 1e15), "norm_eps": (1e-30, 0.1),
  "query_divisor": (1e-3, 1e9), "attn_softcap": (1e-3, 1e9), "logit_softcap": (1e-3, 1e9),
  "embedding_multiplier": (1e-6, 1e6), "attention_multiplier": (1e-6, 1e6),
  "residual_multiplier": (1e-6, 1e6), "logit_divisor": (1e-6, 1e6), "query_growth": (0.0, 1e3),
  "width_multiplier": (1e-3, 64.0), "expansion": (0.1, 64.0),
}  # fmt: skip


def is_number(value: Any) -> bool:
  """Whether a value is a finite int or float, and not a bool."""
  return type(value) is int or (type(value) is float and math.isfinite(value))


def check(where: str, name: str, kind: Any, value: Any) -> None:
  """Checks a setting of a model.

  Args:
    where: the start of the message.
    name: of the setting, a key of LARGEST for an int and of RANGES for a float.
    kind: int, float or bool; others are not checked.
    value: the value to check.

  Raises:
    ValueError: if it has another type or is out of range.
  """
  where = f"{where}: {name}"
  if kind is int:
    if type(value) is not int or value < 1:
      raise ValueError(f"{where} must be a positive integer, not {value!r:.40}")
    if value > LARGEST[name]:
      raise ValueError(f"{where} {value!r:.40} is over the limit of {LARGEST[name]:,}")
  if kind is float:
    least, most = RANGES[name]
    if not (is_number(value) and least <= value <= most):
      raise ValueError(f"{where} must be a number from {least} to {most}, not {value!r:.40}")
  if kind is bool and type(value) is not bool:
    raise ValueError(f"{where} must be True or False, not {value!r:.40}")


def check_separate_layers(where: str, **counts: int) -> None:
  """Raises ValueError for more layers than a model with separate layers may have.

  where: the start of the message.
  counts: the number of layers by the name of the setting.
  """
  for name, count in counts.items():
    if count > MOST_SEPARATE_LAYERS:
      raise ValueError(
        f"{where}: {name} {count} is over the limit of {MOST_SEPARATE_LAYERS} for layers that are "
        "not stacked"
      )


def check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
  """Checks a setting that is one of a few strings; arguments and errors as in `check`."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"{where}: {name} {value!r:.40} is not one of {', '.join(choices)}")
