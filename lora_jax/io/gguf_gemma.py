"""What GGUF files of Gemma 2 and 3 leave to a reader's knowledge of the architecture.

A file names the window and the soft caps; which layers have the window, the rotary base of those
that have, and the divisor of the scores are llama.cpp's (github.com/ggml-org/llama.cpp,
src/models/gemma2.cpp and gemma3.cpp). Norms are stored as what they multiply by, 1 + scale.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.io.gguf_layers import WINDOW, local_layers
from lora_jax.models.llama_config import LlamaConfig

_ATTENTION_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_LOCAL_THETA = "rope.freq_base_swa"


class Known(NamedTuple):
  """What a file of an architecture means by what it does not say.

  family: `model_type` of the same models.
  period: of so many layers in a row all but the last have the window.
  window: None: no layer has one.
  caps: of the scores and of the logits.
  theta, local_theta: the rotary bases of layers without and with the window; None: the first.
  wide_layers: in a model of so many layers, scores are divided as if its heads filled its width.
  has_head: whether a file may have a head of its own.
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
  "window", "local_layers", "local_rope_theta", "query_divisor", "attn_softcap", "logit_softcap",
)  # fmt: skip
"""The fields of a configuration that `completed` sets."""


def is_offset(path: str, config: LlamaConfig) -> bool:
  """Whether files hold the parameter at a path, of a model of these families, with 1 added."""
  return config.family in {x.family for x in KNOWN.values()} and path.endswith("scale")


def completed(arch: str, metadata: Mapping[str, Any], config: LlamaConfig) -> LlamaConfig:
  """Returns a configuration with what the metadata says, or leaves to be known, of these families.

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
  """Returns the metadata that says what a file can of these families.

  Raises ValueError for a head of its own where no file has one. What else differs between the
  model and what a reader makes of the metadata is seen by `completed`.
  """
  if not (config.tie_embeddings or KNOWN[arch].has_head):
    raise ValueError(
      f"llama.cpp's architecture {arch!r} has no head that is not tied to the embedding; export "
      "the model as a folder"
    )
  values = {
    WINDOW: config.window, _ATTENTION_CAP: config.attn_softcap, _LOGIT_CAP: config.logit_softcap,
    _LOCAL_THETA: config.local_rope_theta,
  }  # fmt: skip
  if config.local_rope_theta == KNOWN[arch].local_theta:
    del values[_LOCAL_THETA]  # which older readers do not look for
  return {
    f"{arch}.{key}": value if key == WINDOW else float(value)
    for key, value in values.items()
    if value is not None
  }
