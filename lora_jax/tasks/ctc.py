"""CTC: an encoder that gives frames learns to spell what is said, one character a frame or none.

task.name = "ctc"
task.alphabet = ("<pad>", "|", "a", "b")   # the blank first, then the space, then the characters
task.normalizer = "none"          # of the texts, before they are spelled; see `transcripts`
task.beams = 1                    # of the search for a text in the metrics; 1: greedy
data.join = (3, 7)                # words of a sequence, joined from clips of words; () for none
data.per_speaker, data.join_seed = 100, 0       # sequences of each speaker, if they are joined

Graves et al. 2006. The layer on the frames is new. It starts from the run's seed, trains in full
and is saved with the adapter, as PEFT's `modules_to_save`. With the alphabet () the model keeps the
layer that it has, as a pretrained wav2vec2 does. The frames are those of the clip; the silence that
fills its window has none.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.checks import shown
from lora_jax.data import joined_words, records, row_batches
from lora_jax.data.batches import Shard
from lora_jax.data.log_mel import RATE
from lora_jax.data.token_texts import TokenText
from lora_jax.io.pretrained import Pretrained
from lora_jax.tasks import clips, ctc_decoding, heads, transcripts
from lora_jax.tasks.clips import Clip
from lora_jax.train.step import Batch, Objective

PyTree = Any

BLANK, SPACE = "<pad>", "|"
"""The names of two classes, as in the vocabularies of wav2vec2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ctc(clips.OfClips):
  """See the module, and `lora_jax.tasks.Task` for the methods.

  alphabet: the names of the classes; () for those of the model.
  beams: of the search in the metrics and transcripts.
  """

  NAME: ClassVar[str] = "ctc"
  FIELDS: ClassVar[tuple[str, ...]] = ("alphabet", "normalizer", "beams")
  TRAINS: ClassVar[tuple[str, ...]] = ("head/.*",)
  UNIT: ClassVar[str] = "clip"

  alphabet: tuple[str, ...]
  beams: int

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    clips.refuse_chunks(loss_chunk)
    alphabet = tuple(task["alphabet"])
    if alphabet and (alphabet[:2] != (BLANK, SPACE) or len(set(alphabet)) < len(alphabet)):
      raise ValueError(
        f"task.alphabet {shown(alphabet)}: must begin with {BLANK!r} and {SPACE!r}, and name no "
        "character twice"
      )
    if long := [x for x in alphabet[2:] if len(x) != 1 or x.isspace()]:
      raise ValueError(f"task.alphabet: {shown(long[0])} is no single character")
    join = tuple(data["join"])
    if join and not (len(join) == 2 and 1 <= join[0] <= join[1]):
      raise ValueError(f"data.join {join}: give the least and the most words, as (3, 7), or ()")
    return cls(
      audio=data["audio"],
      text=data["text"],
      window=clips.window_of(data),
      normalizer=clips.normalizer_of(task),
      alphabet=alphabet,
      beams=task["beams"],
    )

  # ---- records and examples

  def open(self, path: Path, data: Mapping[str, Any], *, held_out: bool) -> list[records.Record]:
    if not data["join"]:
      return super().open(path, data, held_out=held_out)
    return joined_words.joined(
      path, data["join"], data["per_speaker"], data["join_seed"], self.window / RATE
    )

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    if not self.alphabet or found.family.listen is None:  # refused by `of_model`
      return found
    return heads.add(found, key, self.alphabet)

  def of_model(self, found: Pretrained) -> Self:
    bound = super().of_model(found)
    if BLANK not in found.config.classes:
      raise ValueError(
        f"{found.source}: has no layer of characters on its frames with a {BLANK!r}; give "
        "task.alphabet, for a new one"
      )
    return bound

  @property
  def _blank(self) -> int:
    return self.known_model.config.classes.index(BLANK)

  def examples(self, rows: Sequence[records.Record]) -> list[Clip]:
    numbers = {name: n for n, name in enumerate(self.known_model.config.classes)}
    found = []
    for number, row in enumerate(rows):
      where = f"record {number}, {row['name']}"
      text = self.normalize(str(row[self.text]))
      spelled = text.replace(" ", SPACE)
      if unknown := sorted(set(spelled) - numbers.keys()):
        raise ValueError(
          f"{where}: its text has {shown(unknown[0])}, which is not in the alphabet "
          f"{shown(''.join(x for x in numbers if len(x) == 1))}; add it, or leave the record out"
        )
      labels = tuple(numbers[character] for character in spelled)
      needed, frames = ctc_decoding.frames_needed(labels), self._frames(len(row["samples"]))
      if needed > frames:
        raise ValueError(
          f"{where}: its text of {len(labels)} characters needs {needed} frames (equal neighbors "
          f"have one between them), and the clip of {len(row['samples']) / RATE:.2f} s has "
          f"{frames}; leave it out, or check the text"
        )
      found.append(
        Clip(samples=row["samples"], text=str(row[self.text]), tokens=labels, name=row["name"])
      )
    return found

  def _frames(self, samples: int) -> int:
    """Frames of a clip's own samples."""
    return self.known_model.config.frames_of(samples)

  def tokens(self, example: Clip) -> list[TokenText]:
    """Returns the characters, all of them learned."""
    names = self.known_model.config.classes
    return [TokenText(names[x], 1, special=False, learnt=True) for x in example.tokens]

  # ---- batches

  def train_batches(
    self, examples: Sequence[Clip], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    row = functools.partial(self._row, most=_most_labels(examples))
    return row_batches.train_batches(examples, batch_size, row=row, seed=seed, **rows)

  def eval_batches(
    self, examples: Sequence[Clip], batch_size: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    row = functools.partial(self._row, most=_most_labels(examples))
    return row_batches.eval_batches(examples, batch_size, row=row, **rows)

  def _row(self, clip: Clip, most: int) -> dict[str, np.ndarray]:
    """The arrays of a clip; `most` is the number of labels of a row."""
    labels, missing = np.zeros(most, np.int32), np.ones(most, np.float32)
    labels[: len(clip.tokens)], missing[: len(clip.tokens)] = clip.tokens, 0
    return self._heard(clip, self.window) | {
      "labels": labels,
      "missing": missing,
      "weights": np.ones((), np.float32),
    }

  def _heard(self, clip: Clip, window: int) -> dict[str, np.ndarray]:
    frames = np.array(self._frames(len(clip.samples)), np.int32)
    return {"audio": self.heard(clip, window), "frames": frames}

  def _windows(self, examples: Sequence[Clip], batch_size: int, window: int) -> grain.MapDataset:
    row = functools.partial(self._heard, window=window)
    return row_batches.eval_batches(examples, batch_size, row=row)

  def summary(self, examples: Sequence[Clip], batch_size: int) -> dict[str, Any]:
    return row_batches.summary(len(examples), batch_size, (self.window, _most_labels(examples)))

  def batch_of(self, shape: tuple[int, int], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    window, labels = shape
    audio = self.listen(np.zeros(window, np.float32), window)
    return {
      "audio": jax.ShapeDtypeStruct((rows, *audio.shape), audio.dtype),
      "frames": jax.ShapeDtypeStruct((rows,), jnp.int32),
      "labels": jax.ShapeDtypeStruct((rows, labels), jnp.int32),
      "missing": jax.ShapeDtypeStruct((rows, labels), jnp.float32),
      "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }

  def words_of(self, shape: tuple[int, ...]) -> str:
    return f"{shape[0] / RATE:g} s of speech, {shape[1]} characters at most"

  # ---- training and evaluation

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    return lambda weights, batch: apply({"params": weights}, batch["audio"])

  def objective(self, apply: Callable) -> Objective:
    run = self.run(apply)

    def objective(weights: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
      total, count = self._loss(run(weights, batch), batch)
      return total / jnp.where(count > 0, count, 1), count

    return objective

  def _loss(self, logits_BSK: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses of the clips in nats, and their number."""
    absent_BS = _absent(logits_BSK, batch).astype(jnp.float32)
    losses_B = optax.ctc_loss(
      logits_BSK.astype(jnp.float32),
      absent_BS,
      batch["labels"],
      batch["missing"],
      blank_id=self._blank,
    )
    real_B = batch["weights"] > 0  # a row of padding has no frames, and an infinite loss
    return jnp.sum(jnp.where(real_B, losses_B, 0)), jnp.sum(batch["weights"])

  def transcribe(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """The class of each frame for a greedy text, and log-probabilities for a search."""
    run = self.run(apply)
    return jax.jit(lambda weights, batch: self._outputs(run(weights, batch), batch))

  def _outputs(self, logits_BSK: jax.Array, batch: Batch) -> jax.Array:
    absent_BS = _absent(logits_BSK, batch)
    if self.beams == 1:
      return jnp.where(absent_BS, self._blank, jnp.argmax(logits_BSK, axis=-1))
    log_p_BSK = jax.nn.log_softmax(logits_BSK.astype(jnp.float32))
    sure_K = jnp.where(jnp.arange(logits_BSK.shape[-1]) == self._blank, 0.0, -jnp.inf)
    return jnp.where(absent_BS[..., None], sure_K, log_p_BSK)

  def text_of(self, output: np.ndarray) -> str:
    if self.beams == 1:
      labels = ctc_decoding.collapse(output.tolist(), self._blank)
    else:
      labels = ctc_decoding.beam_search(output, self.beams, self._blank)
    return self._spelled(labels)

  def _spelled(self, labels: Iterable[int]) -> str:
    names = self.known_model.config.classes
    return " ".join("".join(names[label] for label in labels).replace(SPACE, " ").split())

  def make_eval_step(self, apply: Callable) -> Callable[[PyTree, Batch], PyTree]:
    run = self.run(apply)

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      logits_BSK = run(weights, batch)
      loss, count = self._loss(logits_BSK, batch)
      given = {name: batch[name] for name in ("labels", "missing", "index")}
      return {"loss": loss, "count": count, "heard": self._outputs(logits_BSK, batch)} | given

    return step

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    references, texts = [], []
    for each in outputs:
      for row in np.flatnonzero(np.asarray(each["index"]) >= 0):
        labels = np.asarray(each["labels"][row])[np.asarray(each["missing"][row]) == 0]
        references.append(self._spelled(labels))
        texts.append(self.text_of(np.asarray(each["heard"][row])))
    loss = sum(float(each["loss"]) for each in outputs) / len(texts)
    right = [text == reference for text, reference in zip(texts, references, strict=True)]
    rates = transcripts.error_rates(references, texts)
    return {"loss": loss, **rates, "whole": float(np.mean(right)), "rows": len(texts)}

  def line(self, metrics: Mapping[str, float]) -> str:
    return (
      f"WER {metrics['wer']:.1%}, CER {metrics['cer']:.1%}, whole clips {metrics['whole']:.1%}, "
      f"loss {metrics['loss']:.3f} on {metrics['rows']} clips"
    )


def _most_labels(examples: Sequence[Clip]) -> int:
  return max((len(clip.tokens) for clip in examples), default=1)


def _absent(logits_BSK: jax.Array, batch: Batch) -> jax.Array:
  """True for the frames after a clip's own, [B, S]."""
  return jnp.arange(logits_BSK.shape[1]) >= batch["frames"][:, None]
