"""Files of configs for short runs on images: classes by a ViT, boxes by a MobileNetV2.

A path is returned, for `--config=`.
"""

import pathlib
from typing import Any

import boxed_sets
import image_families
import numpy as np
from PIL import Image

LABELS = ("blue", "red")


def write_classes(folder: pathlib.Path, fields: dict[str, Any]) -> pathlib.Path:
  """A classification of pictures that differ in color; `fields` are set in the config."""
  image_families.write(folder / "model", "ViT")
  rng = np.random.default_rng(0)
  for n in range(40):
    picture = rng.integers(0, 120, (20, 24, 3))
    picture[..., 2 * (n % 2 == 0)] += 100
    place = folder / "pictures" / LABELS[n % 2]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.astype(np.uint8)).save(place / f"{n}.png")
  own = {
    "model.source": str(folder / "model"),
    "data.size": 14,
    "optimizer.warmup_steps": 1,
    "train.batch_size": 8,
    "evaluation.samples": 2,
  }
  return _write(folder, f"images.get_config('data={folder / 'pictures'},model=vit')", own | fields)


def write_boxes(folder: pathlib.Path, fields: dict[str, Any]) -> pathlib.Path:
  """A detection of red and green rectangles; `fields` are set in the config."""
  image_families.write(folder / "model", "MobileNetV2")
  boxed_sets.write(folder / "set", counts=(24, 8))
  own = {
    "model.source": str(folder / "model"), "data.source": str(folder / "set"),
    "data.test_source": str(folder / "set"), "data.annotations": "train.json",
    "data.test_annotations": "test.json", "data.leave_out": (), "data.size": 64,
    "task.labels": boxed_sets.LABELS, "task.scales": ((0.3, 0.45), (0.6,)), "task.ratios": (1.0,),
    "optimizer.warmup_steps": 1, "train.batch_size": 8, "evaluation.samples": 2,
  }  # fmt: skip
  return _write(folder, "detect.get_config()", own | fields)


def _write(folder: pathlib.Path, config: str, fields: dict[str, Any]) -> pathlib.Path:
  path = folder / "config.py"
  path.write_text(
    f"from configs import detect, images\n\ndef get_config(text=''):\n  config = {config}\n"
    "  with config.ignore_type(), config.unlocked():\n"
    f"    config.update_from_flattened_dict({fields!r})\n  return config\n"
  )
  return path
