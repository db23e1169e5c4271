"""Image classification: an image model with a classification head.

task.name = "images"
task.labels = ("cat", "dog")             # the names, in the order of the head's outputs
data.source = "train.npz"                # or a folder with a subfolder per class
data.arrays = ("images", "labels")       # of an .npz file; () for a folder
data.size = 96                           # pixels per side of the model's input
data.mean, data.std = (0.5,) * 3, (0.5,) * 3     # of red, green and blue, from 0 to 1
data.crop_area, data.flip = 0.5, 0.5     # in training; see `lora_jax.data.image_batches`

The head is new. It is initialized from the run's seed, trains in full and is saved with the
adapter, as PEFT's `modules_to_save`. The model is transformers' `...ForImageClassification`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.checks import shown
from lora_jax.data import image_batches, image_sets, pictures
from lora_jax.data.batches import Shard, Watch
from lora_jax.data.image_batches import Example
from lora_jax.io.pretrained import Pretrained
from lora_jax.models.ssdlite import SSDLiteConfig
from lora_jax.tasks import class_metrics, heads, of_images, questions
from lora_jax.train.distillation import Reading
from lora_jax.train.step import Batch, Objective

PyTree = Any
Record = dict[str, Any]

_COLUMNS = 6  # of the grid of pictures that is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images(of_images.OfImages):
  """See the module, `of_images.OfImages` for the fields, and `lora_jax.tasks.Task` for the methods.

  crop_area, flip: as in `image_batches.train_batches`.
  """

  FIELDS: ClassVar[tuple[str, ...]] = ("labels",)
  NAME: ClassVar[str] = "images"

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    cls.check_fields(data, loss_chunk)
    return cls(
      labels=heads.labels_of(task),
      size=data["size"],
      mean=tuple(data["mean"]),
      std=tuple(data["std"]),
      crop_area=data["crop_area"],
      flip=data["flip"],
    )

  # ---- records and examples

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[Record]:
    arrays = data["test_arrays" if held_out else "arrays"]
    return image_sets.read(path, tuple(arrays), self.labels, most=of_images.KEPT * self.size)

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    if isinstance(found.config, SSDLiteConfig):
      raise ValueError(
        f"{found.source}: is a detector, and the task images needs a classifier; use its backbone"
      )
    return heads.add(found, key, self.labels)

  def examples(self, rows: Sequence[Record]) -> list[Example]:
    numbers = {label: number for number, label in enumerate(self.labels)}
    return [Example(row["picture"], numbers[row["label"]], row["name"]) for row in rows]

  # ---- batches

  def train_batches(
    self, examples: Sequence[Example], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return image_batches.train_batches(
      examples,
      batch_size,
      size=self.size,
      crop_area=self.crop_area,
      flip=self.flip,
      seed=seed,
      **rows,
    )

  def eval_batches(
    self, examples: Sequence[Example], batch_size: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return image_batches.eval_batches(examples, batch_size, size=self.size, **rows)

  def describe(self, **examples: Sequence[Example]) -> dict[str, Any]:
    counts = {
      split: np.bincount([each.label for each in own], minlength=len(self.labels)).tolist()
      for split, own in examples.items()
    }
    of_images.check_seen(self.labels, counts, "images")
    return {"size": self.size, "labels": list(self.labels), "splits": counts}

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    _check_described(described)
    found = []
    for split, counts in described["splits"].items():
      each = ", ".join(
        f"{count:,} {label}" for label, count in zip(described["labels"], counts, strict=True)
      )
      found.append(f"{split}: {sum(counts):,} images of {described['size']} pixels a side: {each}")
    return found

  def summary(self, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    return image_batches.summary(examples, batch_size, self.size)

  def batch_of(self, shape: tuple[int, int], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      "images": jax.ShapeDtypeStruct((rows, *shape, of_images.COLORS), jnp.uint8),
      "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
      "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }

  def words_of(self, shape: tuple[int, int]) -> str:
    return f"{' × '.join(map(str, shape))} pixels"

  # ---- training and evaluation

  def objective(self, apply: Callable) -> Objective:
    def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
      total, count = _loss(apply({"params": weights}, batch["images"]), batch)
      return total / jnp.where(count > 0, count, 1), count

    return objective

  def reading(self, apply: Callable, hidden: bool) -> Callable[[PyTree, Batch], Reading]:
    """The logits [B, 1, K]; hidden states of the families differ in form, and are not read."""
    if hidden:
      raise ValueError("distill.hidden: is for tasks on text; set it to 0")

    def read(weights: PyTree, batch: Batch) -> jax.Array:
      return apply({"params": weights}, batch["images"])[:, None]

    return read

  def answers(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return batch["labels"][:, None], batch["weights"][:, None]

  def make_eval_step(self, apply: Callable) -> Callable[[PyTree, Batch], PyTree]:
    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      logits_BK = apply({"params": weights}, batch["images"])
      loss, _ = _loss(logits_BK, batch)
      scores_BK = jax.nn.softmax(logits_BK.astype(jnp.float32))
      return {"loss": loss, "scores": scores_BK} | {x: batch[x] for x in ("labels", "weights")}

    return step

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    joined = {
      name: np.concatenate([np.asarray(each[name]) for each in outputs])
      for name in ("scores", "labels", "weights")
    }
    real = joined["weights"] > 0
    rows = int(real.sum())
    loss = sum(float(each["loss"]) for each in outputs) / rows
    found = class_metrics.of_scores(joined["scores"][real], joined["labels"][real])
    return {"loss": loss, **found, "rows": rows}

  def line(self, metrics: Mapping[str, float]) -> str:
    return (
      f"accuracy {metrics['accuracy']:.1%}, balanced {metrics['balanced_accuracy']:.1%}, AUC "
      f"{metrics['auc']:.3f}, loss {metrics['loss']:.3f} on {metrics['rows']} images"
    )

  # ---- what people are shown

  def given(self, examples: Sequence[Example]) -> list[dict[str, str]]:
    return [{"prompt": each.name, "wanted": self.labels[each.label]} for each in examples]

  def make_show(
    self, apply: Callable, examples: Sequence[Example], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """Returns `weights -> the predicted class of each image`."""
    [batch] = self.eval_batches(examples, -(-len(examples) // share) * share)
    probabilities = _probabilities(apply)

    def show(weights: PyTree) -> list[str]:
      found = questions.answers(
        lambda batch: put(probabilities(weights, batch)), [batch], self._answer
      )
      return [each["label"] for each in found]

    return show

  # ---- answers for images of one's own

  def asked(self, given: str) -> list[Example]:
    """Returns the image of a file, or the images of a folder in the order of their names."""
    most = of_images.KEPT * self.size
    return [Example(pictures.read(x, most), 0, str(x)) for x in self.files_of(given)]

  def predict(
    self,
    apply: Callable,
    weights: PyTree,
    examples: Sequence[Example],
    *,
    batch_size: int,
    watch: Watch = iter,
  ) -> list[questions.Answer]:
    """Returns `image`, `label` and `probabilities` of each; `watch` wraps the batches."""
    step = _probabilities(apply)
    data = watch(self.eval_batches(examples, batch_size))
    found = questions.answers(lambda batch: step(weights, batch), data, self._answer)
    return [{"image": example.name} | each for example, each in zip(examples, found, strict=True)]

  def mark(self, example: Example) -> None:
    """Returns None: an answer has no place in the picture."""

  def _answer(self, probabilities: np.ndarray) -> questions.Answer:
    return {
      "label": self.labels[int(probabilities.argmax())],
      "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True)),
    }

  def draw(
    self, examples: Sequence[Example], samples: Sequence[Mapping[str, str]]
  ) -> Callable[[Any], None] | None:
    """Draws a grid of the images with their labels, and the predictions before and after."""
    if not examples:
      return None
    return functools.partial(_draw, examples, samples, self.size)


def _probabilities(apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
  """The jitted step `(weights, batch) -> the probability of each class`, [rows, classes]."""

  @jax.jit
  def step(weights: PyTree, batch: Batch) -> jax.Array:
    return jax.nn.softmax(apply({"params": weights}, batch["images"]).astype(jnp.float32))

  return step


def _loss(logits_BK: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """The sum of the cross-entropies in nats, and the number of rows."""
  losses_B = optax.softmax_cross_entropy_with_integer_labels(
    logits_BK.astype(jnp.float32), batch["labels"]
  )
  return jnp.sum(losses_B * batch["weights"]), jnp.sum(batch["weights"])


def _draw(
  examples: Sequence[Example], samples: Sequence[Mapping[str, str]], size: int, partial: Any
) -> None:
  from matplotlib.figure import Figure  # the import takes half a second, and few callers draw

  columns = min(_COLUMNS, len(examples))
  rows = -(-len(examples) // columns)
  figure = Figure(figsize=(2.0 * columns, 2.8 * rows), dpi=100)
  figure.subplots_adjust(hspace=0.45, wspace=0.06)  # room for the lines below a picture
  for place, (example, sample) in enumerate(zip(examples, samples, strict=True)):
    axes = figure.add_subplot(rows, columns, place + 1)
    axes.imshow(image_batches.crop(example.picture, size, 1.0, 0.5, 0.5))
    axes.set_axis_off()
    axes.set_title(sample["wanted"], fontsize=10, fontweight="bold")
    said = [(when, sample[when]) for when in ("before", "after") if when in sample]
    for line, (when, answer) in enumerate(said):
      color = "#1a7f37" if answer == sample["wanted"] else "#b3261e"
      axes.text(
        0.5,
        -0.04 - 0.12 * line,
        f"{when}: {answer}",
        transform=axes.transAxes,
        fontsize=9,
        color=color,
        ha="center",
        va="top",
      )
  figure.savefig(partial, format="png", bbox_inches="tight")


def _check_described(described: Mapping[str, Any]) -> None:
  labels, splits = described.get("labels"), described.get("splits")
  whole = False
  if isinstance(labels, list) and isinstance(splits, dict) and type(described.get("size")) is int:
    whole = all(isinstance(x, str) for x in labels)
    for counts in splits.values():
      whole = whole and isinstance(counts, list) and len(counts) == len(labels)
      whole = whole and all(type(n) is int for n in counts)
  if not whole:
    raise ValueError(f"data is {shown(dict(described))}")
