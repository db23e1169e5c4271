"""Transcription: an encoder and decoder of speech learn to write what is said in a clip.

task.name = "transcribe"
task.prompt = "<|startoftranscript|><|notimestamps|>"     # before every text; its tokens are given
task.normalizer = "english"       # before words are compared; see `lora_jax.tasks.transcripts`
data.slots = "slots"              # a column of phrases that the transcript should have; "" for none
data.max_length = 64              # tokens of a text, the prompt and the end included

Teacher forcing: the loss covers the tokens of the text and its end, and not the prompt. The metrics
are those of greedy transcripts, in which special tokens are never written. Texts and transcripts
are normalized before they are compared. `slots` is an object of phrases, or a list of them; a
phrase is found if its words stand in the transcript one after another.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checks import shown
from lora_jax.data import records, row_batches
from lora_jax.data.batches import Shard
from lora_jax.data.log_mel import RATE
from lora_jax.data.token_texts import TokenText, token_texts
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import decode
from lora_jax.tasks import clips, transcripts
from lora_jax.tasks.clips import Clip
from lora_jax.train import generation
from lora_jax.train.step import Batch, Objective, completion_loss

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcription(clips.OfClips):
  """See the module, and `lora_jax.tasks.Task` for the methods.

  prompt: the text of the tokens before every text.
  slots: the name of a column, or "".
  max_length: tokens of a row.
  """

  NAME: ClassVar[str] = "transcribe"
  FIELDS: ClassVar[tuple[str, ...]] = ("prompt", "normalizer")
  TRAINS: ClassVar[tuple[str, ...]] = ()
  UNIT: ClassVar[str] = "token"

  prompt: str
  slots: str
  max_length: int

  @classmethod
  def of(cls, task: Mapping[str, Any], data: Mapping[str, Any], loss_chunk: int) -> Self:
    clips.refuse_chunks(loss_chunk)
    return cls(
      audio=data["audio"],
      text=data["text"],
      window=clips.window_of(data),
      normalizer=clips.normalizer_of(task),
      prompt=task["prompt"],
      slots=data["slots"],
      max_length=data["max_length"],
    )

  # ---- records and examples

  def check(self, rows: Sequence[records.Record]) -> None:
    super().check(rows)
    if self.slots:
      records.require(rows, [self.slots], "data.slots")
      for number, row in enumerate(rows):
        self._phrases(row, f"record {number}, {row['name']}")

  def _phrases(self, row: records.Record, where: str) -> tuple[str, ...]:
    value = row[self.slots]
    value = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
      raise ValueError(
        f"{where}: its {self.slots} must be an object or a list of phrases, not {shown(value)}"
      )
    found = tuple(map(self.normalize, value))
    if not all(found):
      raise ValueError(f"{where}: a phrase of {shown(value)} has no words; leave it out")
    return found

  def extend(self, found: Pretrained, key: jax.Array) -> Pretrained:
    del key
    return found

  def of_model(self, found: Pretrained) -> Self:
    if found.tokenizer is None or found.config.classes:
      raise ValueError(
        f"{found.source}: a {found.config.family!r} without a decoder writes no text; use the task "
        "ctc"
      )
    if found.tokenizer.eos_id is None:
      raise ValueError(
        f"{found.source}: the tokenizer names no token that ends a text; give eos_token in "
        "tokenizer_config.json"
      )
    bound = super().of_model(found)
    if self.max_length > found.config.max_length:
      raise ValueError(
        f"data.max_length {self.max_length}: the model has {found.config.max_length} positions"
      )
    special = set(found.tokenizer.special_tokens.values())
    if not bound.prompt_ids or not special.issuperset(bound.prompt_ids):
      raise ValueError(
        f"task.prompt {shown(self.prompt)} is no row of special tokens of the model; a Whisper has "
        f"{', '.join(list(found.tokenizer.special_tokens)[:5])} and others"
      )
    return bound

  @property
  def tokenizer(self) -> Tokenizer:
    """The model's tokenizer; `of_model` refuses a model without one."""
    assert self.known_model.tokenizer is not None
    return self.known_model.tokenizer

  @property
  def prompt_ids(self) -> list[int]:
    """The tokens before every text."""
    return self.tokenizer.encode(self.prompt, add_special_tokens=False)

  def examples(self, rows: Sequence[records.Record]) -> list[Clip]:
    tokenizer, prompt, found = self.tokenizer, self.prompt_ids, []
    end = tokenizer.eos_id
    assert end is not None, "of_model refuses a tokenizer without one"
    for number, row in enumerate(rows):
      where = f"record {number}, {row['name']}"
      # Whisper's texts begin with a space, as they do within a longer transcript.
      text = " " + str(row[self.text]).strip()
      ids = tokenizer.encode(text, add_special_tokens=False, special_tokens=False)
      tokens = (*prompt, *ids, end)
      if len(tokens) > self.max_length + 1:
        raise ValueError(
          f"{where}: its text has {len(tokens) - 1} tokens with the prompt, over data.max_length "
          f"{self.max_length}; raise it, or leave the record out"
        )
      phrases = self._phrases(row, where) if self.slots else ()
      found.append(
        Clip(
          samples=row["samples"],
          text=str(row[self.text]),
          tokens=tokens,
          phrases=phrases,
          name=row["name"],
        )
      )
    return found

  def tokens(self, example: Clip) -> list[TokenText]:
    learnt = set(range(len(self.prompt_ids), len(example.tokens)))
    return token_texts(self.tokenizer, example.tokens, learnt)

  # ---- batches

  def train_batches(
    self, examples: Sequence[Clip], batch_size: int, *, seed: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    return row_batches.train_batches(examples, batch_size, row=self.row, seed=seed, **rows)

  def row(self, clip: Clip) -> dict[str, np.ndarray]:
    """Returns the arrays of a training row."""
    inputs, count = clip.tokens[:-1], len(self.prompt_ids)
    tokens = np.full(self.max_length, self.tokenizer.eos_id, np.int32)
    tokens[: len(inputs)] = inputs
    targets, weights = np.zeros_like(tokens), np.zeros(self.max_length, np.float32)
    learnt = slice(count - 1, len(inputs))
    targets[learnt], weights[learnt] = clip.tokens[count:], 1
    audio = self.heard(clip, self.window)
    return {"audio": audio, "tokens": tokens, "targets": targets, "weights": weights}

  def eval_batches(
    self, examples: Sequence[Clip], batch_size: int, **rows: Unpack[Shard]
  ) -> grain.MapDataset:
    """As the base's, with the tokens of the phrases of each clip, `phrases` [B, K, L]."""
    encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
    phrases = [[encode(" " + phrase) for phrase in clip.phrases] for clip in examples]
    most = (
      max(map(len, phrases), default=0),
      max((len(x) for own in phrases for x in own), default=0),
    )
    numbers = {id(clip): n for n, clip in enumerate(examples)}

    def row(clip: Clip) -> dict[str, np.ndarray]:
      found = np.full(most, self.tokenizer.eos_id, np.int32)
      for n, ids in enumerate(phrases[numbers[id(clip)]]):
        found[n, : len(ids)] = ids
      return self.row(clip) | {"phrases": found}

    return row_batches.eval_batches(examples, batch_size, row=row, **rows)

  def words_of(self, shape: tuple[int, ...]) -> str:
    return f"{shape[0] / RATE:g} s of speech, {shape[1]} tokens at most"

  def summary(self, examples: Sequence[Clip], batch_size: int) -> dict[str, Any]:
    return row_batches.summary(len(examples), batch_size, (self.window, self.max_length))

  def batch_of(self, shape: tuple[int, int], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    window, length = shape
    audio = self.listen(np.zeros(window, np.float32), window)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return {
      "audio": jax.ShapeDtypeStruct((rows, *audio.shape), audio.dtype),
      "tokens": tokens,
      "targets": tokens,
      "weights": jax.ShapeDtypeStruct((rows, length), jnp.float32),
    }

  # ---- training and evaluation

  def run(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    return lambda weights, batch: apply({"params": weights}, batch["audio"], batch["tokens"])

  def objective(self, apply: Callable) -> Objective:
    run = self.run(apply)
    return lambda weights, batch: completion_loss(
      run(weights, batch), batch["targets"], batch["weights"]
    )

  def transcribe(self, apply: Callable) -> Callable[[PyTree, Batch], jax.Array]:
    """Greedy tokens after the prompt; a row of zeros, which is padding, writes on to the end."""
    return jax.jit(lambda weights, batch: self._greedy(apply, weights, batch["audio"]))

  def _greedy(self, apply: Callable, weights: PyTree, audio: jax.Array) -> jax.Array:
    tokenizer, prompt = self.tokenizer, self.prompt_ids
    barred = np.arange(self.known_model.config.vocab_size) >= tokenizer.vocab_size
    barred[list(set(tokenizer.special_tokens.values()) - set(tokenizer.stop_ids))] = True

    def choose(key: jax.Array, logits_BV: jax.Array) -> jax.Array:
      return decode.greedy(key, jnp.where(barred, -jnp.inf, logits_BV))

    variables, rows = {"params": weights}, len(audio)
    frames = apply(variables, audio, method="frames")
    return decode.decode(
      functools.partial(apply, method="read"),
      weights,
      jnp.broadcast_to(np.array(prompt, np.int32), (rows, len(prompt))),
      jnp.full(rows, len(prompt)),
      steps=self.max_length - len(prompt),
      choose=choose,
      key=jax.random.key(0),
      eos_id=tokenizer.stop_ids,
      cache=apply(variables, frames, slots=self.max_length, method="start"),
    )

  def text_of(self, output: np.ndarray) -> str:
    tokenizer = self.tokenizer
    return tokenizer.decode(generation.until_end(output.tolist(), tokenizer.stop_ids))

  def make_eval_step(self, apply: Callable) -> Callable[[PyTree, Batch], PyTree]:
    run = self.run(apply)

    @jax.jit
    def step(weights: PyTree, batch: Batch) -> dict[str, jax.Array]:
      loss, count = completion_loss(run(weights, batch), batch["targets"], batch["weights"])
      written = self._greedy(apply, weights, batch["audio"])
      given = {name: batch[name] for name in ("targets", "weights", "phrases", "index")}
      return {"loss": loss * count, "count": count, "written": written} | given

    return step

  def metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    references, texts, found = [], [], []
    for each in outputs:
      for row in np.flatnonzero(np.asarray(each["index"]) >= 0):
        targets = np.asarray(each["targets"][row])[np.asarray(each["weights"][row]) > 0]
        text = self.normalize(self.text_of(np.asarray(each["written"][row])))
        references.append(self.normalize(self.text_of(targets)))
        texts.append(text)
        phrases = filter(None, map(self.text_of, np.asarray(each["phrases"][row])))
        found.append([transcripts.has_phrase(phrase.strip(), text) for phrase in phrases])
    loss = sum(float(each["loss"]) for each in outputs) / sum(float(x["count"]) for x in outputs)
    slots = {}
    if self.slots:
      each = [x for own in found for x in own]
      slots = {"slots": float(np.mean(each)), "whole": float(np.mean([all(own) for own in found]))}
    rates = transcripts.error_rates(references, texts)
    return {"loss": loss, **rates, **slots, "rows": len(texts)}

  def line(self, metrics: Mapping[str, float]) -> str:
    slots = ""
    if "slots" in metrics:
      slots = f"slots {metrics['slots']:.1%}, clips with all {metrics['whole']:.1%}, "
    return (
      f"{slots}WER {metrics['wer']:.1%}, CER {metrics['cer']:.1%}, loss {metrics['loss']:.3f} on "
      f"{metrics['rows']} clips"
    )
