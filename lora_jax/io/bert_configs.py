"""Reads and writes the `config.json` of BERT, RoBERTa and DistilBERT.

    config = from_hugging_face({"model_type": "bert", "hidden_size": 384, ...})

As in `lora_jax.io.configs`, unknown and unsupported fields are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import checked_fields
from lora_jax.io.configs import check_known
from lora_jax.models.bert import BertConfig

Fields = Mapping[str, Any]

POOLER = "add_pooling_layer"
"""Whether a model without a head has a pooler. transformers has it as an argument and no field; it
is written for the readers here and kept by transformers as any other field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
  """How a family's `config.json` is read and written.

  architecture: the prefix of transformers' class names.
  sizes: {field: field of `BertConfig`} for the required fields.
  positions: the field of the rows of the position embedding.
  activation: the field of the MLP's activation.
  defaults: transformers' defaults of optional fields.
  fixed: fields of unsupported features, and the only accepted value of each.
  ignored: fields with any value, in addition to those ignored for every family.
  offset: whether positions are counted from the row after padding's.
  pooled: whether a model without a head may have a pooler.
  pooler_activation: see `BertConfig`.
  """

  architecture: str
  sizes: Mapping[str, str]
  positions: str = "max_position_embeddings"
  activation: str = "hidden_act"
  defaults: Fields
  fixed: Fields
  ignored: tuple[str, ...]
  offset: bool = False
  pooled: bool = True
  pooler_activation: str = "tanh"


_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "intermediate_size": "mlp_width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_BERT = Style(
  architecture="Bert",
  sizes=_SIZES,
  defaults={
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0,
  },
  fixed={
    "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
  },
  ignored=(
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "gradient_checkpointing", "tie_word_embeddings", "pooler_fc_size", "pooler_num_attention_heads",
    "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality",
  ),
)  # fmt: skip
STYLES = {
  "bert": _BERT,
  "roberta": dataclasses.replace(
    _BERT,
    architecture="Roberta",
    defaults={**_BERT.defaults, "pad_token_id": 1},
    offset=True,
    pooled=False,
  ),
  "distilbert": Style(
    architecture="DistilBert",
    sizes={
      "vocab_size": "vocab_size",
      "dim": "width",
      "hidden_dim": "mlp_width",
      "n_layers": "num_layers",
      "n_heads": "num_heads",
    },
    activation="activation",
    defaults={"activation": "gelu", "pad_token_id": 0},
    fixed={"is_decoder": False, "add_cross_attention": False},
    ignored=(
      "dropout",
      "qa_dropout",
      "seq_classif_dropout",
      "tie_weights_",
      "tie_word_embeddings",
      "sinusoidal_pos_embds",  # initializes a new table; files contain the table
    ),
    pooled=False,
    pooler_activation="relu",
  ),
}
"""By `model_type`."""

_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
}


def from_hugging_face(fields: Fields) -> BertConfig:
  """Returns the configuration that a parsed `config.json` describes.

  Raises ValueError for a missing field, a value of another type or out of range, an unknown field
  that is not null, empty or false, another activation, positions that are not absolute, a decoder,
  and quantized weights.
  """
  name = fields["model_type"]
  style = STYLES[name]
  if fields.get("quantization_config"):
    raise ValueError("quantization_config: quantized safetensors are not supported")
  known = {*style.sizes, style.positions, *style.defaults, *style.fixed, *style.ignored, POOLER}
  check_known(name, known, fields)
  for field, accepted in style.fixed.items():
    if not checked_fields.is_(fields.get(field, accepted), accepted):
      raise ValueError(f"{field}={shown(fields[field])} is not supported, only {accepted!r}")
  sizes = checked_fields.sizes(fields, {**style.sizes, style.positions: "max_length"})
  if sizes["width"] % sizes["num_heads"]:
    width, heads = (_theirs(style, ours) for ours in ("width", "num_heads"))
    raise ValueError(
      f"{width} {shown(sizes['width'])} is not a multiple of {heads} {shown(sizes['num_heads'])}"
    )
  fields = {**style.defaults, **fields}
  offset = _offset(style, fields["pad_token_id"])
  if sizes["max_length"] <= offset:
    raise ValueError(
      f"{style.positions} {shown(sizes['max_length'])} leaves no position after padding's, "
      f"pad_token_id {shown(fields['pad_token_id'])}"
    )
  activation = fields[style.activation]
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise ValueError(
      f"{style.activation}={shown(activation)} is not supported; supported: "
      f"{', '.join(map(repr, _ACTIVATIONS))}"
    )
  return BertConfig(
    vocab_size=sizes["vocab_size"],
    width=sizes["width"],
    mlp_width=sizes["mlp_width"],
    num_layers=sizes["num_layers"],
    num_heads=sizes["num_heads"],
    max_length=sizes["max_length"] - offset,
    head_dim=sizes["width"] // sizes["num_heads"],
    token_types=fields.get("type_vocab_size", 0),
    position_offset=offset,
    norm_eps=fields.get("layer_norm_eps", 1e-12),
    activation=_ACTIVATIONS[activation],
    pooler=style.pooled and fields.get(POOLER, True),
    pooler_activation=style.pooler_activation,
    classes=checked_fields.classes_of(fields),
    family=name,
  )


def to_hugging_face(config: BertConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_hugging_face`.

  Raises ValueError for settings without a field in the family's files.
  """
  style = STYLES[config.family]
  spelling = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  ending = "ForSequenceClassification" if config.classes else "Model"
  fields = {
    **checked_fields.head_fields(style.architecture + ending, config.classes),
    "model_type": config.family,
    **{theirs: getattr(config, ours) for theirs, ours in style.sizes.items()},
    style.positions: config.max_length + config.position_offset,
    style.activation: spelling[config.activation],
    **style.fixed,
  }
  if "type_vocab_size" in style.defaults:
    fields |= {"type_vocab_size": config.token_types, "layer_norm_eps": config.norm_eps}
  if style.offset:
    fields["pad_token_id"] = config.position_offset - 1
  if style.pooled:
    fields[POOLER] = config.pooler
  said = from_hugging_face(fields)
  how = ("scan_layers", "remat_policy", "constrain", "dtype", "param_dtype")
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name not in how and value != getattr(said, field.name):
      raise ValueError(
        f"config.json of the family {config.family!r} has no field for {field.name}={shown(value)}"
      )
  return fields


def _offset(style: Style, pad_id: Any) -> int:
  """The row of the first token's position; RoBERTa's is the row after padding."""
  if not style.offset:
    return 0
  if type(pad_id) is not int or pad_id < 0:
    raise ValueError(f"pad_token_id must be an integer from 0, not {shown(pad_id)}")
  return pad_id + 1


def _theirs(style: Style, ours: str) -> str:
  return next(theirs for theirs, name in style.sizes.items() if name == ours)
