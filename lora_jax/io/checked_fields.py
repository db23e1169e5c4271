"""Checks fields of a file that describes a model; a ValueError names the field and its value."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.models.llama_config import LlamaConfig, value_features

# Switches of relatives of Llama, with the value for a Llama.
_NAMES = (
  "qkv_bias", "qk_norm", "window", "local_layers", "local_rope_theta", "activation", "unit_offset",
  "post_norms", "scale_embeddings", "query_divisor", "attn_softcap", "logit_softcap", "fused",
  "rotary_dim", "pre_norms", "whole_qk_norm", "rotated_layers", "embedding_multiplier",
  "attention_multiplier", "residual_multiplier", "logit_divisor", "query_growth", "query_length",
  "classes",
  "out_bias", "attn_sinks", "experts",
)  # fmt: skip
SWITCHES = {
  field.name: field.default for field in dataclasses.fields(LlamaConfig) if field.name in _NAMES
}


def required(fields: Mapping[str, Any], key: str) -> Any:
  """Returns the value of a required field."""
  if key not in fields:
    raise ValueError(f"lacks {key}")
  return fields[key]


def sizes(fields: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, int]:
  """`{field of LlamaConfig: value}` by `{field of the file: field of LlamaConfig}`."""
  found = {ours: required(fields, theirs) for theirs, ours in table.items()}
  for theirs, ours in table.items():
    if type(found[ours]) is not int or found[ours] < 1:
      raise ValueError(f"{theirs} must be a positive integer, not {shown(found[ours])}")
  return found


def given(fields: Mapping[str, Any], field: str, default: Any) -> Any:
  """Returns the value of a field, or the default if it is absent or null."""
  value = fields.get(field)
  return default if value is None else value


def object_of(fields: Mapping[str, Any], field: str) -> Mapping[str, Any]:
  """Returns the object of a field, empty if it is absent or null."""
  value = given(fields, field, {})
  if not isinstance(value, Mapping):
    raise ValueError(f"{field} must be an object, not {shown(value)}")
  return value


def is_(value: Any, wanted: Any) -> bool:
  """Whether two values are equal and of the same type; true is not 1."""
  return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def check_switches(config: LlamaConfig, wanted: Mapping[str, Any], where: str) -> None:
  """Raises ValueError unless the switches of a model are those of a format, by default a Llama's.

  where: the start of the message, as "llama.cpp's architecture 'llama' has no".
  """
  for name, off in SWITCHES.items():
    value = getattr(config, name)
    if value != wanted.get(name, off):
      raise ValueError(f"{where} {name}={shown(value)}; export the model as a folder")


def check_values(config: LlamaConfig, reason: str) -> None:
  """Raises ValueError if a head's values are narrower than its keys."""
  if value_features(config) != config.head_dim:
    raise ValueError(
      f"value_dim {config.value_dim}: a head's values are narrower than its {config.head_dim} "
      f"features of keys, and {reason}; write the model as a program (compress.artifact), or "
      "compress it without the step value_heads"
    )


_LANGUAGE_MODEL, _CLASSIFIER = re.compile("ForCausalLM|LMHeadModel"), "ForSequenceClassification"


def classes_of(
  fields: Mapping[str, Any], endings: tuple[str, ...] = (_CLASSIFIER,)
) -> tuple[str, ...]:
  """Returns the classes of a ...ForSequenceClassification, in output order; () for others.

  endings: the suffixes of architectures with a classification head.

  Raises ValueError for an architecture that is neither that nor a language model, and for an
  `id2label` that does not name 0, 1, ….
  """
  listed = fields.get("architectures") or []
  if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
    raise ValueError(f"architectures must be a list of names, not {shown(listed)}")
  if not any(name.endswith(endings) for name in listed):
    return ()
  labels = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as in transformers
  numbers = [str(n) for n in range(len(labels))]
  if not isinstance(labels, dict) or sorted(labels, key=len) != sorted(numbers, key=len):
    raise ValueError(f"id2label must have a name for 0, 1, …, not {shown(labels)}")
  names = tuple(labels[number] for number in numbers)
  if not all(isinstance(name, str) for name in names):
    raise ValueError(f"id2label must have texts for names, not {shown(labels)}")
  return names


def head_fields(architecture: str, classes: tuple[str, ...]) -> dict[str, Any]:
  """Returns the fields of a config.json that describe the head of a model."""
  if not classes:
    return {"architectures": [architecture]}
  return {
    "architectures": [_LANGUAGE_MODEL.sub(_CLASSIFIER, architecture)],
    "id2label": {str(n): name for n, name in enumerate(classes)},
    "label2id": {name: n for n, name in enumerate(classes)},
  }
