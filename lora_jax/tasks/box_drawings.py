"""Draws boxes: into copies of pictures, and grids of boxes wanted and found."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_jax.checks import shown
from lora_jax.io import json_files

Box = Mapping[str, Any]
"""`label`, `box` (x, y, width, height in pixels) and, if it was found, `score`."""

_GOLDEN = 0.618034  # a step along the colors that keeps any number of them apart


def colors(labels: Sequence[str]) -> dict[str, tuple[int, int, int]]:
  """A color for each class, as red, green and blue from 0 to 255."""
  hues = [(0.98 + n * _GOLDEN) % 1 for n in range(len(labels))]
  made = [colorsys.hsv_to_rgb(hue, 0.9, 0.8) for hue in hues]
  return {
    label: (round(255 * red), round(255 * green), round(255 * blue))
    for label, (red, green, blue) in zip(labels, made, strict=True)
  }


def into(picture: np.ndarray, boxes: Sequence[Box], labels: Sequence[str]) -> Image.Image:
  """Returns a copy of a picture, [height, width, 3] of uint8, with boxes and their scores."""
  image, known = Image.fromarray(picture), colors(labels)
  draw, shorter = ImageDraw.Draw(image), min(picture.shape[:2])
  font = ImageFont.load_default(max(10, shorter // 40))
  for each in boxes:
    x, y, width, height = each["box"]
    color = known[each["label"]]
    corners = (x, y, max(x, x + width - 1), max(y, y + height - 1))
    draw.rectangle(corners, outline=color, width=max(1, shorter // 240))
    score = f" {each['score']:.2f}" if "score" in each else ""
    place = draw.textbbox((x, y), f"{each['label']}{score}", font=font)
    draw.rectangle(place, fill=color)
    draw.text((x, y), f"{each['label']}{score}", font=font, fill="white")
  return image


def parse(text: str, labels: Sequence[str]) -> list[Box]:
  """Returns the boxes of a sample in eval.json; raises ValueError if it is damaged."""
  boxes = json_files.parse(text.encode()).get("boxes")
  if not isinstance(boxes, list) or not all(_is_box(each, labels) for each in boxes):
    raise ValueError(
      f"eval.json: a sample has the boxes {shown(boxes)}; delete it, and the same command measures "
      "again"
    )
  return boxes


def _is_box(value: Any, labels: Sequence[str]) -> bool:
  if not isinstance(value, dict):
    return False
  box, score = value.get("box"), value.get("score", 0)
  if not isinstance(box, list) or len(box) != 4:
    return False
  return all(type(x) in (int, float) for x in (*box, score)) and value.get("label") in labels


def grid(
  pictures: Sequence[np.ndarray],
  names: Sequence[str],
  columns: Mapping[str, Sequence[Sequence[Box]]],
  sizes: Sequence[tuple[int, int]],
  labels: Sequence[str],
  partial: Any,
) -> None:
  """Writes a PNG file with a row for each picture and a column for each kind of boxes.

  Args:
    pictures: [height, width, 3] of uint8 each.
    names: of the pictures.
    columns: for each title, the boxes in each picture.
    sizes: width and height in pixels of the pictures that the boxes are given for.
    labels: the names of the classes.
    partial: the file.
  """
  from matplotlib.figure import Figure  # the import takes half a second, and few callers draw
  from matplotlib.patches import Patch, Rectangle

  known = {label: (r / 255, g / 255, b / 255) for label, (r, g, b) in colors(labels).items()}
  tallest = max(height / width for width, height in sizes)
  inches = (3.0 * len(columns), (3.0 * tallest + 0.3) * len(pictures) + 0.4)
  figure = Figure(figsize=inches, dpi=100, layout="constrained")
  places = figure.subplots(len(pictures), len(columns), squeeze=False)
  for row, (picture, name, (width, height)) in enumerate(zip(pictures, names, sizes, strict=True)):
    for column, (title, boxes) in enumerate(columns.items()):
      axes = places[row][column]
      axes.imshow(picture, extent=(0, width, height, 0))
      for each in boxes[row]:
        x, y, across, down = each["box"]
        axes.add_patch(
          Rectangle((x, y), across, down, fill=False, linewidth=1.4, edgecolor=known[each["label"]])
        )
      axes.set_axis_off()
      axes.set_title(f"{title}: {len(boxes[row])}", fontsize=9)
    places[row][0].set_title(f"{name}, wanted: {len(columns['wanted'][row])}", fontsize=9)
  figure.legend(
    handles=[Patch(edgecolor=color, fill=False, label=x) for x, color in known.items()],
    loc="outside lower center",
    ncols=min(len(known), 6),
    fontsize=9,
  )
  figure.savefig(partial, format="png", bbox_inches="tight")
