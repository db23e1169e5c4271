"""Average precision of detections by `pycocotools`, over all classes and of each.

    figures = average_precision(truths, detections, ("cat", "dog"))
    # {"map": 0.41, "map50": 0.72, "map50/cat": 0.8, "map50/dog": 0.64, "map/cat": …, "map/dog": …}

`pycocotools` is of the extra `vision`. Lin et al. 2014, "Microsoft COCO: Common Objects in
Context"; its detection metrics.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MOST = 100  # detections of an image that count, as in COCO


class Boxes(NamedTuple):
  """The boxes of an image.

  Attributes:
    boxes: [n, 4], x, y, width and height in pixels.
    classes: [n], the indices of the classes.
    scores: [n], of detections; of true boxes it is not read.
  """

  boxes: np.ndarray
  classes: np.ndarray
  scores: np.ndarray


def check_installed() -> None:
  """Raises ValueError if `pycocotools` is missing."""
  if importlib.util.find_spec("pycocotools") is None:
    raise ValueError(
      'the figures of a detector need the package pycocotools; pip install -e ".[vision]"'
    )


def average_precision(
  truths: Sequence[Boxes], detections: Sequence[Boxes], labels: Sequence[str]
) -> dict[str, float]:
  """Returns the metrics of detections, from 0 to 1.

  map: the mean over classes and over overlaps of 0.50, 0.55, …, 0.95 of the area under the curve of
    precision over recall, at most 100 detections an image.
  map50: the same at the overlap 0.50 alone.
  map/<label>, map50/<label>: of one class. NaN for a class without true boxes, which the means
    leave out.

  Args:
    truths: the true boxes of each image.
    detections: the detections on each image, in the same order.
    labels: the names of the classes.
  """
  from pycocotools.coco import COCO  # of an extra
  from pycocotools.cocoeval import COCOeval

  truth = COCO()
  # The stubs demand fields of COCO's own files (names, segmentations) that metrics do not read.
  truth.dataset = {  # pyright: ignore[reportAttributeAccessIssue]
    "images": [{"id": n} for n in range(len(truths))],
    "categories": [{"id": n} for n in range(len(labels))],
    "annotations": [
      {
        "id": id,
        "image_id": n,
        "category_id": int(k),
        "bbox": box.tolist(),
        "iscrowd": 0,
        "area": float(box[2] * box[3]),
      }
      for id, (n, box, k) in enumerate(
        (
          (n, box, k)
          for n, each in enumerate(truths)
          for box, k in zip(each.boxes, each.classes, strict=True)
        ),
        start=1,  # 0 stands for no match
      )
    ],
  }
  rows = [
    np.concatenate(
      [np.full((len(x.boxes), 1), n), x.boxes, x.scores[:, None], x.classes[:, None]], 1
    )
    for n, x in enumerate(detections)
  ]
  with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
    truth.createIndex()
    found = COCO()
    if sum(map(len, rows)):
      # The stubs know the path of a file alone; it takes an array of rows as well.
      found = truth.loadRes(np.concatenate(rows))  # pyright: ignore[reportArgumentType]
    run = COCOeval(truth, found, "bbox")
    run.params.imgIds, run.params.catIds = list(range(len(truths))), list(range(len(labels)))
    run.params.maxDets = [1, 10, _MOST]
    run.evaluate()
    run.accumulate()
  # Axes: overlaps, recalls, classes, areas (the first is all), numbers of detections.
  precision_TRK = run.eval["precision"][:, :, :, 0, -1]
  of_class_KT = [_mean(precision_TRK[:, :, k], axis=1) for k in range(len(labels))]
  metrics = {"map": _mean(precision_TRK), "map50": _mean(precision_TRK[0])}
  metrics |= {f"map50/{name}": x[0] for name, x in zip(labels, of_class_KT, strict=True)}
  metrics |= {f"map/{name}": x.mean() for name, x in zip(labels, of_class_KT, strict=True)}
  return {name: float(x) for name, x in metrics.items()}


def _mean(values: np.ndarray, axis: int | None = None):
  """The mean of the values that are not -1, pycocotools' mark of what does not occur, or NaN."""
  known = values > -1
  counts = known.sum(axis=axis)
  with np.errstate(invalid="ignore"):
    return np.where(known, values, 0).sum(axis=axis) / np.where(counts, counts, np.nan)
