"""Sets of pictures with boxes as records, from annotations in COCO's format.

    cells/
      train.json      {"images": [...], "annotations": [...], "categories": [...]}
      images/1.jpg ...

    records = read("cells", "train.json", "images", ("red", "white"), most=448)
    records[0]      # {"picture": …, "boxes": float32 [n, 4], "labels": ["red", …],
                    #  "size": (640, 480), "name": "1.jpg", "digest": …}

Boxes are (left, top, right, bottom), as fractions of the picture's width and height; in the file
they are `bbox`, (x, y, width, height) in pixels. `size` is the picture's width and height in pixels
as it is shown, with its EXIF orientation applied. `digest` is as in `lora_jax.data.image_sets`.

    a box that ends up to a pixel outside       clipped to the picture
    a box further outside, or without area      refused
    a picture without boxes                     kept, all of it background
    iscrowd 1 (a box around many objects)       refused
    segmentation, area, keypoints, licenses     not read; the area is that of the box
    width, height of an image                   if given, must be those of the picture
    a category without boxes                    may be missing from the labels

Files are untrusted. An error names the file and the entry.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.data import image_sets, pictures
from lora_jax.io import json_files

Record = dict[str, Any]
Entry = Mapping[str, Any]

_MOST_BYTES = 1 << 28  # of annotations
_WHOLE_SIZE = 1 << 26  # no picture that is read has a longer side
_SLACK = 1.0  # pixels
_LARGEST = 1e9  # of a number in pixels, beyond any picture


def read(
  folder: str | Path,
  annotations: str,
  images: str,
  labels: Sequence[str],
  most: int,
  leave_out: Collection[str] = (),
) -> list[Record]:
  """Returns the records of a set, in the order of `images` in the file.

  Args:
    folder: the set.
    annotations: the path of the annotations within it.
    images: the path of the pictures' folder within it; "" for the set's folder itself.
    labels: the names of the classes, those of the categories that have boxes.
    most: as in `pictures.read`.
    leave_out: names of pictures that are not read, such as near duplicates of held-out ones.

  Raises:
    FileNotFoundError: if the annotations or a picture do not exist.
    ValueError: as `json_files.read_json` and `pictures.read` do; for a field of another type, an
      id, a name or a picture that is there twice, an annotation of an image or category that is
      not there, boxes that are refused (see the module), a class that is not in `labels`, pictures
      outside of the folder, and names in `leave_out` that are not there.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise ValueError(
      f"{folder}: is no folder; give the one that holds the annotations and pictures"
    )
  path = folder / _within(annotations, "annotations")
  where = folder / _within(images, "images") if images else folder
  fields = json_files.read_json(path, "annotations in COCO's format", most=_MOST_BYTES)
  try:
    entries, boxes = _entries(fields, labels)
    entries = _without(entries, leave_out)
    if not entries:
      raise ValueError("images: names no picture")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  return [_record(entry, boxes[entry["id"]], path, where, most) for entry in entries]


def _within(name: str, field: str) -> str:
  """The name of a file or folder, if it stays within the folder that it is in."""
  parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
  is_absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
  if not name or ".." in parts or is_absolute or "\0" in name or "\\" in name:
    raise ValueError(f"{field} {shown(name)} leads out of the folder; give a name within it")
  return name


def _without(entries: Sequence[Entry], leave_out: Collection[str]) -> list[Entry]:
  names = {entry["file_name"] for entry in entries}
  if missing := sorted(set(leave_out) - names):
    raise ValueError(f"data.leave_out names {shown(missing[0])}, which is no picture of images")
  return [entry for entry in entries if entry["file_name"] not in leave_out]


# ---- the annotations


def _entries(
  fields: Entry, labels: Sequence[str]
) -> tuple[list[Entry], Mapping[int, list[tuple[str, str, list[float]]]]]:
  """The images, and for each id the name of the annotation, the label and the box."""
  images = _list_of(fields, "images", {"id": int, "file_name": str})
  _check_unique(images, "images", "file_name")
  for n, image in enumerate(images):
    _within(image["file_name"], f"images[{n}]: file_name")
  categories = _list_of(fields, "categories", {"id": int, "name": str})
  _check_unique(categories, "categories", "name")
  names = {category["id"]: category["name"] for category in categories}
  kinds = {"id": int, "image_id": int, "category_id": int, "bbox": list}
  known, found = {image["id"] for image in images}, defaultdict(list)
  annotations = _list_of(fields, "annotations", kinds)
  _check_unique(annotations, "annotations")
  for n, each in enumerate(annotations):
    where = f"annotations[{n}]"
    if each["image_id"] not in known:
      raise ValueError(f"{where}: image_id {each['image_id']} is the id of none of images")
    if each["category_id"] not in names:
      raise ValueError(f"{where}: category_id {each['category_id']} is the id of no category")
    label = names[each["category_id"]]
    if label not in labels:
      raise ValueError(
        f"{where}: is a box of {shown(label)}, which is not in task.labels, "
        f"{shown(tuple(labels))}; add it, or take its boxes out"
      )
    if each.get("iscrowd", 0) not in (0, False):
      raise ValueError(
        f"{where}: iscrowd is {shown(each['iscrowd'])}; boxes around many objects are not read, "
        "take it out"
      )
    found[each["image_id"]].append((where, label, _numbers(where, each["bbox"])))
  return images, found


def _list_of(fields: Entry, name: str, kinds: Mapping[str, type]) -> list[Entry]:
  entries = fields.get(name)
  if not isinstance(entries, list):
    raise ValueError(f"{name} must be a list, not {shown(entries)}")
  for n, entry in enumerate(entries):
    if not isinstance(entry, dict):
      raise ValueError(f"{name}[{n}] must be an object, not {shown(entry)}")
    for field, kind in kinds.items():
      if type(entry.get(field)) is not kind:
        words = {int: "a whole number", str: "a text", list: "a list"}[kind]
        raise ValueError(f"{name}[{n}]: {field} must be {words}, not {shown(entry.get(field))}")
  return entries


def _check_unique(entries: Sequence[Entry], name: str, *fields: str) -> None:
  for field in ("id", *fields):
    seen = {}
    for n, entry in enumerate(entries):
      first = seen.setdefault(entry[field], n)
      if first != n:
        raise ValueError(
          f"{name}[{n}]: {field} {shown(entry[field])} is that of {name}[{first}] too; change one"
        )


def _numbers(where: str, bbox: Sequence[Any]) -> list[float]:
  """A `bbox` as (x, y, width, height) in pixels."""
  is_number = [type(x) in (int, float) and abs(x) <= _LARGEST for x in bbox]
  if len(bbox) != 4 or not all(is_number):
    raise ValueError(f"{where}: bbox must be 4 numbers, x, y, width and height, not {shown(bbox)}")
  if bbox[2] <= 0 or bbox[3] <= 0:
    raise ValueError(f"{where}: bbox {shown(bbox)} has no area; take it out")
  return [float(x) for x in bbox]


# ---- the pictures


def _record(entry: Entry, boxes: Sequence, annotations: Path, folder: Path, most: int) -> Record:
  file = folder / entry["file_name"]
  try:
    whole = pictures.read(file, _WHOLE_SIZE)
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{file}: no such picture, and {annotations} has it among its images"
    ) from None
  height, width = whole.shape[:2]
  for name, size in (("width", width), ("height", height)):
    if name in entry and (type(entry[name]) is bool or entry[name] != size):
      raise ValueError(
        f"{annotations}: the image {shown(entry['file_name'])} has the {name} "
        f"{shown(entry[name])}, and {file} has {size}, as it is shown; its boxes are of another "
        "picture, or of this one before it was turned or resized"
      )
  corners = [_corners(f"{annotations}: {each}", bbox, (width, height)) for each, _, bbox in boxes]
  return {
    "picture": (picture := pictures.shrunk(whole, most)),
    "boxes": np.array(corners, np.float32).reshape(-1, 4),
    "labels": [label for _, label, _ in boxes],
    "size": (width, height),
    "name": entry["file_name"],
    "digest": image_sets.digest(picture),
  }


def _corners(where: str, bbox: Sequence[float], size: tuple[int, int]) -> list[float]:
  """The corners of a box as fractions of the picture."""
  found = []
  for low, side, most in zip(bbox[:2], bbox[2:], size, strict=True):
    high = low + side
    if low < -_SLACK or high > most + _SLACK:
      raise ValueError(
        f"{where}: bbox {shown(bbox)} is outside of its picture of {size[0]} × {size[1]} pixels; "
        "clip it, or take it out"
      )
    low, high = max(low, 0.0), min(high, float(most))
    if high <= low:
      raise ValueError(f"{where}: bbox {shown(bbox)} has no area within its picture; take it out")
    found.append((low / most, high / most))
  return [found[0][0], found[1][0], found[0][1], found[1][1]]
