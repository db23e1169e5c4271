"""Converts GPT-2's `config.json` and GGUF metadata to and from `GPT2Config`.

    config = from_hugging_face({"model_type": "gpt2", "n_embd": 768, ...})
    config = from_gguf({"general.architecture": "gpt2", "gpt2.embedding_length": 768, ...}, ...)

As in `lora_jax.io.configs`, unknown and unsupported fields are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import checked_fields
from lora_jax.io.configs import check_known
from lora_jax.models.gpt2 import GPT2Config

Fields = Mapping[str, Any]

_SIZES = {
  "vocab_size": "vocab_size",
  "n_embd": "width",
  "n_layer": "num_layers",
  "n_head": "num_heads",
  "n_positions": "max_length",
}
_SWITCHES = {
  "scale_attn_weights": "scale_scores",
  "scale_attn_by_inverse_layer_idx": "scale_by_layer",
  "tie_word_embeddings": "tie_embeddings",
}
_DEFAULTS = {
  "n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
  "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
  "tie_word_embeddings": True, "add_cross_attention": False,
}  # fmt: skip
"""Of fields that may be absent, as transformers' configuration has them."""

_ACTIVATIONS = {
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu": "gelu",
}
# Ignored fields, in addition to those ignored for every family. The softmax is always in float32,
# so upcasting has no effect; summaries belong to other heads; n_ctx was the size of a mask.
_IGNORED = (
  "reorder_and_upcast_attn", "n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_type",
  "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
  "n_special", "predict_special_tokens", "_num_labels", "gradient_checkpointing",
)  # fmt: skip

_GGUF = "gpt2"
"""llama.cpp's name of the architecture."""
_GGUF_SIZES = {
  f"{_GGUF}.embedding_length": "width",
  f"{_GGUF}.feed_forward_length": "mlp_width",
  f"{_GGUF}.block_count": "num_layers",
  f"{_GGUF}.attention.head_count": "num_heads",
  f"{_GGUF}.context_length": "max_length",
}
_GGUF_EPS = f"{_GGUF}.attention.layer_norm_epsilon"
_AS_LLAMA_CPP = {
  "activation": "gelu_tanh",
  "scale_scores": True,
  "scale_by_layer": False,
  "classes": (),
}
"""The only settings that llama.cpp supports."""


def from_hugging_face(fields: Fields) -> GPT2Config:
  """Returns the configuration that a parsed `config.json` describes.

  Raises ValueError for a missing field, a value of another type or out of range, an unknown field
  that is not null, empty or false, another activation, cross attention, and quantized weights.
  """
  if fields.get("quantization_config"):
    raise ValueError("quantization_config: quantized safetensors are not supported")
  check_known("gpt2", {*_SIZES, *_DEFAULTS, *_IGNORED}, fields)
  found = checked_fields.sizes(fields, _SIZES)
  fields = {**_DEFAULTS, **fields}
  if not checked_fields.is_(fields["add_cross_attention"], False):
    raise ValueError(
      f"add_cross_attention={shown(fields['add_cross_attention'])} is not supported, only False"
    )
  activation = fields["activation_function"]
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise ValueError(
      f"activation_function={shown(activation)} is not supported; supported: "
      f"{', '.join(map(repr, _ACTIVATIONS))}"
    )
  return GPT2Config(
    **found,
    head_dim=_head_dim(found, "n_embd", "n_head"),
    mlp_width=checked_fields.given(fields, "n_inner", 4 * found["width"]),
    norm_eps=fields["layer_norm_epsilon"],
    activation=_ACTIVATIONS[activation],
    classes=checked_fields.classes_of(fields),
    **{ours: fields[theirs] for theirs, ours in _SWITCHES.items()},
  )


def to_hugging_face(config: GPT2Config) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_hugging_face`.

  Raises ValueError if the heads together are not as wide as the model.
  """
  _check_heads(config)
  spelling = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  return {
    **checked_fields.head_fields("GPT2LMHeadModel", config.classes),
    "model_type": "gpt2",
    **{theirs: getattr(config, ours) for theirs, ours in (_SIZES | _SWITCHES).items()},
    "n_inner": config.mlp_width,
    "layer_norm_epsilon": config.norm_eps,
    "activation_function": spelling[config.activation],
    "add_cross_attention": False,
  }


def from_gguf(metadata: Fields, *, tie_embeddings: bool) -> GPT2Config:
  """Returns the configuration that a GGUF file's metadata describes.

  tie_embeddings: whether the file lacks `output.weight`.

  Raises ValueError for a missing key, and for a size out of range.
  """
  tokens = metadata.get("tokenizer.ggml.tokens")
  found = checked_fields.sizes(metadata, _GGUF_SIZES)
  return GPT2Config(
    width=found["width"],
    mlp_width=found["mlp_width"],
    num_layers=found["num_layers"],
    num_heads=found["num_heads"],
    max_length=found["max_length"],
    head_dim=_head_dim(found, f"{_GGUF}.embedding_length", f"{_GGUF}.attention.head_count"),
    vocab_size=metadata.get(f"{_GGUF}.vocab_size", len(tokens) if isinstance(tokens, list) else 0),
    norm_eps=checked_fields.required(metadata, _GGUF_EPS),
    tie_embeddings=tie_embeddings,
  )


def to_gguf(config: GPT2Config) -> dict[str, Any]:
  """Returns the metadata of a GGUF file, the inverse of `from_gguf`.

  Raises ValueError for features that llama.cpp does not support.
  """
  check_gguf(config)
  return {
    **{key: getattr(config, ours) for key, ours in _GGUF_SIZES.items()},
    f"{_GGUF}.vocab_size": config.vocab_size,
    _GGUF_EPS: float(config.norm_eps),
  }


def check_gguf(config: GPT2Config) -> None:
  """Raises ValueError for a model that llama.cpp would compute differently."""
  _check_heads(config)
  for field, computed in _AS_LLAMA_CPP.items():
    if (value := getattr(config, field)) != computed:
      raise ValueError(
        f"llama.cpp's architecture {_GGUF!r} has no {field}={shown(value)}; export the model as a "
        "folder"
      )


def _head_dim(found: Mapping[str, int], width: str, heads: str) -> int:
  """The features of a head; the field names are for the error."""
  if found["width"] % found["num_heads"]:
    raise ValueError(
      f"{width} {shown(found['width'])} is not a multiple of {heads} {shown(found['num_heads'])}"
    )
  return found["width"] // found["num_heads"]


def _check_heads(config: GPT2Config) -> None:
  if config.num_heads * config.head_dim != config.width:
    raise ValueError(
      f"{config.num_heads} heads of {config.head_dim} features are not together as wide as the "
      f"model, {config.width}, and a GPT-2's files have no field for that"
    )
