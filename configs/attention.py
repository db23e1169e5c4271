"""Attention of low rank in the configs of encoders: `:attention=nystrom,landmarks=64`.

See `lora_jax.models.low_rank_attention`.
"""

import ml_collections


def choose(model: ml_collections.ConfigDict, name: str, landmarks: int) -> None:
  """Sets the fields of a config's `model` for attention.

  name: of the implementation; "auto" is exact.
  landmarks: of nystrom, or the projected positions of linformer; 0 for exact attention.
  """
  model.attention, model.attention_rank = name, landmarks
  model.attention_iterations = 6 if name == "nystrom" else 0  # the paper's
