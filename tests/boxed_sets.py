"""A small set of pictures with boxes in COCO's format: red and green rectangles on noise."""

import json

import numpy as np
from PIL import Image

LABELS = ("red", "green")
WIDTH, HEIGHT = 64, 48


def make(count: int, seed: int) -> tuple[list[np.ndarray], dict]:
  """Pictures, and their annotations as `json` writes them."""
  rng = np.random.default_rng(seed)
  images, annotations, pictures = [], [], []
  for n in range(count):
    picture = rng.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    images.append({"id": 10 + n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT})
    # One in each half, so that they do not cover each other.
    for half in range(1 + n % 2):
      width, height = rng.integers(14, 24, 2).tolist()
      x = int(rng.integers(0, WIDTH // 2 - width + 1)) + half * WIDTH // 2
      y = int(rng.integers(0, HEIGHT - height + 1))
      kind = int(rng.integers(2))
      picture[y : y + height, x : x + width, kind] = 220
      annotations.append(
        {
          "id": len(annotations),
          "image_id": 10 + n,
          "category_id": 5 + kind,
          "bbox": [x, y, width, height],
          "area": width * height,
          "iscrowd": 0,
        }
      )
    pictures.append(picture)
  categories = [{"id": 5 + n, "name": label} for n, label in enumerate(LABELS)]
  return pictures, {"images": images, "annotations": annotations, "categories": categories}


def write(folder, counts=(24, 8)):
  """Writes train.json, test.json and the pictures of both; returns the folder."""
  for name, count, seed in zip(("train", "test"), counts, (0, 1), strict=True):
    pictures, fields = make(count, seed)
    (folder / "images" / name).mkdir(parents=True)
    for image, picture in zip(fields["images"], pictures, strict=True):
      image["file_name"] = f"{name}/{image['file_name']}"
      Image.fromarray(picture).save(folder / "images" / image["file_name"])
    (folder / f"{name}.json").write_text(json.dumps(fields))
  return folder
