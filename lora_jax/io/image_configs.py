"""Reads the configurations of image models from a `config.json` or a state dict.

    config = vit({"model_type": "vit", "hidden_size": 768, ...})
    fields = write_vit(config)
    config, tensors = torchvision_mobilenet({"features.0.0.weight": StoredTensor(...), ...})

As in `lora_jax.io.configs`, unknown and unsupported fields are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io import checked_fields
from lora_jax.io.configs import check_known
from lora_jax.models import convolutions, mobilenet
from lora_jax.models.mobilenet import MobileNetV2Config
from lora_jax.models.resnet import ResNetConfig
from lora_jax.models.vit import ViTConfig

Fields = Mapping[str, Any]

_CLASSIFIER, _TWO_HEADS = "ForImageClassification", "ForImageClassificationWithTeacher"
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
}
# Fields that do not affect the logits: dropout, settings of other heads, and the features that a
# backbone returns.
_IGNORED = (
  "hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "pooler_output_size",
  "pooler_act", "layerscale_value", "drop_path_rate", "apply_layernorm", "reshape_hidden_states",
  "use_mask_token", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
  "classifier_dropout_prob", "semantic_loss_ignore_index", "initializer_range",
)  # fmt: skip

# ---- vision transformers

_ViT_SIZES = {
  "hidden_size": "width",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_ViT_DEFAULTS = {
  "hidden_act": "gelu",
  "image_size": 224,
  "patch_size": 16,
  "num_channels": 3,
  "qkv_bias": True,
}
_NAMES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}
_TRAITS: dict[str, dict[str, Any]] = {
  "vit": {},
  "deit": {"distillation": True},
  "dinov2": {"layer_scale": True, "pooling": "token+mean"},
}
"""By `model_type`."""


def vit(fields: Fields) -> ViTConfig:
  """Returns the configuration of a ViT, a DeiT or a DINOv2.

  Raises ValueError for a missing field, a value of another type or out of range, an unknown field
  that is not null, empty or false, and unsupported features: another activation, images or patches
  that are not square, a gated MLP.
  """
  name = fields["model_type"]
  of_mlp = {"mlp_ratio": 4, "use_swiglu_ffn": False} if name == "dinov2" else {}
  sizes = _ViT_SIZES | ({} if of_mlp else {"intermediate_size": "mlp_width"})
  defaults = _ViT_DEFAULTS | of_mlp | {"layer_norm_eps": 1e-6 if of_mlp else 1e-12}
  check_known(name, {*sizes, *defaults, *_IGNORED}, fields)
  found = checked_fields.sizes(fields, sizes)
  fields = {**defaults, **fields}
  if of_mlp:
    if not checked_fields.is_(fields["use_swiglu_ffn"], False):
      raise ValueError(
        f"use_swiglu_ffn={shown(fields['use_swiglu_ffn'])} is not supported, only False"
      )
    [ratio] = checked_fields.sizes(fields, {"mlp_ratio": "ratio"}).values()
    found["mlp_width"] = found["width"] * ratio
  if found["width"] % found["num_heads"]:
    raise ValueError(
      f"hidden_size {found['width']} is no multiple of num_attention_heads {found['num_heads']}"
    )
  traits = dict(_TRAITS[name])
  if name == "deit" and _has(fields, _TWO_HEADS):
    traits["pooling"] = "two heads"
  return ViTConfig(
    **found,
    head_dim=found["width"] // found["num_heads"],
    image_size=_side(fields, "image_size"),
    patch_size=_side(fields, "patch_size"),
    channels=fields["num_channels"],
    norm_eps=fields["layer_norm_eps"],
    activation=_one_of(fields, "hidden_act", _ACTIVATIONS),
    qkv_bias=fields["qkv_bias"],
    classes=_classes(fields),
    family=name,
    **traits,
  )


def write_vit(config: ViTConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `vit`.

  Raises ValueError for settings without a field in the family's files.
  """
  traits = dict(_TRAITS[config.family])
  two_heads = config.family == "deit" and config.pooling == "two heads"
  if two_heads:
    traits["pooling"] = "two heads"
  plain = {"distillation": False, "layer_scale": False, "pooling": "token"}
  for field, value in (plain | traits).items():
    if getattr(config, field) != value:
      raise ValueError(
        f"config.json of the family {config.family!r} has no field for "
        f"{field}={shown(getattr(config, field))}"
      )
  if config.num_heads * config.head_dim != config.width:
    raise ValueError(
      f"{config.num_heads} heads of {config.head_dim} features are not together as wide as the "
      f"model, {config.width}, and config.json has no field for that"
    )
  mlp = {"intermediate_size": config.mlp_width}
  if config.family == "dinov2":
    if config.mlp_width % config.width:
      raise ValueError(
        f"mlp_width {config.mlp_width} is no multiple of the width {config.width}, and the "
        "config.json of a dinov2 has no field for that"
      )
    # The token is for pretraining and is not kept.
    mlp = {"mlp_ratio": config.mlp_width // config.width, "use_mask_token": False}
  spelling = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  ending = _TWO_HEADS if two_heads else _CLASSIFIER
  return {
    **head_fields(_NAMES[config.family], config.classes, ending),
    "model_type": config.family,
    **{theirs: getattr(config, ours) for theirs, ours in _ViT_SIZES.items()},
    **mlp,
    "image_size": config.image_size,
    "patch_size": config.patch_size,
    "num_channels": config.channels,
    "layer_norm_eps": config.norm_eps,
    "hidden_act": spelling[config.activation],
    "qkv_bias": config.qkv_bias,
  }


def with_classes(config: ViTConfig, classes: tuple[str, ...]) -> ViTConfig:
  """Returns the configuration with a new head; a single one instead of two heads."""
  pooling = "token" if config.pooling == "two heads" else config.pooling
  return dataclasses.replace(config, classes=classes, pooling=pooling)


# ---- convolutional networks

_MOBILENET = {
  "num_channels": "channels", "depth_multiplier": "width_multiplier",
  "depth_divisible_by": "divisor", "min_depth": "least_channels", "expand_ratio": "expansion",
  "output_stride": "output_stride", "finegrained_output": "full_output", "hidden_act": "activation",
  "tf_padding": "same_padding", "layer_norm_eps": "norm_eps",
}  # fmt: skip
_MOBILENET_DEFAULTS = {
  "num_channels": 3, "depth_multiplier": 1.0, "depth_divisible_by": 8, "min_depth": 8,
  "expand_ratio": 6.0, "output_stride": 32, "finegrained_output": True, "hidden_act": "relu6",
  "tf_padding": True, "layer_norm_eps": 0.001, "image_size": 224, "first_layer_is_expansion": True,
}  # fmt: skip


def mobilenet_v2(fields: Fields) -> MobileNetV2Config:
  """Returns the configuration of a MobileNetV2; raises as `vit` does."""
  check_known("mobilenet_v2", {*_MOBILENET_DEFAULTS, *_IGNORED}, fields)
  fields = {**_MOBILENET_DEFAULTS, **fields}
  expands = fields["first_layer_is_expansion"]
  if type(expands) is not bool:
    raise ValueError(f"first_layer_is_expansion must be true or false, not {shown(expands)}")
  _one_of(fields, "hidden_act", {name: name for name in convolutions.ACTIVATIONS})
  return MobileNetV2Config(
    **{ours: fields[theirs] for theirs, ours in _MOBILENET.items()},
    stem_expands=not expands,
    image_size=_side(fields, "image_size"),
    classes=_classes(fields),
  )


def write_mobilenet_v2(config: MobileNetV2Config) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `mobilenet_v2`."""
  return {
    **head_fields("MobileNetV2", config.classes, _CLASSIFIER),
    "model_type": "mobilenet_v2",
    **{theirs: getattr(config, ours) for theirs, ours in _MOBILENET.items()},
    "first_layer_is_expansion": not config.stem_expands,
    "image_size": config.image_size,
  }


def torchvision_mobilenet(tensors: Mapping[str, Any]) -> tuple[MobileNetV2Config, Any] | None:
  """Returns the configuration of torchvision's state dict of a MobileNetV2, and its tensors.

  Returns None if the names are not those of a MobileNetV2. The classes are named by their indices,
  since the file has no names.

  Raises ValueError for a width that torchvision does not have.
  """
  first, last = tensors.get("features.0.0.weight"), tensors.get("features.18.0.weight")
  head = tensors.get("classifier.1.weight")
  if first is None or last is None or not len(first.shape) == len(last.shape) == 4:
    return None
  config = MobileNetV2Config(classes=tuple(map(str, range(head.shape[0]))) if head else ())
  channels = mobilenet.widths(config)
  if (first.shape[0], last.shape[0]) != (channels[0], channels[2]):
    raise ValueError(
      f"its first and last convolutions have {first.shape[0]} and {last.shape[0]} channels; read "
      f"is a MobileNetV2 of width 1, with {channels[0]} and {channels[2]}"
    )
  return config, tensors


_RESNET_SWITCHES = {
  "downsample_in_first_stage": "first_stage_strides",
  "downsample_in_bottleneck": "stride_first",
}
_RESNET_DEFAULTS = {
  "num_channels": 3, "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048],
  "depths": [3, 4, 6, 3], "layer_type": "bottleneck", "hidden_act": "relu",
  "downsample_in_first_stage": False, "downsample_in_bottleneck": False,
}  # fmt: skip
_LAYERS = {"bottleneck": True, "basic": False}


def resnet(fields: Fields) -> ResNetConfig:
  """Returns the configuration of a ResNet; raises as `vit` does."""
  check_known("resnet", {*_RESNET_DEFAULTS, *_IGNORED}, fields)
  fields = {**_RESNET_DEFAULTS, **fields}
  _one_of(fields, "hidden_act", {name: name for name in convolutions.ACTIVATIONS})
  for field in ("hidden_sizes", "depths"):
    if not isinstance(fields[field], list):
      raise ValueError(f"{field} must be a list of whole numbers, not {shown(fields[field])}")
  return ResNetConfig(
    stem_width=fields["embedding_size"],
    widths=tuple(fields["hidden_sizes"]),
    depths=tuple(fields["depths"]),
    bottleneck=_one_of(fields, "layer_type", _LAYERS),
    channels=fields["num_channels"],
    activation=fields["hidden_act"],
    classes=_classes(fields),
    **{ours: fields[theirs] for theirs, ours in _RESNET_SWITCHES.items()},
  )


def write_resnet(config: ResNetConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `resnet`.

  Raises ValueError for settings without a field in files.
  """
  if config.norm_eps != ResNetConfig.norm_eps:
    raise ValueError(f"config.json of a resnet has no field for norm_eps={config.norm_eps}")
  [layer_type] = [name for name, bottleneck in _LAYERS.items() if bottleneck == config.bottleneck]
  return {
    **head_fields("ResNet", config.classes, _CLASSIFIER),
    "model_type": "resnet",
    "num_channels": config.channels,
    "embedding_size": config.stem_width,
    "hidden_sizes": list(config.widths),
    "depths": list(config.depths),
    "layer_type": layer_type,
    "hidden_act": config.activation,
    **{theirs: getattr(config, ours) for theirs, ours in _RESNET_SWITCHES.items()},
  }


# ---- fields of all


def _has(fields: Fields, ending: str) -> bool:
  listed = fields.get("architectures") or []
  return isinstance(listed, list) and any(str(name).endswith(ending) for name in listed)


def _classes(fields: Fields) -> tuple[str, ...]:
  return checked_fields.classes_of(fields, (_CLASSIFIER, _TWO_HEADS))


def head_fields(name: str, classes: tuple[str, ...], ending: str) -> dict[str, Any]:
  """Returns the fields of a `config.json` that describe a model's head.

  name, ending: of the architecture; the ending is that of a model with classes.
  """
  if not classes:
    return {"architectures": [f"{name}Model"]}
  return {
    "architectures": [f"{name}{ending}"],
    "id2label": {str(n): each for n, each in enumerate(classes)},
    "label2id": {each: n for n, each in enumerate(classes)},
  }


def _side(fields: Fields, field: str) -> Any:
  """The side of a square in pixels."""
  value = fields[field]
  if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
    value = value[0]
  if type(value) is not int:
    raise ValueError(
      f"{field} must be a whole number, or two that are the same, not {shown(value)}"
    )
  return value


def _one_of(fields: Fields, field: str, known: Mapping[str, Any]) -> Any:
  value = fields[field]
  if not isinstance(value, str) or value not in known:
    raise ValueError(
      f"{field}={shown(value)} is not supported; supported: {', '.join(map(repr, known))}"
    )
  return known[value]
