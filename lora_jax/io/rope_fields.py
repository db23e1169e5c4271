"""Converts the fields of a `config.json` about rotary positions to and from `LlamaConfig`.

Version 5 of transformers writes `rope_parameters`, with theta in it, and one for each kind of layer
where they differ; the older ones wrote `rope_theta` and `rope_scaling`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io.checked_fields import given, is_, object_of, required
from lora_jax.models.llama_config import LlamaConfig, rotary_features
from lora_jax.models.rope import (
  DynamicRope,
  LinearRope,
  Llama3Rope,
  LongRope,
  RopeScaling,
  YarnRope,
  longrope_attention_factor,
  yarn_attention_factor,
)

Fields = Mapping[str, Any]

LOCAL, FULL = "sliding_attention", "full_attention"
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""The types of scaling that are read."""

_KEYS = frozenset({
  "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
  "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
  "mscale_all_dim", "truncate", "short_factor", "long_factor", "partial_rotary_factor",
})  # fmt: skip
_GROWTH = "llama_4_scaling_beta"
_ORIGINAL = "original_max_position_embeddings"
_FRACTION = "partial_rotary_factor"
_LOCAL_THETA = "rope_local_base_freq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeStyle:
  """The style of a family's fields of rotary positions.

  two: whether the layers with a window have their own rotary frequencies.
  partial: whether the model rotates only some of a head's features.
  grows: whether queries grow with their positions, by the scaling of Llama 4.
  `beside`: whether `original_max_position_embeddings` is a field of the file rather than a rotary
    parameter.
  renamed: {a type of scaling: its meaning in the family}.
  default: the parameters of a file without any.
  """

  two: bool = False
  partial: bool = False
  grows: bool = False
  beside: bool = False
  renamed: Fields = dataclasses.field(default_factory=dict)
  default: Fields = dataclasses.field(default_factory=dict)


def read(fields: Fields, head_dim: int, style: RopeStyle) -> dict[str, Any]:
  """Returns the fields of `LlamaConfig` that say how positions are rotated.

  fields: of the file, with the family's defaults.
  head_dim: H.

  Raises ValueError for a field that is not known, and for a scaling that is not supported.
  """
  rope, old = object_of(fields, "rope_parameters"), object_of(fields, "rope_scaling")
  found, local = {}, {}
  if style.two:
    rope, local = _of_kinds(fields, rope)
    # In the older spelling theta is that of all layers, where it has not two fields.
    found["local_rope_theta"] = given(
      local, "rope_theta", given(fields, _LOCAL_THETA, fields["rope_theta"])
    )
    if _scaling(local, fields, style) is not None:
      raise ValueError(f"rope_parameters: scaled frequencies of {LOCAL!r} are not supported")
  new, rope = rope, rope or old or style.default
  for each in (rope, local):
    _check_known(each, style)
  fraction = given(rope, _FRACTION, given(fields, _FRACTION, 1.0))
  if not is_(fraction, 1.0):
    found["rotary_dim"] = _rotary_dim(fraction, head_dim, style.partial)
  if new and old and _scaling(new, fields, style) != _scaling(old, fields, style):
    raise ValueError(
      f"rope_scaling {shown(old)} is another scaling than rope_parameters; delete one of them"
    )
  if style.grows:
    found |= {
      "query_growth": required(rope, _GROWTH),
      "query_length": given(rope, _ORIGINAL, fields["max_position_embeddings"]),
    }
  return found | {
    "rope_theta": given(rope, "rope_theta", fields["rope_theta"]),
    "rope_scaling": _scaling(rope, fields, style),
  }


def _check_known(rope: Fields, style: RopeStyle) -> None:
  known = _KEYS | ({_GROWTH, "max_position_embeddings"} if style.grows else set())
  if unknown := [key for key in rope if key not in known and rope[key] is not None]:
    raise ValueError(f"rope_parameters: {shown(unknown[0])}={shown(rope[unknown[0]])} is not known")
  if style.two and not is_(given(rope, "truncate", True), True):
    raise ValueError(
      "rope_parameters: truncate is not read by transformers where layers have rotary frequencies "
      "of their own; delete it"
    )


def _rotary_dim(fraction: Any, head_dim: int, partial: bool) -> int:
  if not partial:
    raise ValueError("partial_rotary_factor: rotating some of a head's features is not supported")
  if type(fraction) is not float or not 0 < fraction < 1:
    raise ValueError(
      f"partial_rotary_factor must be a number above 0 and up to 1, not {shown(fraction)}"
    )
  return int(head_dim * fraction)


def _of_kinds(fields: Fields, rope: Fields) -> tuple[Fields, Fields]:
  """The parameters of the layers without a window, and of those with one."""
  if not {LOCAL, FULL} & rope.keys():
    if rope and _LOCAL_THETA not in fields:
      raise ValueError(
        f"rope_parameters has neither {LOCAL!r} nor {FULL!r}, and each kind of layer has its own"
      )
    return rope, {}
  if unknown := sorted(rope.keys() - {LOCAL, FULL}):
    raise ValueError(f"rope_parameters: {shown(unknown[0])} is neither {LOCAL!r} nor {FULL!r}")
  return object_of(rope, FULL), object_of(rope, LOCAL)


def _scaling(rope: Fields, fields: Fields, style: RopeStyle) -> RopeScaling | None:
  kind = given(rope, "rope_type", given(rope, "type", "default"))
  kind = style.renamed.get(kind, kind) if isinstance(kind, str) else kind
  longest = fields["max_position_embeddings"]
  original = given(rope, _ORIGINAL, longest)
  match kind:
    case "default":
      return None
    case "linear":
      return LinearRope(factor=required(rope, "factor"))
    case "dynamic":
      return DynamicRope(factor=required(rope, "factor"), original_length=longest)
    case "llama3":
      return Llama3Rope(
        factor=required(rope, "factor"),
        low_freq_factor=required(rope, "low_freq_factor"),
        high_freq_factor=required(rope, "high_freq_factor"),
        original_length=required(rope, _ORIGINAL),
      )
    case "yarn":
      factor = required(rope, "factor")
      weights = [given(rope, name, 0.0) for name in ("mscale", "mscale_all_dim")]
      attention = given(rope, "attention_factor", None)
      return YarnRope(
        factor=factor,
        original_length=original,
        attention_factor=yarn_attention_factor(factor, *weights)
        if attention is None
        else attention,
        beta_fast=given(rope, "beta_fast", 32.0),
        beta_slow=given(rope, "beta_slow", 1.0),
        truncate=given(rope, "truncate", True),
      )
    case "longrope":
      # In transformers the field goes before the parameter.
      original = given(fields, _ORIGINAL, original) if style.beside else original
      factors = [_numbers(rope, name) for name in ("short_factor", "long_factor")]
      attention = given(rope, "attention_factor", None)
      if attention is None:
        factor = given(rope, "factor", None)
        attention = longrope_attention_factor(
          _ratio(longest, original) if factor is None else factor, original
        )
      return LongRope(
        short_factors=factors[0],
        long_factors=factors[1],
        original_length=original,
        attention_factor=attention,
      )
  raise ValueError(
    f"rope scaling of type {shown(kind)} is not supported; supported: {', '.join(map(repr, KINDS))}"
  )


def _ratio(longest: Any, original: Any) -> Any:
  for name, value in (("max_position_embeddings", longest), (_ORIGINAL, original)):
    if type(value) is not int or value < 1:
      raise ValueError(f"{name} must be a positive integer, not {shown(value)}")
  return longest / original


def _numbers(rope: Fields, name: str) -> tuple:
  value = required(rope, name)
  if not isinstance(value, list):
    raise ValueError(f"{name} must be a list of numbers, not {shown(value)}")
  return tuple(value)


def written(config: LlamaConfig, style: RopeStyle) -> dict[str, Any]:
  """Returns the fields of a `config.json`, in the spellings of transformers 4 and 5."""
  scaling, beside = _scaling_fields(config.rope_scaling), {}
  if style.grows:
    scaling = (scaling or {"rope_type": "default"}) | {
      _GROWTH: config.query_growth,
      _ORIGINAL: config.query_length,
    }
  rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
  if style.partial:
    beside[_FRACTION] = rotary_features(config) / config.head_dim
    rope |= beside
  if style.beside:
    beside[_ORIGINAL] = rope.get(_ORIGINAL, config.max_length)
  if style.two:
    theta = given(vars(config), "local_rope_theta", config.rope_theta)
    rope = {LOCAL: {"rope_type": "default", "rope_theta": theta}, FULL: rope}
  return beside | {
    "rope_theta": config.rope_theta,
    "rope_scaling": _three_fields(config) if style.beside else scaling,
    "rope_parameters": rope,
  }


def _three_fields(config: LlamaConfig) -> dict[str, Any] | None:
  """LongRoPE as transformers 4 has it for Phi 3, with no field but these."""
  rope = config.rope_scaling
  if not isinstance(rope, LongRope) or rope.attention_factor != longrope_attention_factor(
    config.max_length / rope.original_length, rope.original_length
  ):
    return None
  lists = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
  return {"type": "longrope"} | lists


def _scaling_fields(rope: RopeScaling | None) -> dict[str, Any] | None:
  match rope:
    case None:
      return None
    case LinearRope():
      return {"rope_type": "linear", "factor": rope.factor}
    case DynamicRope():
      return {"rope_type": "dynamic", "factor": rope.factor}
    case Llama3Rope():
      return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        _ORIGINAL: rope.original_length,
      }
    case YarnRope():
      return {
        "rope_type": "yarn",
        "factor": rope.factor,
        _ORIGINAL: rope.original_length,
        "attention_factor": rope.attention_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
      }
    case LongRope():
      return {
        "rope_type": "longrope",
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
        _ORIGINAL: rope.original_length,
        "attention_factor": rope.attention_factor,
      }
