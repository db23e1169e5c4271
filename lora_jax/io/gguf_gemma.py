"""Settings of Gemma 2 and 3 that GGUF files leave implicit in the architecture.

A file has the window and the soft caps. The layers with the window, their rotary base, and the
divisor of the scores are hardcoded in llama.cpp (github.com/ggml-org/llama.cpp,
src/models/gemma2.cpp and gemma3.cpp). Norms are stored as their factor, 1 + scale.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.io.gguf_layers import WINDOW, local_layers
from lora_jax.models.llama_config import LlamaConfig

_ATTENTION_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_LOCAL_THETA = "rope.freq_base_swa"


class Known(NamedTuple):
  """The implicit settings of an architecture.

  family: `model_type` of the same models.
  period: in each group of this many layers all but the last have the window.
  window: None: no layer has one.
  caps: of the scores and of the logits.
  theta, local_theta: the rotary bases of layers without and with the window; None: the first.
  wide_layers: with this many layers, scores are divided as if the heads filled the model's width.
  has_head: whether a file may have an untied head.
  """

  family: str
  period: int
  window: int | None
  caps: tuple[float | None, float | None]
  theta: float
  local_theta: float | None
  wide_layers: int
  has_head: bool


KNOWN = {
  "gemma2": Known("gemma2", 2, 4096, (50.0, 30.0), 1e4, None, 46, False),
  "gemma3": Known("gemma3_text", 6, None, (None, None), 1e6, 1e4, 62, True),
}
"""By llama.cpp's name of the architecture."""


COMPLETED = (
  "window",
  "local_layers",
  "local_rope_theta",
  "query_divisor",
  "attn_softcap",
  "logit_softcap",
)
"""The fields of a configuration that `completed` sets."""


def is_offset(path: str, config: LlamaConfig) -> bool:
  """Whether files store the parameter at a path with 1 added, in models of these families."""
  return config.family in {x.family for x in KNOWN.values()} and path.endswith("scale")


def completed(arch: str, metadata: Mapping[str, Any], config: LlamaConfig) -> LlamaConfig:
  """Returns a configuration with the explicit and implicit settings of these families.

  config: with its sizes, which have been checked.

  Raises ValueError for layers with a window that are not one for each layer.
  """
  known = KNOWN[arch]

  def said(key: str, default: Any) -> Any:
    return metadata.get(f"{arch}.{key}", default)

  window = said(WINDOW, known.window) or None
  local = local_layers(arch, metadata, known.period, config.num_layers)
  window = window if any(local) else None
  is_wide = config.num_layers == known.wide_layers
  return dataclasses.replace(
    config,
    window=window,
    local_layers=() if window is None or all(local) else local,
    local_rope_theta=None if window is None else said(_LOCAL_THETA, known.local_theta),
    query_divisor=float(config.width // config.num_heads if is_wide else config.head_dim),
    attn_softcap=said(_ATTENTION_CAP, known.caps[0]),
    logit_softcap=said(_LOGIT_CAP, known.caps[1]),
  )


def described(arch: str, config: LlamaConfig) -> dict[str, Any]:
  """Returns the metadata of these families.

  Raises ValueError for an untied head if files cannot have one. `completed` detects all other
  differences between the model and the metadata.
  """
  if not (config.tie_embeddings or KNOWN[arch].has_head):
    raise ValueError(
      f"llama.cpp's architecture {arch!r} has no head that is not tied to the embedding; export "
      "the model as a folder"
    )
  values = {
    WINDOW: config.window,
    _ATTENTION_CAP: config.attn_softcap,
    _LOGIT_CAP: config.logit_softcap,
    _LOCAL_THETA: config.local_rope_theta,
  }
  if config.local_rope_theta == KNOWN[arch].local_theta:
    del values[_LOCAL_THETA]  # older readers do not read it
  return {
    f"{arch}.{key}": value if key == WINDOW else float(value)
    for key, value in values.items()
    if value is not None
  }
