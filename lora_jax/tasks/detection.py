"""Detection: boxes of objects in images, by an SSDLite on a MobileNetV2.

task.name = "detection"
task.labels = ("RBC", "WBC")             # the names of the categories
task.scales = ((0.1, 0.2), (0.4,))       # of anchors on each feature map, and their ratios;
task.ratios = (1.0, 2.0, 0.5)            #   see `lora_jax.models.ssdlite.SSDLiteConfig`
task.overlap = 0.5                       # of an anchor with its box; see `boxes.match`
task.negatives = 3                       # for each matched anchor; see `box_losses`
task.nms = 0.6                           # detections that overlap more are duplicates
task.least_score = 0.01                  # detections below it do not count in the metrics
task.shown_score = 0.5                   # answers and pictures show those above it
task.most = 100                          # detections of an image
data.source = "cells"                    # a folder; see `lora_jax.data.box_sets` for its files
data.annotations, data.test_annotations = "train.json", "val.json"
data.images = "images"                   # the pictures' folder within it
data.leave_out = ()                      # pictures that are not trained on
data.size = 256                          # pixels per side; pictures are resized to a square
data.mean, data.std = (0.5,) * 3, (0.5,) * 3     # of red, green and blue, from 0 to 1
data.crop_area, data.flip = 0.5, 0.5     # in training; see `lora_jax.data.box_batches`

The head is new, unless the model is a detector with the same labels and anchors. It is initialized
from the run's seed, trains in full and is saved with the adapter.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import families
from lora_jax.attachment import key_of
from lora_jax.checks import shown
from lora_jax.data import box_batches, box_sets, pictures
from lora_jax.data.batches import Shard, Watch
from lora_jax.data.box_batches import Example
from lora_jax.io import ssdlite_configs
from lora_jax.io.pretrained import Pretrained
from lora_jax.models import boxes, ssdlite
from lora_jax.models.mobilenet import MobileNetV2Config
from lora_jax.tasks import box_drawings, box_losses, coco_metrics, heads, of_images, questions
from lora_jax.train.step import Batch, Objective

PyTree = Any
Record = dict[str, Any]

_DEVIATION = 0.01  # of the kernels that make predictions
_WHOLE_SIZE = 1 << 26  # no picture that is read has a longer side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(of_images.OfImages):
  """See the module and `of_images.OfImages` for the fields, and `lora_jax.tasks.Task` for the
  methods."""

  FIELDS: ClassVar[tuple[str, ...]] = (
    "labels", "scales", "ratios", "overlap", "negatives", "nms", "least_score", "shown_score",
    "most",
  )  # fmt: skip
  NAME: ClassVar[str] = "detection"

  scales: tuple[tuple[float, ...], ...]
  ratios: tuple[float, ...]
  overlap: float
  negatives: int
  nms: float
  least_score: float
  shown_score: float
  most: int

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    cls.check_fields(data, loss_chunk)
    coco_metrics.check_installed()
    ssdlite.check_anchors("task.", task["scales"], task["ratios"])
    labels = tuple(task["labels"])
    if not labels or len(set(labels)) < len(labels):
      raise ValueError(f"task.labels {shown(labels)}: give different names, at least one")
    names = ("overlap", "negatives", "nms", "least_score", "shown_score", "most")
    return cls(
      labels=labels, scales=tuple(map(tuple, task["scales"])), ratios=tuple(task["ratios"]),
      size=data["size"], mean=tuple(data["mean"]), std=tuple(data["std"]),
      crop_area=data["crop_area"], flip=data["flip"], **{name: task[name] for name in names},
    )  # fmt: skip

  # ---- records and examples

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[Record]:
    name = data["test_annotations" if held_out else "annotations"]
    return box_sets.read(
      path, name, data["images"], self.labels, of_images.KEPT * self.size,
      () if held_out else data["leave_out"],
    )  # fmt: skip

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    if not isinstance(found.config, MobileNetV2Config):
      raise ValueError(
        f"{found.source}: a {found.config.family!r} is no backbone of the task detection; use a "
        "MobileNetV2, or an SSDLite on one"
      )
    config = ssdlite_configs.of_backbone(found.config, self.labels, self.scales, self.ratios)
    if found.config == config:
      return found
    return heads.replace(found, families.family_of(config), config, key, _start)

  def examples(self, rows: Sequence[Record]) -> list[Example]:
    numbers = {label: number for number, label in enumerate(self.labels)}
    return [
      Example(row["picture"], row["boxes"], np.array([numbers[x] for x in row["labels"]], np.int32),
              row["size"], row["name"])
      for row in rows
    ]  # fmt: skip

  # ---- batches

  def train_batches(
    self, examples: Sequence[Example], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return box_batches.train_batches(
      examples, batch_size, size=self.size, crop_area=self.crop_area, flip=self.flip, seed=seed,
      **rows,
    )  # fmt: skip

  def eval_batches(
    self, examples: Sequence[Example], batch_size: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return box_batches.eval_batches(examples, batch_size, size=self.size, **rows)

  def describe(self, **examples: Sequence[Example]) -> dict[str, Any]:
    counts = {
      split: sum(
        (np.bincount(each.labels, minlength=len(self.labels)) for each in own),
        np.zeros(len(self.labels), np.int64),
      ).tolist()
      for split, own in examples.items()
    }
    of_images.check_seen(self.labels, counts, "boxes")
    images = {split: len(own) for split, own in examples.items()}
    return {"size": self.size, "labels": list(self.labels), "images": images, "splits": counts}

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    _check_described(described)
    found = []
    for split, counts in described["splits"].items():
      named = zip(described["labels"], counts, strict=True)
      each = ", ".join(f"{count:,} {label}" for label, count in named)
      found.append(
        f"{split}: {described['images'][split]:,} images, resized to {described['size']} pixels a "
        f"side, with {sum(counts):,} boxes: {each}"
      )
    return found

  def summary(self, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    return box_batches.summary(examples, batch_size, self.size)

  def batch_of(self, shape: tuple[int, int, int], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    height, width, most = shape
    return {
      "images": jax.ShapeDtypeStruct((rows, height, width, of_images.COLORS), jnp.uint8),
      "boxes": jax.ShapeDtypeStruct((rows, most, 4), jnp.float32),
      "labels": jax.ShapeDtypeStruct((rows, most), jnp.int32),
      "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }

  def words_of(self, shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} × {shape[1]} pixels and {shape[2]} boxes"

  # ---- training and evaluation

  def objective(self, apply: Callable) -> Objective:
    losses = self._losses(apply)

    def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
      count = jnp.sum(batch["weights"])
      total = jnp.sum(losses(weights, batch)[0] * batch["weights"])
      return total / jnp.where(count > 0, count, 1), count

    return objective

  def make_eval_step(self, apply: Callable) -> Callable[[PyTree, Batch], PyTree]:
    losses = self._losses(apply)

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      losses_B, logits_BNK, boxes_BN4 = losses(weights, batch)
      kept = {x: batch[x] for x in ("boxes", "labels", "sizes", "weights")}
      return {
        "loss": jnp.sum(losses_B * batch["weights"]),
        "found": self._found(logits_BNK, boxes_BN4, self.least_score),
        **kept,
      }

    return step

  def _losses(self, apply: Callable) -> Callable[[PyTree, Batch], tuple[jax.Array, ...]]:
    """`(weights, batch) -> (the loss of each image, logits, boxes)`."""

    def losses(weights: PyTree, batch: Batch) -> tuple[jax.Array, ...]:
      logits_BNK, offsets_BN4, anchors_N4 = apply(
        {"params": weights}, batch["images"], method="offsets"
      )
      losses_B = box_losses.multibox_losses(
        logits_BNK, offsets_BN4, anchors_N4, batch, overlap=self.overlap, negatives=self.negatives
      )
      return losses_B, logits_BNK, boxes.decode(offsets_BN4, anchors_N4)

    return losses

  def _found(self, logits_BNK: jax.Array, boxes_BN4: jax.Array, least_score: float) -> jax.Array:
    """The detections [B, D, 6] by falling score: corners, class, and score, 0 for padding."""
    scores_BNK = jax.nn.softmax(logits_BNK)[..., 1:]
    how = {"least_score": least_score, "overlap": self.nms, "most": self.most}
    corners_BD4, classes_BD, scores_BD = jax.vmap(functools.partial(boxes.detect, **how))(
      boxes_BN4, scores_BNK
    )
    return jnp.concatenate(
      [corners_BD4, classes_BD[..., None].astype(jnp.float32), scores_BD[..., None]], axis=-1
    )

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    truths, detections = [], []
    for batch in outputs:
      each = zip(*(np.asarray(batch[x]) for x in ("boxes", "labels", "sizes", "weights", "found")),
                 strict=True)  # fmt: skip
      for corners_M4, labels_M, size, weight, found_D6 in each:
        if weight > 0:
          own = labels_M >= 0
          truths.append(
            coco_metrics.Boxes(_in_pixels(corners_M4[own], size), labels_M[own], labels_M[own])
          )
          real = found_D6[found_D6[:, 5] > 0]
          detections.append(
            coco_metrics.Boxes(_in_pixels(real[:, :4], size), real[:, 4].astype(int), real[:, 5])
          )
    loss = sum(float(batch["loss"]) for batch in outputs) / len(truths)
    figures = coco_metrics.average_precision(truths, detections, self.labels)
    return {"loss": loss, **figures, "rows": len(truths)}

  def line(self, metrics: Mapping[str, float]) -> str:
    each = ", ".join(f"{label} {metrics[f'map50/{label}']:.1%}" for label in self.labels)
    return (
      f"mAP {metrics['map']:.1%}, mAP@0.5 {metrics['map50']:.1%} ({each}), loss "
      f"{metrics['loss']:.3f} on {metrics['rows']} images"
    )

  # ---- what people are shown

  def given(self, examples: Sequence[Example]) -> list[dict[str, str]]:
    return [{"prompt": x.name, "wanted": _as_text(self._true_boxes(x))} for x in examples]

  def _true_boxes(self, example: Example) -> list[box_drawings.Box]:
    found_n6 = np.concatenate(
      [example.boxes, example.labels[:, None], np.ones((len(example.labels), 1))], axis=1
    )
    return [
      {name: each[name] for name in ("label", "box")}
      for each in self._boxes(found_n6, example.size)
    ]

  def _boxes(self, found_D6: np.ndarray, size: Sequence[int]) -> list[dict[str, Any]]:
    """Detections as JSON values, boxes in pixels."""
    real = found_D6[found_D6[:, 5] > 0]
    pixels = np.round(_in_pixels(real[:, :4], size).astype(np.float64), 1).tolist()
    scores = np.round(real[:, 5].astype(np.float64), 4).tolist()
    return [
      {"label": self.labels[int(k)], "score": score, "box": box}
      for k, score, box in zip(real[:, 4], scores, pixels, strict=True)
    ]

  def _step(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """The jitted step `(weights, batch) -> the detections to show`."""

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> jax.Array:
      logits_BNK, boxes_BN4 = apply({"params": weights}, batch["images"])
      return self._found(logits_BNK, boxes_BN4, self.shown_score)

    return step

  def make_show(
    self, apply: Callable, examples: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """Returns `weights -> the boxes found in each image`, as JSON."""
    [batch] = self.eval_batches(examples, -(-len(examples) // share) * share)
    step = self._step(apply)

    def show(weights: PyTree) -> list[str]:
      found = questions.answers(lambda batch: put(step(weights, batch)), [batch], np.asarray)
      return [
        _as_text(self._boxes(each, example.size))
        for each, example in zip(found, examples, strict=True)
      ]

    return show

  def asked(self, given: str) -> list[Example]:
    """Returns the image of a file, or the images of a folder in the order of their names."""
    found = []
    for file in self.files_of(given):
      whole = pictures.read(file, _WHOLE_SIZE)
      size = whole.shape[1::-1]
      picture = pictures.shrunk(whole, of_images.KEPT * self.size)
      none = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
      found.append(Example(picture, *none, size, str(file)))
    return found

  def predict(
    self,
    apply: Callable,
    weights: PyTree,
    examples: Sequence[Example],
    *,
    batch_size: int,
    watch: Watch = iter,
  ) -> list[questions.Answer]:
    """Returns `image`, its `size`, and `boxes`, each with `label`, `score` and `box`: x, y, width
    and height in pixels; `watch` wraps the batches."""
    step = self._step(apply)
    data = watch(self.eval_batches(examples, batch_size))
    found = questions.answers(lambda batch: step(weights, batch), data, np.asarray)
    return [
      {"image": x.name, "size": list(x.size), "boxes": self._boxes(each, x.size)}
      for x, each in zip(examples, found, strict=True)
    ]

  def mark(self, example: Example) -> Callable[[questions.Answer, Any], None]:
    """Returns a function that draws an answer into a copy of the example's picture."""

    def draw(answer: questions.Answer, partial: Any) -> None:
      picture = pictures.read(example.name, _WHOLE_SIZE)
      box_drawings.into(picture, answer["boxes"], self.labels).save(partial, format="PNG")

    return draw

  def draw(
    self, examples: Sequence[Example], samples: Sequence[Mapping[str, str]]
  ) -> Callable[[Any], None] | None:
    """Draws a row for each image: the boxes wanted, and those found before and after."""
    if not examples:
      return None
    whens = [when for when in ("wanted", "before", "after") if when in samples[0]]
    columns = {
      when: [box_drawings.parse(sample[when], self.labels) for sample in samples] for when in whens
    }
    return functools.partial(
      box_drawings.grid, [x.picture for x in examples], [x.name for x in examples], columns,
      [x.size for x in examples], self.labels,
    )  # fmt: skip


def _start(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
  """A new leaf of the head: biases 0; the kernels that make predictions small, so that all anchors
  begin alike (Lin et al. 2017, "Focal Loss", section 4.1); others by He et al. 2015, equation 10.
  """
  if not path.endswith("/kernel"):
    return jnp.zeros(shape)
  if path.endswith("/pointwise/kernel") and not path.startswith("head/extra"):
    return _DEVIATION * jax.random.normal(key_of(key, path), shape)
  return jax.nn.initializers.he_normal()(key_of(key, path), shape)


def _in_pixels(corners_N4: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Corners as fractions to x, y, width and height in pixels."""
  corners_N4 = corners_N4 * np.array([*size, *size], np.float32)
  return np.concatenate([corners_N4[:, :2], corners_N4[:, 2:] - corners_N4[:, :2]], axis=1)


def _as_text(found: Sequence[Mapping[str, Any]]) -> str:
  return json.dumps({"boxes": list(found)}, ensure_ascii=False)


def _check_described(described: Mapping[str, Any]) -> None:
  labels, splits, images = (described.get(x) for x in ("labels", "splits", "images"))
  whole = False
  if isinstance(labels, list) and isinstance(splits, dict) and isinstance(images, dict):
    whole = all(isinstance(x, str) for x in labels)
    whole = whole and type(described.get("size")) is int and images.keys() == splits.keys()
    for split, counts in splits.items():
      whole = whole and isinstance(counts, list) and len(counts) == len(labels)
      whole = whole and all(type(n) is int for n in [images[split], *counts])
  if not whole:
    raise ValueError(f"data is {shown(dict(described))}")
