"""The common base of tasks on images: data, normalization, and refusals of methods for texts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import flax.linen as nn
import jax
import numpy as np

from lora_jax.data import pictures
from lora_jax.io.pretrained import Pretrained
from lora_jax.train.step import Batch

PyTree = Any
Record = dict[str, Any]

KEPT = 2
"""A larger picture is shrunk on reading to this multiple of the model's size, so that no crop of at
least a quarter of its area is enlarged."""

COLORS = 3

_UNTAUGHT = "distill.teacher: is for tasks on text; set it to none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfImages:
  """The base of tasks on images; see `lora_jax.tasks.Task` for the methods.

  labels: the names of the classes.
  size: pixels per side.
  mean, std: of each color, for normalization.
  crop_area, flip: of random crops in training, and the probability of a flip.
  model: the model without its weights; None until `of_model`.
  """

  NAME: ClassVar[str]
  TRAINS: ClassVar[tuple[str, ...]] = ("head/.*",)
  UNIT: ClassVar[str] = "image"

  labels: tuple[str, ...]
  size: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_area: float
  flip: float
  model: Pretrained | None = None

  @classmethod
  def check_fields(cls, data: Mapping[str, Any], loss_chunk: int) -> None:
    """Raises ValueError for fields that do not fit images."""
    if loss_chunk:
      raise ValueError(
        f"train.loss_chunk {loss_chunk}: is for logits of many tokens, and the task {cls.NAME} has "
        "no tokens; set it to 0"
      )
    for field in ("mean", "std"):
      if len(data[field]) != COLORS:
        raise ValueError(
          f"data.{field} has {len(data[field])} values; give one for each of red, green and blue"
        )

  # ---- records and examples

  def read(self, rows: Sequence[Record]) -> tuple[list[Record], str]:
    return list(rows), ""

  def derive(self, rows: Sequence[Record], data: Mapping[str, Any]) -> list[Record]:
    del data
    return list(rows)

  def check(self, rows: Sequence[Record]) -> None:
    del rows  # `open` has checked them

  def of_model(self, found: Pretrained) -> Self:
    config = found.config
    if getattr(config, "channels", None) != COLORS:
      raise ValueError(
        f"{found.source}: a {config.family!r} takes no images of {COLORS} colors, and the task "
        f"{self.NAME} gives it some"
      )
    if self.size % getattr(config, "patch_size", 1):
      raise ValueError(
        f"data.size {self.size} is no multiple of the model's patches of {config.patch_size} pixels"
      )
    # The weights stay with the caller.
    return dataclasses.replace(self, model=dataclasses.replace(found, params={}))

  # ---- batches

  def tokens(self, example: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} reads no texts, and has no tokens to show")

  def shape_of(self, batch: Batch) -> tuple[int, ...]:
    return batch["weights"].shape

  # ---- training and evaluation

  def forward(self, model: nn.Module) -> Callable:
    """Returns `(variables, uint8 images) -> outputs`, including the normalization."""
    mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)

    def apply(variables: PyTree, images_BHWC: jax.Array, **options: Any) -> Any:
      return model.apply(variables, (images_BHWC / np.float32(255) - mean) / std, **options)

    return apply

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], Any]:
    return lambda weights, batch: apply({"params": weights}, batch["images"])

  def mask(self, batch: Batch) -> None:
    """Returns None: patches and window positions have no padding."""
    del batch

  def reading(self, apply: Callable, hidden: bool) -> NoReturn:
    raise ValueError(_UNTAUGHT)

  def answers(self, batch: Batch) -> NoReturn:
    raise ValueError(_UNTAUGHT)

  # ---- images of one's own

  def files_of(self, given: str) -> list[Path]:
    """Returns the path of a picture, or those of a folder's pictures in the order of their names.

    Raises ValueError for a folder without pictures.
    """
    path = Path(given)
    if not path.is_dir():
      return [path]
    files = sorted(x for x in path.iterdir() if x.suffix.lower() in pictures.ENDINGS)
    if not files:
      raise ValueError(
        f"{given}: the folder has no pictures, whose names end in {', '.join(pictures.ENDINGS)}"
      )
    return files

  # ---- texts

  def prompts(self, *unused: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts; leave --beams out")

  def check_room(self, *unused: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts")

  @property
  def chat_format(self) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts; use experiments.predict")

  def write(self, *unused: Any, **how: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts")

  def longest_choice(self) -> NoReturn:
    raise ValueError(f"the task {self.NAME} writes no texts; use experiments.evaluate")


def check_seen(labels: Sequence[str], counts: Mapping[str, Sequence[int]], of: str) -> None:
  """Checks that each class of a split occurs in training.

  Args:
    labels: the names of the classes.
    counts: for each split, the count of each class; without `training` nothing is checked.
    of: describes what has a class, as "images".

  Raises:
    ValueError: for a class that training never saw.
  """
  for split, own in counts.items():
    unseen = [
      label
      for label, count, seen in zip(labels, own, counts.get("training", own), strict=True)
      if count and not seen
    ]
    if unseen:
      raise ValueError(
        f"{split}: has {of} of {', '.join(unseen)}, of which there are none to train on; add "
        "some, or take the class out of task.labels"
      )
