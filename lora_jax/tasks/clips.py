"""The base of tasks on clips of speech: their records, windows, and what they have no use for.

data.source = "clips.jsonl"        # rows of a table, with the columns of the next two lines
data.audio = "file"                # the path of the clip, from the folder of the table
data.text = "text"                 # what is said
data.window = 8.0                  # seconds that every clip is padded to with silence
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import flax.linen as nn
import grain
import jax
import numpy as np

from lora_jax.checks import shown
from lora_jax.data import audio, records, row_batches, text_files
from lora_jax.data.batches import Watch
from lora_jax.data.log_mel import RATE
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import questions, tables, transcripts
from lora_jax.train.step import Batch

PyTree = Any

_STEP = 320  # samples of an encoder frame of Whisper
_UNTAUGHT = "distill.teacher: is for tasks on text; set it to none"
_MOST = 3600.0  # seconds of a clip of one's own, before the model is asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
  """A clip and what is said in it.

  samples: float32 at 16 kHz.
  text: as the record has it; "" where it is not known.
  tokens: of the text, and what stands before them.
  phrases: normalized, that the transcript should have.
  name: of the file.
  cut: the tokens that were left out; a text is never cut.
  """

  cut: ClassVar[int] = 0

  samples: np.ndarray
  text: str
  tokens: tuple[int, ...]
  phrases: tuple[str, ...] = ()
  name: str

  @property
  def seconds(self) -> float:
    return len(self.samples) / RATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfClips:
  """See the module, and `lora_jax.tasks.Task` for the methods.

  audio, text: the names of columns.
  window: samples.
  normalizer: one of `transcripts.NORMALIZERS`.
  model: the model without its weights; None until `of_model`.
  """

  NAME: ClassVar[str]

  audio: str
  text: str
  window: int
  normalizer: str
  model: Pretrained | None = None

  # ---- records and examples

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[records.Record]:
    del held_out
    rows = tables.read(path, data)
    records.require(rows, [self.audio], str(path))
    records.check_values(rows, [self.audio], str(path))
    found = []
    for number, row in enumerate(rows):
      name = str(row[self.audio])
      file = path.parent / name
      if not file.exists():
        there = [x.name for x in file.parent.iterdir()] if file.parent.is_dir() else []
        raise FileNotFoundError(
          f"{path}: record {number}: {file}: no such file{text_files.nearest(file.name, there)}"
        )
      samples = audio.read(file, self.window / RATE)
      found.append(row | {"samples": samples, "name": name})
    return found

  def read(self, rows: Sequence[records.Record]) -> tuple[list[records.Record], str]:
    return list(rows), ""

  def derive(self, rows: Sequence[records.Record], data: Mapping[str, Any]) -> list[records.Record]:
    del data
    return list(rows)

  def check(self, rows: Sequence[records.Record]) -> None:
    records.require(rows, [self.text], "data.text")
    records.check_values(rows, [self.text], "data.text")
    for number, row in enumerate(rows):
      if not self.normalize(str(row[self.text])):
        raise ValueError(
          f"record {number}, {row['name']}: nothing of its text {shown(row[self.text])} remains "
          f"when it is normalized (task.normalizer {self.normalizer!r}); leave the record out"
        )

  @property
  def normalize(self) -> transcripts.Normalize:
    return transcripts.NORMALIZERS[self.normalizer]()

  def of_model(self, found: Pretrained) -> Self:
    family, config = found.family, found.config
    if family.listen is None:
      raise ValueError(
        f"{found.source}: a {config.family!r} takes no audio, as the task {self.NAME} gives it"
      )
    if self.window > config.max_samples:
      raise ValueError(
        f"data.window {self.window / RATE:g}: the model hears {config.max_samples / RATE:g} s at "
        "most"
      )
    # The weights stay with the caller.
    return dataclasses.replace(self, model=dataclasses.replace(found, params={}))

  # ---- batches

  @property
  def known_model(self) -> Pretrained:
    """The model, once `of_model` has set it."""
    assert self.model is not None, "of_model gives the task its model"
    return self.model

  def heard(self, clip: Clip, window: int) -> np.ndarray:
    """Returns the model's input of a clip."""
    return self.listen(clip.samples, window)

  def listen(self, samples: np.ndarray, window: int) -> np.ndarray:
    """Returns the model's input of samples."""
    listen = self.known_model.family.listen
    assert listen is not None, "of_model refuses a model that takes no audio"
    return listen(self.known_model.config, samples, window)

  def describe(self, **examples: Sequence[Clip]) -> dict[str, Any]:
    splits = {}
    for split, own in examples.items():
      seconds = [clip.seconds for clip in own]
      splits[split] = {
        "clips": len(own),
        "seconds": round(sum(seconds), 1),
        "longest": round(max(seconds), 2),
      }
    return {"window": self.window / RATE, "splits": splits}

  def lines(self, described: Mapping[str, Any]) -> list[str]:
    _check_described(described)
    return [
      f"{name}: {split['clips']:,} clips, {split['seconds'] / 60:,.1f} minutes, the longest "
      f"{split['longest']:g} s, in windows of {described['window']:g} s"
      for name, split in described["splits"].items()
    ]

  def shape_of(self, batch: Batch) -> tuple[int, ...]:
    """As the task's units are counted; of clips alone their number and length."""
    return batch["weights"].shape if "weights" in batch else batch["audio"].shape[:2]

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], Any]:
    """Returns `(weights, batch) -> logits`."""
    raise NotImplementedError

  def mask(self, batch: Batch) -> None:
    """Returns None: an encoder's frames are of one window, silence included."""
    del batch

  def forward(self, model: nn.Module) -> Callable:
    return model.apply

  # ---- what people are shown

  def given(self, examples: Sequence[Clip]) -> list[dict[str, str]]:
    """`marks` tells the run's page to compare the answers word by word."""
    return [
      {"prompt": clip.name, "wanted": self.normalize(clip.text), "marks": "words"}
      for clip in examples
    ]

  def transcribe(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """Returns the jitted step `(weights, batch) -> the tokens of each row`."""
    raise NotImplementedError

  def text_of(self, output: np.ndarray) -> str:
    """Returns the text of a row's output of `transcribe`."""
    raise NotImplementedError

  def make_show(
    self, apply: Callable, examples: Sequence[Clip], put: Callable, share: int
  ) -> Callable[[PyTree], list[str]]:
    """Returns `weights -> the normalized transcript of each clip`."""
    [batch] = self._windows(examples, -(-len(examples) // share) * share, self.window)
    step = self.transcribe(apply)

    def show(weights: PyTree) -> list[str]:
      return questions.answers(
        lambda batch: put(step(weights, batch)),
        [batch],
        lambda output: self.normalize(self.text_of(output)),
      )

    return show

  def _windows(self, examples: Sequence[Clip], batch_size: int, window: int) -> grain.MapDataset:
    """Batches of clips alone, in a window."""
    return row_batches.eval_batches(
      examples, batch_size, row=lambda clip: {"audio": self.heard(clip, window)}
    )

  # ---- transcripts of clips of one's own

  def asked(self, given: str) -> list[Clip]:
    """Returns the clip of a file, or the clips of a folder in the order of their names."""
    path = Path(given)
    files = [path]
    if path.is_dir():
      files = sorted(x for x in path.iterdir() if x.suffix.lower() in audio.ENDINGS)
      if not files:
        raise ValueError(
          f"{given}: the folder has no clips, whose names end in {', '.join(audio.ENDINGS)}"
        )
    most = self.known_model.config.max_samples / RATE
    return [
      Clip(samples=audio.read(x, min(most, _MOST)), text="", tokens=(), name=str(x)) for x in files
    ]

  def predict(
    self,
    apply: Callable,
    weights: PyTree,
    examples: Sequence[Clip],
    *,
    batch_size: int,
    watch: Watch = iter,
  ) -> list[questions.Answer]:
    """Returns `file`, `seconds`, `text` and `computed_in` of each, the seconds that it took.

    Clips longer than the task's window are heard in a whole multiple of it, each of which compiles
    once. The time of a clip is that of its batch over the batch's clips. The first batch of a
    window is measured again without the compilation.
    """
    step, found = self.transcribe(apply), {}
    windows = [self._window_of(clip) for clip in examples]
    batches = [
      (window, batch)
      for window in sorted(set(windows))
      for batch in self._windows(
        [clip for clip, own in zip(examples, windows, strict=True) if own == window],
        batch_size,
        window,
      )
    ]
    places = {
      window: [n for n, own in enumerate(windows) if own == window] for window in set(windows)
    }
    compiled = set()
    data = watch([batch for _, batch in batches])
    for (window, _), batch in zip(batches, data, strict=True):
      if window not in compiled:
        jax.block_until_ready(step(weights, batch))
        compiled.add(window)
      started = time.perf_counter()
      outputs = np.asarray(step(weights, batch))
      rows = batch["index"] >= 0
      took = (time.perf_counter() - started) / rows.sum()
      for index, output in zip(batch["index"][rows].tolist(), outputs[rows], strict=True):
        found[places[window][index]] = (self.text_of(output).strip(), took)
    return [
      {
        "file": clip.name,
        "seconds": round(clip.seconds, 3),
        "text": found[n][0],
        "computed_in": round(found[n][1], 4),
      }
      for n, clip in enumerate(examples)
    ]

  def _window_of(self, clip: Clip) -> int:
    count = -(-len(clip.samples) // self.window)
    return min(count * self.window, self.known_model.config.max_samples)

  # ---- what it has no use for

  def mark(self, example: Clip) -> None:
    """Returns None: a clip is no picture."""

  def draw(self, examples: Sequence[Clip], samples: Sequence[Mapping[str, str]]) -> None:
    """Returns None: the page has a table of transcripts."""

  def reading(self, apply: Callable, hidden: bool) -> NoReturn:
    raise ValueError(_UNTAUGHT)

  def answers(self, batch: Batch) -> NoReturn:
    raise ValueError(_UNTAUGHT)

  def prompts(self, *unused: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} has no prompts; leave --beams out")

  def check_room(self, *unused: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} has no prompts")

  def write(self, *unused: Any, **how: Any) -> NoReturn:
    raise ValueError(f"the task {self.NAME} has no prompts; use experiments.predict")

  @property
  def chat_format(self) -> NoReturn:
    raise ValueError(f"the task {self.NAME} has no conversations; use experiments.predict")

  def longest_choice(self) -> NoReturn:
    raise ValueError(f"the task {self.NAME} has no prompts; use experiments.evaluate")


def window_of(data: Mapping[str, Any]) -> int:
  """Returns `data.window` in samples; raises ValueError unless it is whole frames of an encoder."""
  samples = round(data["window"] * RATE)
  if samples % _STEP or abs(samples - data["window"] * RATE) > 1e-6 * RATE:
    raise ValueError(
      f"data.window {data['window']}: give a multiple of {_STEP / RATE} seconds, such as 8.0"
    )
  return samples


def normalizer_of(task: Mapping[str, Any]) -> str:
  """Returns `task.normalizer`; raises ValueError for an unknown one."""
  if task["normalizer"] not in transcripts.NORMALIZERS:
    raise ValueError(
      f"task.normalizer {shown(task['normalizer'])} is unknown; use one of "
      f"{', '.join(transcripts.NORMALIZERS)}"
    )
  return task["normalizer"]


def refuse_chunks(loss_chunk: int) -> None:
  """Raises ValueError for a loss in chunks, which these tasks do not have."""
  if loss_chunk:
    raise ValueError(
      f"train.loss_chunk {loss_chunk}: the logits of clips are computed at once; set it to 0"
    )


def _check_described(described: Mapping[str, Any]) -> None:
  splits, whole = described.get("splits"), type(described.get("window")) is float
  if not isinstance(splits, dict):
    splits, whole = {}, False
  for split in splits.values():
    whole = whole and isinstance(split, dict) and type(split.get("clips")) is int
    whole = whole and all(type(split.get(x)) in (int, float) for x in ("seconds", "longest"))
  if not whole:
    raise ValueError(f"data is {shown(dict(described))}")
