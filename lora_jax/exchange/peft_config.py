"""Parses adapter_config.json and refuses unsupported settings that would change the model.

    config = parse(content)
    config["r"], config["lora_alpha"]            # checked, with PEFT's default where absent

A field is read, or is ignored because it does not affect a saved adapter, or is refused with the
reason. An unknown field is refused unless it is off. So no adapter is approximated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax.checks import shown
from lora_jax.exchange import peft_patterns
from lora_jax.io import json_files

MAX_RANK = 1 << 20


class Field(NamedTuple):
  """The rule of a field: its default, a test of its value, and a description."""

  default: Any
  accepts: Callable[[Any], bool]
  words: str


def _is_number(x: Any) -> bool:
  return type(x) in (int, float) and abs(x) < 1e30  # which NaN is not


def _is_rank(x: Any) -> bool:
  return type(x) is int and 1 <= x <= MAX_RANK


def _is_list(x: Any, kind: type = str) -> bool:
  return isinstance(x, list) and all(type(item) is kind for item in x)


def _is_dict(x: Any, accepts: Callable[[Any], bool]) -> bool:
  return isinstance(x, dict) and all(map(accepts, x.values()))


def _flag(default: bool = False) -> Field:
  return Field(default, lambda x: type(x) is bool, "true or false")


_RANK = Field(8, _is_rank, f"a whole number from 1 to {MAX_RANK}")
_ALPHA = Field(8, _is_number, "a finite number")
_NAMES = Field(None, lambda x: x is None or _is_list(x), "a list of names")
_TEXT = Field(None, lambda x: x is None or isinstance(x, str), "a string")
_TARGETS = Field(
  None, lambda x: x is None or isinstance(x, str) or _is_list(x), "a string or a list of names"
)
_SHARE = Field(0.0, lambda x: _is_number(x) and 0 <= x < 1, "a number from 0 to 1")
_INIT = Field(True, lambda x: isinstance(x, bool | str), "true, false or a string")
_BIASES = ("none", "all", "lora_only", "vera_only")
_BIAS = Field("none", lambda x: x in _BIASES, f"one of {', '.join(_BIASES)}")
_RANKS = Field({}, lambda x: x is None or _is_dict(x, _is_rank), "an object of ranks")
_ALPHAS = Field({}, lambda x: x is None or _is_dict(x, _is_number), "an object of numbers")
_MASKS = Field(
  None,
  lambda x: x is None or _is_dict(x, lambda mask: _is_list(mask, bool)),
  "an object of lists of true and false",
)
_ROWS = Field(
  None,
  lambda x: x is None or _is_list(x, int) or _is_dict(x, lambda rows: _is_list(rows, int)),
  "a list of token ids, or an object of such lists",
)

_COMMON = {
  "base_model_name_or_path": _TEXT,
  "target_modules": _TARGETS,
  "exclude_modules": _TARGETS,
  "modules_to_save": _NAMES,
}
_LORA = _COMMON | {
  "r": _RANK,
  "lora_alpha": _ALPHA,
  "rank_pattern": _RANKS,
  "alpha_pattern": _ALPHAS,
  "use_rslora": _flag(),
  "use_dora": _flag(),
  "lora_dropout": _SHARE,
  "bias": _BIAS,
  "init_lora_weights": _INIT,
  "trainable_token_indices": _ROWS,
  "ensure_weight_tying": _flag(),
}
_LYCORIS = _COMMON | {
  "r": _RANK,
  "alpha": _ALPHA,
  "rank_pattern": _RANKS,
  "alpha_pattern": _ALPHAS,
}
FIELDS: dict[str, dict[str, Field]] = {
  "LORA": _LORA | {"target_parameters": _NAMES},
  "ADALORA": _LORA | {"init_r": _RANK._replace(default=12), "rank_pattern": _MASKS},
  "LOHA": _LYCORIS,
  "LOKR": _LYCORIS,
  "VERA": _COMMON
  | {"r": _RANK._replace(default=256), "save_projection": _flag(True), "bias": _BIAS},
  "LN_TUNING": _COMMON,
  "TRAINABLE_TOKENS": _COMMON | {"token_indices": _ROWS._replace(default=[])},
}
"""The fields that are read, by the value of `peft_type`."""

_REFUSED = {
  "layer_replication": "the adapted model has other layers than the base",
  "target_parameters": "parameters that belong to no linear layer are adapted by LORA alone",
  "megatron_config": "the layers are those of Megatron",
  "alora_invocation_tokens": "the adapter acts on a part of the tokens only",
  "use_qalora": "the inputs are pooled before A",
  "monteclora_config": "the weights are random variables",
  "kasa_config": "the base's smallest singular values are cut off",
  "arrow_config": "several adapters are routed between",
  "use_bdlora": "the factors are block-diagonal, and stored as their blocks",
  "lora_bias": "B has a bias of its own",
}
# They describe the training or its sources, and do not affect the tensors.
_WITHOUT_BEARING = frozenset({
  "auto_mapping", "beta1", "beta2", "corda_config", "d_initial", "decompose_both",
  "decompose_factor", "deltaT", "eva_config", "fan_in_fan_out", "inference_mode", "init_weights",
  "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
  "module_dropout", "orth_reg_weight", "peft_type", "peft_version", "projection_prng_key",
  "qalora_group_size", "rank_dropout", "rank_dropout_scale", "revision", "runtime_config",
  "target_r", "task_type", "tfinal", "tinit", "total_step", "use_effective_conv2d",
  "velora_config", "vera_dropout",
})  # fmt: skip


def parse(content: bytes) -> dict[str, Any]:
  """Returns the fields of `FIELDS[peft_type]`, `peft_type` and `layers_to_transform`.

  Raises:
    ValueError: for what is no JSON, a kind of adapter or a field that is not supported, and a value
      of another type or size than the field's.
  """
  fields = json_files.parse(content)
  kind = fields.get("peft_type")
  if not isinstance(kind, str) or kind not in FIELDS:
    raise ValueError(f"peft_type {shown(kind)} is not supported; supported: {', '.join(FIELDS)}")
  known = FIELDS[kind]
  for name, value in fields.items():
    if name in known:
      if not known[name].accepts(value):
        raise ValueError(f"{name} must be {known[name].words}, not {shown(value)}")
    elif value and name in _REFUSED:
      raise ValueError(f"{name} is not supported: {_REFUSED[name]}")
    elif value and name not in _WITHOUT_BEARING:
      raise ValueError(
        f"{name[:80]!r} is no field that is known, and what it changes cannot be told; take it out "
        "of the file if it changes nothing in what the adapter computes"
      )
  config = {name: fields.get(name, field.default) for name, field in known.items()}
  for name in ("rank_pattern", "alpha_pattern"):
    if name in config:
      config[name] = config[name] or {}
      if kind != "ADALORA":
        peft_patterns.compiled(config[name])
  return config | {"peft_type": kind, "layers_to_transform": fields.get("layers_to_transform")}
