"""Reads and writes the configuration of an SSDLite on MobileNetV2.

    config = from_json({"model_type": "ssdlite_mobilenet_v2", "anchor_scales": [[0.1], [0.4]], ...})
    fields = to_json(config)

transformers has no such model. The fields are those of its MobileNetV2, with `anchor_scales` and
`anchor_ratios`, the `scales` and `ratios` of `lora_jax.models.ssdlite.SSDLiteConfig`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.io import checked_fields, image_configs
from lora_jax.models import ssdlite
from lora_jax.models.mobilenet import MobileNetV2Config
from lora_jax.models.ssdlite import SSDLiteConfig

_DETECTOR = "ForObjectDetection"
_SCALES, _RATIOS = "anchor_scales", "anchor_ratios"


def from_json(fields: Mapping[str, Any]) -> SSDLiteConfig:
  """Returns the configuration of a detector; raises as `image_configs.vit` does."""
  scales = checked_fields.required(fields, _SCALES)
  ratios = checked_fields.required(fields, _RATIOS)
  ssdlite.check_anchors("", scales, ratios)
  classes = checked_fields.classes_of(fields, (_DETECTOR,))
  if not classes:
    raise ValueError(f"architectures must name a detector, as ['SSDLite{_DETECTOR}']")
  own = (_SCALES, _RATIOS, "architectures")
  body = image_configs.mobilenet_v2({x: y for x, y in fields.items() if x not in own})
  return of_backbone(body, classes, tuple(map(tuple, scales)), tuple(ratios))


def of_backbone(
  body: MobileNetV2Config,
  classes: tuple[str, ...],
  scales: tuple[tuple[float, ...], ...],
  ratios: tuple[float, ...],
) -> SSDLiteConfig:
  """Returns the configuration of a detector on a backbone; raises ValueError for bad anchors."""
  names = [field.name for field in dataclasses.fields(MobileNetV2Config)]
  kept = {name: getattr(body, name) for name in names if name not in ("family", "classes")}
  return SSDLiteConfig(**kept, classes=classes, scales=scales, ratios=ratios)


def to_json(config: SSDLiteConfig) -> dict[str, Any]:
  """Returns the fields of a `config.json`, the inverse of `from_json`."""
  return {
    **image_configs.write_mobilenet_v2(config),
    **image_configs.head_fields("SSDLite", config.classes, _DETECTOR),
    "model_type": config.family,
    _SCALES: [list(own) for own in config.scales],
    _RATIOS: list(config.ratios),
  }
