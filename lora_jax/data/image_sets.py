"""Sets of labeled pictures as records: arrays of an `.npz` file, or a folder of class folders.

    records = read("cifar.npz", ("images", "labels"), classes=("cat", "dog"), most=224)
    records = read("animals", (), classes=("cat", "dog"), most=224)       # animals/cat/1.jpg, ...
    records[0]      # {"picture": uint8 [height, width, 3], "label": "cat", "name": …, "digest": …}

`digest` is the SHA-256 of the picture's values, so records with the same digest have the same
picture.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checks import shown
from lora_jax.data import npz_files, pictures

Record = dict[str, Any]

_MAX_FILES = 1 << 20


def read(
  path: str | Path, arrays: Sequence[str], classes: Sequence[str], most: int
) -> list[Record]:
  """Returns the records of a set; those of a folder are in the order of their names.

  Args:
    path: an `.npz` file, or a folder with a subfolder per class.
    arrays: for a file, the name of the array of pictures, uint8 [N, H, W], [N, H, W, 1] or
      [N, H, W, 3], and that of the labels, integers [N] or [N, 1]; () for a folder.
    classes: the names of the classes, in the order of the labels; for a folder, its subfolders.
    most: as in `pictures.read`.

  Raises:
    FileNotFoundError: if the path does not exist.
    ValueError: as `npz_files.read` and `pictures.read` do; for arrays of another kind, labels out
      of range, subfolders that do not match the classes, and a set without pictures.
  """
  path = Path(path)
  if path.is_dir():
    if arrays:
      raise ValueError(f"{path}: is a folder and has no arrays; leave data.arrays empty, ()")
    found = _of_folder(path, classes, most)
  else:
    if len(arrays) != 2:
      raise ValueError(
        f"{path}: name the array of pictures and that of labels, as ('images', 'labels'), not "
        f"{shown(tuple(arrays))}"
      )
    images, labels = npz_files.read(path, arrays)
    try:
      found = _of_arrays(images, labels, arrays, classes, most)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None
  if not found:
    raise ValueError(f"{path}: holds no picture")
  return found


def _of_arrays(
  images: np.ndarray, labels: np.ndarray, names: Sequence[str], classes: Sequence[str], most: int
) -> list[Record]:
  if images.ndim == 3:
    images = images[..., None]
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(
      f"{names[0]} is {images.dtype} {images.shape}, and pictures are uint8 [N, height, width], "
      "with 1 or 3 channels"
    )
  if 0 in images.shape[1:]:
    raise ValueError(f"{names[0]} is {images.shape}: its pictures have no pixels")
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.dtype.kind not in "ui" or labels.shape != images.shape[:1]:
    raise ValueError(
      f"{names[1]} is {labels.dtype} {labels.shape}, and labels are whole numbers, one for each of "
      f"{len(images)} pictures"
    )
  beyond = np.flatnonzero((labels < 0) | (labels >= len(classes)))
  if len(beyond):
    raise ValueError(
      f"{names[1]}[{beyond[0]}] is {labels[beyond[0]]}, and task.labels names the classes 0 to "
      f"{len(classes) - 1}"
    )
  return [
    _record(
      pictures.shrunk(np.broadcast_to(image, (*image.shape[:2], 3)), most),
      classes[int(label)],
      f"{names[0]}[{n}]",
    )
    for n, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
  ]


def _of_folder(folder: Path, classes: Sequence[str], most: int) -> list[Record]:
  entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
  for path in entries:
    if not path.is_dir() or path.name not in classes:
      raise ValueError(
        f"{path}: is no folder of a class of task.labels, {shown(tuple(classes))}; take it out"
      )
  found = []
  for path in entries:
    for file in sorted(x for x in path.iterdir() if not x.name.startswith(".")):
      if file.suffix.lower() not in pictures.ENDINGS:
        raise ValueError(
          f"{file}: its name does not end as a picture's, in {', '.join(pictures.ENDINGS)}; take "
          "it out"
        )
      if len(found) == _MAX_FILES:
        raise ValueError(f"{folder}: holds more than {_MAX_FILES:,} files; take a part of it")
      found.append(_record(pictures.read(file, most), path.name, f"{path.name}/{file.name}"))
  return found


def _record(picture: np.ndarray, label: str, name: str) -> Record:
  return {"picture": picture, "label": label, "name": name, "digest": digest(picture)}


def digest(picture: np.ndarray) -> str:
  """Returns the SHA-256 of a picture's shape and values."""
  sizes = np.array(picture.shape, np.int64).tobytes()
  return hashlib.sha256(sizes + np.ascontiguousarray(picture).tobytes()).hexdigest()
