"""Converts the `config.json` of speech models to and from their configurations.

    config = whisper({"model_type": "whisper", "d_model": 384, ...})
    fields = write_whisper(config)

As in `lora_jax.io.configs`, unknown and unsupported fields are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import checked_fields
from lora_jax.io.configs import check_known
from lora_jax.models.wav2vec2 import Wav2Vec2Config
from lora_jax.models.whisper import WhisperConfig

Fields = Mapping[str, Any]

_FRAME_HEADS = ("ForCTC",)
_SIZES = {
  "vocab_size": "vocab_size",
  "d_model": "width",
  "encoder_layers": "num_layers",
  "decoder_layers": "decoder_layers",
  "encoder_attention_heads": "num_heads",
  "encoder_ffn_dim": "mlp_width",
}
_OPTIONAL = {
  "num_mel_bins": "mels",
  "max_source_positions": "max_frames",
  "max_target_positions": "max_length",
}
# Encoder and decoder have one size here, as in all published models.
_TWINS = {
  "decoder_attention_heads": "encoder_attention_heads",
  "decoder_ffn_dim": "encoder_ffn_dim",
}
_FIXED = {
  "is_encoder_decoder": True,
  "tie_word_embeddings": True,
  "use_weighted_layer_sum": False,
  "scale_embedding": False,
}
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
}
# Fields that do not affect the logits: dropout, masks of training, other heads, generation.
_IGNORED = (
  "num_hidden_layers", "encoder_layerdrop", "decoder_layerdrop", "dropout", "activation_dropout",
  "init_std", "classifier_proj_size", "apply_spec_augment", "mask_time_prob", "mask_time_length",
  "mask_time_min_masks", "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks",
  "median_filter_width", "forced_decoder_ids", "alignment_heads", "lang_ids", "suppress_ids",
  "suppress_ids_begin",
)  # fmt: skip


def whisper(fields: Fields) -> WhisperConfig:
  """Returns the configuration of a Whisper.

  Raises ValueError for a missing field, a value of another type or out of range, an unknown field
  that is not null, empty or false, and unsupported features: a decoder of another width than the
  encoder, an embedding that is not tied, another activation.
  """
  own = {*_SIZES, *_OPTIONAL, *_TWINS, *_FIXED, "activation_function"}
  check_known("whisper", {*own, *_IGNORED}, fields)
  found = checked_fields.sizes(fields, _SIZES)
  for field, twin in _TWINS.items():
    if checked_fields.required(fields, field) != fields[twin]:
      raise ValueError(
        f"{field} {shown(fields[field])} differs from {twin} {shown(fields[twin])}, which is not "
        "supported"
      )
  for field, value in _FIXED.items():
    if not checked_fields.is_(fields.get(field, value), value):
      raise ValueError(f"{field}={shown(fields[field])} is not supported, only {value}")
  activation = fields.get("activation_function", "gelu")
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise ValueError(
      f"activation_function={shown(activation)} is not supported; supported: "
      f"{', '.join(map(repr, _ACTIVATIONS))}"
    )
  if found["width"] % found["num_heads"]:
    raise ValueError(
      f"d_model {found['width']} is no multiple of encoder_attention_heads {found['num_heads']}"
    )
  return WhisperConfig(
    **found,
    **{ours: fields[theirs] for theirs, ours in _OPTIONAL.items() if theirs in fields},
    head_dim=found["width"] // found["num_heads"],
    activation=_ACTIVATIONS[activation],
    classes=checked_fields.classes_of(fields, _FRAME_HEADS),
  )


def write_whisper(config: WhisperConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `whisper`.

  A model with a head on its frames is a "WhisperForCTC", which is read here and which
  `transformers` does not have.

  Raises ValueError if the heads together are not as wide as the model.
  """
  if config.num_heads * config.head_dim != config.width:
    raise ValueError(
      f"{config.num_heads} heads of {config.head_dim} features are not together as wide as the "
      f"model, {config.width}, and config.json has no field for that"
    )
  spelling = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  sizes = {theirs: getattr(config, ours) for theirs, ours in (_SIZES | _OPTIONAL).items()}
  return {
    **ctc_fields("Whisper", config.classes, "WhisperForConditionalGeneration"),
    "model_type": "whisper",
    **sizes,
    **{field: sizes[twin] for field, twin in _TWINS.items()},
    **_FIXED,
    "activation_function": spelling[config.activation],
  }


# ---- wav2vec2

_W2V_SIZES = {
  "hidden_size": "width",
  "intermediate_size": "mlp_width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_W2V_OPTIONAL = {
  "conv_bias": "conv_bias",
  "do_stable_layer_norm": "pre_norm",
  "layer_norm_eps": "norm_eps",
  "num_conv_pos_embeddings": "position_window",
  "num_conv_pos_embedding_groups": "position_groups",
}
_W2V_CONVOLUTIONS = {
  "conv_dim": "conv_channels",
  "conv_kernel": "conv_windows",
  "conv_stride": "conv_strides",
}
_W2V_NORMS = {"group": False, "layer": True}
_W2V_FIXED = {
  "hidden_act": "gelu",
  "feat_extract_activation": "gelu",
  "add_adapter": False,
  "use_weighted_layer_sum": False,
  "adapter_attn_dim": None,
}
# Dropout, masks and quantizers of pretraining, and other heads.
_W2V_IGNORED = (
  "hidden_dropout", "activation_dropout", "feat_proj_dropout", "feat_quantizer_dropout",
  "final_dropout", "layerdrop", "apply_spec_augment", "mask_time_prob", "mask_time_length",
  "mask_time_min_masks", "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks",
  "num_codevectors_per_group", "num_codevector_groups", "contrastive_logits_temperature",
  "num_negatives", "codevector_dim", "proj_codevector_dim", "diversity_loss_weight",
  "ctc_loss_reduction", "ctc_zero_infinity", "classifier_proj_size", "tdnn_dim", "tdnn_kernel",
  "tdnn_dilation", "xvector_output_dim", "adapter_kernel_size", "adapter_stride",
  "num_adapter_layers", "output_hidden_size", "num_feat_extract_layers", "vocab_size",
  "gradient_checkpointing",
)  # fmt: skip


def wav2vec2(fields: Fields) -> Wav2Vec2Config:
  """Returns the configuration of a wav2vec2.

  The names of the classes are those of `id2label` if they are as many as the vocabulary; the file
  vocab.json of a tokenizer is not read. Otherwise they are "<0>", "<1>", …, with "<pad>" for
  `pad_token_id`.

  Raises ValueError as `whisper` does.
  """
  own = {*_W2V_SIZES, *_W2V_OPTIONAL, *_W2V_CONVOLUTIONS, *_W2V_FIXED, "feat_extract_norm"}
  check_known("wav2vec2", {*own, *_W2V_IGNORED}, fields)
  found = checked_fields.sizes(fields, _W2V_SIZES)
  for field, value in _W2V_FIXED.items():
    if not checked_fields.is_(fields.get(field, value), value):
      raise ValueError(f"{field}={shown(fields[field])} is not supported, only {value}")
  norm = fields.get("feat_extract_norm", "group")
  if not isinstance(norm, str) or norm not in _W2V_NORMS:
    raise ValueError(f"feat_extract_norm={shown(norm)} is not supported; group and layer are")
  for field in _W2V_CONVOLUTIONS:
    if not isinstance(fields.get(field, []), list):
      raise ValueError(f"{field} must be a list of whole numbers, not {shown(fields[field])}")
  if found["width"] % found["num_heads"]:
    raise ValueError(
      f"hidden_size {found['width']} is no multiple of num_attention_heads {found['num_heads']}"
    )
  given = {ours: fields[theirs] for theirs, ours in _W2V_OPTIONAL.items() if theirs in fields}
  given |= {
    ours: tuple(fields[theirs]) for theirs, ours in _W2V_CONVOLUTIONS.items() if theirs in fields
  }
  return Wav2Vec2Config(
    **found,
    **given,
    head_dim=found["width"] // found["num_heads"],
    layer_norms=_W2V_NORMS[norm],
    classes=_vocabulary(fields),
  )


def _vocabulary(fields: Fields) -> tuple[str, ...]:
  """The names of the outputs of a wav2vec2's head; () for a model without one."""
  classes = checked_fields.classes_of(fields, _FRAME_HEADS)
  if not classes:
    return ()
  [count] = checked_fields.sizes({"vocab_size": 32} | dict(fields), {"vocab_size": "n"}).values()
  if count > 1 << 20:
    raise ValueError(f"vocab_size {count} is over the limit of characters")
  if len(classes) == count:
    return classes
  pad = fields.get("pad_token_id", 0)
  return tuple("<pad>" if n == pad else f"<{n}>" for n in range(count))


def write_wav2vec2(config: Wav2Vec2Config) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `wav2vec2`.

  Raises ValueError if the heads together are not as wide as the model.
  """
  if config.num_heads * config.head_dim != config.width:
    raise ValueError(
      f"{config.num_heads} heads of {config.head_dim} features are not together as wide as the "
      f"model, {config.width}, and config.json has no field for that"
    )
  pad = {"pad_token_id": config.classes.index("<pad>")} if "<pad>" in config.classes else {}
  return {
    **ctc_fields("Wav2Vec2", config.classes, "Wav2Vec2Model"),
    "model_type": "wav2vec2",
    **{x: getattr(config, ours) for x, ours in (_W2V_SIZES | _W2V_OPTIONAL).items()},
    **{x: list(getattr(config, ours)) for x, ours in _W2V_CONVOLUTIONS.items()},
    "num_feat_extract_layers": len(config.conv_channels),
    "feat_extract_norm": "layer" if config.layer_norms else "group",
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    **({"vocab_size": len(config.classes)} if config.classes else {}),
    **pad,
  }


# ---- fields of all


def ctc_fields(name: str, classes: tuple[str, ...], bare: str) -> dict[str, Any]:
  """The fields that describe the head of a model; `bare` is its class without one."""
  if not classes:
    return {"architectures": [bare]}
  return {
    "architectures": [f"{name}ForCTC"],
    "id2label": {str(n): each for n, each in enumerate(classes)},
    "label2id": {each: n for n, each in enumerate(classes)},
  }


def with_classes(config: Any, classes: tuple[str, ...]) -> Any:
  """Returns the configuration with a new head on the frames."""
  return dataclasses.replace(config, classes=classes)
