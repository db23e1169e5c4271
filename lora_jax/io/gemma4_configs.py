"""Converts the `config.json` of Gemma 4's text model to and from `Gemma4Config`.

    config = from_hugging_face({"model_type": "gemma4_text", "hidden_size": 1536, ...})

As in `lora_jax.io.configs`, unknown and unsupported fields are refused by name. Experts, attention
to later tokens, and the vision and audio parts are not supported.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import checked_fields
from lora_jax.io.configs import check_known
from lora_jax.io.rope_fields import FULL, LOCAL
from lora_jax.models.gemma4 import Gemma4Config

Fields = Mapping[str, Any]

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "intermediate_size": "mlp_width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
  "max_position_embeddings": "max_length",
  "sliding_window": "window",
}
_SWITCHES = {
  "rms_norm_eps": "norm_eps",
  "tie_word_embeddings": "tie_embeddings",
  "final_logit_softcapping": "logit_softcap",
  "num_kv_shared_layers": "shared_layers",
  "use_double_wide_mlp": "wide_shared_mlp",
  "attention_k_eq_v": "keys_are_values",
}
_DEFAULTS = {
  "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
  "sliding_window": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
  "final_logit_softcapping": None, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
  "attention_k_eq_v": False, "vocab_size_per_layer_input": 262144,
  "hidden_size_per_layer_input": 256, "global_head_dim": 512,
}  # fmt: skip
"""Of fields that may be absent, as transformers' configuration has them."""
_FIXED = {
  "hidden_activation": "gelu_pytorch_tanh",
  "attention_bias": False,
  "enable_moe_block": False,
  "use_bidirectional_attention": None,
  "quantization_config": None,
}
"""By these a file may ask for more than the model does; the one value of each that is accepted."""
_READ = ("layer_types", "rope_parameters", "num_global_key_value_heads", "per_layer_config")
_NOT_THERE = ("num_experts", "top_k_experts", "moe_intermediate_size")
_PERIOD = 6  # by default, all but the last of this many layers have the window
_ROPE = {
  LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
  FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_ROPE_KEYS = {
  LOCAL: {"rope_type", "rope_theta"},
  FULL: {"rope_type", "rope_theta", "partial_rotary_factor"},
}
_OF_A_LAYER = ("head_dim", "num_key_value_heads")


def from_hugging_face(fields: Fields) -> Gemma4Config:
  """Returns the configuration that a parsed `config.json` describes.

  Raises ValueError for a missing field, a value of another type or out of range, an unknown field
  that is not null, empty or false, and unsupported features: experts, attention to later tokens,
  biases, another activation or scaling of rotary positions, quantized weights.
  """
  for field, accepted in _FIXED.items():
    if not checked_fields.is_(fields.get(field, accepted), accepted):
      raise ValueError(f"{field}={shown(fields[field])} is not supported, only {accepted!r}")
  known = {*_SIZES, *_SWITCHES, *_DEFAULTS, *_FIXED, *_READ}
  # Without the MoE block these have no effect.
  check_known("gemma4_text", {*known, *_NOT_THERE}, fields)
  fields = {**_DEFAULTS, **fields}
  found = checked_fields.sizes(fields, _SIZES)
  count = found["num_layers"]
  kinds = fields.get("layer_types")
  if kinds is None:
    kinds = [FULL if (i + 1) % _PERIOD == 0 or i + 1 == count else LOCAL for i in range(count)]
  if not isinstance(kinds, list) or len(kinds) != count or not {*map(repr, kinds)} <= _KINDS:
    raise ValueError(
      f"layer_types must be {LOCAL!r} or {FULL!r} for {count} layers, not {shown(kinds)}"
    )
  local = tuple(kind == LOCAL for kind in kinds)
  heads = _of_full_layers(fields, local)
  width = fields["hidden_size_per_layer_input"]
  has_rows = not checked_fields.is_(width, 0)
  config = Gemma4Config(
    **found,
    **heads,
    **{ours: fields[theirs] for theirs, ours in _SWITCHES.items()},
    local_layers=local,
    rotary_dim=2,
    per_layer_width=width if has_rows else None,
    per_layer_vocab=fields["vocab_size_per_layer_input"] if has_rows else None,
    classes=checked_fields.classes_of(fields),
  )
  # The sizes are within their limits, so values can be computed from them.
  return dataclasses.replace(config, **_rope(fields, config.full_head_dim))


_KINDS = {repr(LOCAL), repr(FULL)}


def _of_full_layers(fields: Fields, local: tuple[bool, ...]) -> dict[str, Any]:
  """The heads of the layers without the window; files of transformers 5 list them per layer."""
  own = checked_fields.object_of(fields, "per_layer_config")
  if own:
    full = [i for i, each in enumerate(local) if not each]
    ways = list(own.values())
    # Layer indices, such as "05".
    if sorted(int(key) if key.isdecimal() else -1 for key in own) != full or not all(
      way == ways[0] for way in ways
    ):
      raise ValueError(
        "per_layer_config: other heads are supported for all layers of full attention alike, and "
        f"for no other; it is {shown(own)}"
      )
    said = checked_fields.object_of(own, next(iter(own)))
    if unknown := [key for key in said if key not in _OF_A_LAYER]:
      raise ValueError(f"per_layer_config: {shown(unknown[0])} of a layer is not known")
    heads = checked_fields.given(said, "num_key_value_heads", fields["num_key_value_heads"])
    return {
      "full_head_dim": checked_fields.given(said, "head_dim", fields["head_dim"]),
      "full_kv_heads": heads,
    }
  heads = fields["num_key_value_heads"]
  if fields["attention_k_eq_v"]:
    heads = checked_fields.given(fields, "num_global_key_value_heads", heads)
  return {"full_head_dim": fields["global_head_dim"], "full_kv_heads": heads}


def _rope(fields: Fields, features: int) -> dict[str, Any]:
  """The rotary bases, and the number of rotated features of a head without the window."""
  rope = checked_fields.object_of(fields, "rope_parameters") or _ROPE
  if unknown := sorted(rope.keys() - {LOCAL, FULL}):
    raise ValueError(f"rope_parameters: {shown(unknown[0])} is neither {LOCAL!r} nor {FULL!r}")
  kinds = {kind: checked_fields.object_of(rope, kind) or _ROPE[kind] for kind in (LOCAL, FULL)}
  for kind, said in kinds.items():
    wanted = _ROPE[kind]["rope_type"]
    if not checked_fields.is_(said.get("rope_type", "default"), wanted):
      raise ValueError(
        f"rope_parameters: {kind!r} of type {shown(said.get('rope_type'))} is not supported, only "
        f"{wanted!r}"
      )
    if unknown := sorted(said.keys() - _ROPE_KEYS[kind]):
      raise ValueError(f"rope_parameters: {shown(unknown[0])} of {kind!r} is not known")
  fraction = checked_fields.given(kinds[FULL], "partial_rotary_factor", 1.0)
  if type(fraction) not in (int, float) or not 0 < fraction <= 1:
    raise ValueError(
      f"partial_rotary_factor must be a number above 0 and up to 1, not {shown(fraction)}"
    )
  return {
    "local_rope_theta": checked_fields.required(kinds[LOCAL], "rope_theta"),
    "rope_theta": checked_fields.required(kinds[FULL], "rope_theta"),
    "rotary_dim": 2 * int(fraction * features // 2),
  }


def to_hugging_face(config: Gemma4Config) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_hugging_face`.

  Raises ValueError for key/value heads of the layers without the window that files cannot express.
  """
  fields = {
    **checked_fields.head_fields("Gemma4ForCausalLM", config.classes),
    "model_type": "gemma4_text",
    **{theirs: getattr(config, ours) for theirs, ours in (_SIZES | _SWITCHES).items()},
    **_FIXED,
    "layer_types": [LOCAL if local else FULL for local in config.local_layers],
    "global_head_dim": config.full_head_dim,
    "num_global_key_value_heads": config.full_kv_heads if config.keys_are_values else None,
    "hidden_size_per_layer_input": config.per_layer_width or 0,
    "vocab_size_per_layer_input": config.per_layer_vocab or config.vocab_size,
    "rope_parameters": {
      LOCAL: {"rope_type": "default", "rope_theta": config.local_rope_theta},
      FULL: {
        "rope_type": "proportional",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.rotary_dim / config.full_head_dim,
      },
    },
  }
  del fields["quantization_config"]
  said = from_hugging_face(fields)
  for name in ("full_kv_heads", "rotary_dim"):
    if getattr(said, name) != getattr(config, name):
      raise ValueError(
        f"config.json of the family 'gemma4_text' has no field for {name}={getattr(config, name)}"
      )
  return fields
