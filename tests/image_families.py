"""Tiny random models of images of each family, as transformers writes them."""

import dataclasses
import functools
from typing import Any

import numpy as np
from peers import torch, transformers
from torch_models import Twins

from lora_jax.io import pretrained

_VIT = {
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "image_size": 28,
  "patch_size": 7,
}
_DINO = {x: y for x, y in _VIT.items() if x != "intermediate_size"} | {"mlp_ratio": 2}
_MOBILENET = {"depth_multiplier": 0.35, "image_size": 64}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A shape of config: the family, its class in transformers, what its config says, its head."""

  family: str
  name: str
  fields: dict[str, Any]
  head: str = "ForImageClassification"


KINDS = {
  "ViT": Kind("vit", "ViT", _VIT),
  "ViT, relu, no biases of queries": Kind(
    "vit", "ViT", _VIT | {"hidden_act": "relu", "qkv_bias": False, "layer_norm_eps": 1e-3}
  ),
  "DeiT": Kind("deit", "DeiT", _VIT),
  "DeiT, two heads": Kind("deit", "DeiT", _VIT, "ForImageClassificationWithTeacher"),
  "DINOv2": Kind("dinov2", "Dinov2", _DINO),
  "MobileNetV2": Kind("mobilenet_v2", "MobileNetV2", _MOBILENET),
  "MobileNetV2, PyTorch's padding, dilated": Kind(
    "mobilenet_v2", "MobileNetV2",
    _MOBILENET | {"tf_padding": False, "output_stride": 8, "finegrained_output": False},
  ),
  "MobileNetV2, dilated, its stem expands": Kind(
    "mobilenet_v2", "MobileNetV2",
    _MOBILENET | {"output_stride": 16, "first_layer_is_expansion": False, "expand_ratio": 3.0},
  ),
  "ResNet": Kind("resnet", "ResNet", _RESNET),
  "ResNet of bottlenecks": Kind(
    "resnet", "ResNet", _RESNET | {"hidden_sizes": [16, 32], "layer_type": "bottleneck"}
  ),
  "ResNet that strides first": Kind(
    "resnet", "ResNet",
    _RESNET
    | {
      "hidden_sizes": [16, 32], "layer_type": "bottleneck", "downsample_in_bottleneck": True,
      "downsample_in_first_stage": True, "hidden_act": "silu",
    },
  ),
}  # fmt: skip
"""What the tests claim of each; the first of a family stands for it where one is enough."""

FIRST = {kind.family: name for name, kind in reversed(KINDS.items())}


def make(name: str, head: str | None = None) -> "torch.nn.Module":
  """A random model, with the same values each time; `head` ends the name of another class."""
  kind = KINDS[name]
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind.name}Config")(**kind.fields, num_labels=3)
  made = getattr(transformers, f"{kind.name}{head or kind.head}")
  model = made(config).eval()
  for path, values in [*model.named_parameters(), *model.named_buffers()]:
    if not values.is_floating_point():
      continue
    if "norm" in path and path.endswith(("weight", "running_var")):
      torch.nn.init.uniform_(values, 0.5, 1.5)
    elif "lambda" in path:
      torch.nn.init.uniform_(values, 0.2, 1.0)
    else:
      fan_in = values[0].numel() if values.ndim > 1 else 8
      torch.nn.init.normal_(values, std=max(0.1, min(1.0, 1.4 * fan_in**-0.5)))
  return model.eval()


def write(folder, name: str, head: str | None = None) -> "torch.nn.Module":
  """Saves the model to a folder; returns it."""
  model = make(name, head)
  model.save_pretrained(folder)
  return model


def images(name: str, size: int | None = None, rows: int = 2) -> np.ndarray:
  """Images [rows, 3, size, size], as PyTorch has them."""
  size = size or KINDS[name].fields.get("image_size", 40)
  return np.random.default_rng(3).normal(size=(rows, 3, size, size)).astype(np.float32)


def twins(found: pretrained.Pretrained, name: str) -> Twins:
  """A kind's model on both sides; `found` is what was loaded of what `write` wrote."""
  model = found.family.make_model(found.config)
  return Twins(
    functools.partial(make, name),
    found.params,
    lambda params, images: model.apply({"params": params}, images.transpose(0, 2, 3, 1)),
    images(name),
    {"table": found.table},
  )
