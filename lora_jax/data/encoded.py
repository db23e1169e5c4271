"""Examples of whole texts for an encoder, and their batches.

Letters: B rows of a batch, S separately encoded texts of a row, T tokens of a text.

  tokens  (B, T) int32    of one text, or of a pair that is encoded as one; padded on the right
  mask    (B, T) bool     True for a token, False for padding
  types   (B, T) int32    the text of a pair that a token belongs to, for models with token types
  targets (B, 1)          a class index in int32, or a score in float32
  weights (B, 1) float32  1 for an example, 0 for a padding row
  index   (B,) int32      evaluation only, as in `lora_jax.data.batches`

If a row has several separately encoded texts, tokens, mask and types are (B, S, T).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from lora_jax.data import batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
  """One text, or a pair that is encoded as one.

  ids: its tokens, special ones included.
  types: the text of the pair that each token belongs to.
  spans: the start and end of each text's own tokens.
  """

  ids: tuple[int, ...]
  types: tuple[int, ...]
  spans: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedExample:
  """The encoded texts of a record, and its target.

  texts: one text, or several that are encoded separately.
  target: a class index, an int, or a score, a float.
  cut: the number of tokens truncated to the maximum length.
  """

  texts: tuple[Encoded, ...]
  target: int | float
  cut: int

  @property
  def inputs(self) -> tuple[int, ...]:
    """The tokens of the longest text."""
    return max((text.ids for text in self.texts), key=len)

  @property
  def targets(self) -> tuple[int | float]:
    return (self.target,)


def train_batches(
  examples: Sequence[EncodedExample], batch_size: int, *, with_types: bool, **how: Any
) -> grain.MapDataset:
  """Returns the endless dataset of training batches; see `batches.train_batches`.

  with_types: whether batches have `types`.
  """
  assemble = functools.partial(_assemble, with_types)
  return batches.train_batches(examples, batch_size, assemble=assemble, **how)


def eval_batches(
  examples: Sequence[EncodedExample], batch_size: int, *, with_types: bool, **how: Any
) -> grain.MapDataset:
  """Returns the dataset of one pass; see `batches.eval_batches` and `train_batches`."""
  assemble = functools.partial(_assemble, with_types)
  return batches.eval_batches(examples, batch_size, assemble=assemble, **how)


def describe(examples: Sequence[EncodedExample]) -> dict[str, int]:
  """Returns the number of examples, the number of truncated ones, and the most tokens of a
  text."""
  return {
    "examples": len(examples),
    "cut": sum(example.cut > 0 for example in examples),
    "longest": max(len(example.inputs) for example in examples),
  }


def _assemble(
  with_types: bool,
  examples: Sequence[EncodedExample],
  indices: np.ndarray,
  length: int,
  width: int,
  pad_id: int,
) -> batches.Batch:
  del width  # one target a row
  texts = len(examples[0].texts)
  shape = (len(indices), texts, length)
  tokens, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
  types = np.zeros(shape, np.int32)
  dtype = np.int32 if isinstance(examples[0].target, int) else np.float32
  targets, weights = np.zeros((len(indices), 1), dtype), np.zeros((len(indices), 1), np.float32)
  for row, index in enumerate(indices):
    if index < 0:
      continue
    for n, text in enumerate(examples[index].texts):
      tokens[row, n, : len(text.ids)] = text.ids
      types[row, n, : len(text.ids)] = text.types
      mask[row, n, : len(text.ids)] = True
    targets[row], weights[row] = examples[index].target, 1
  arrays = {"tokens": tokens, "mask": mask} | ({"types": types} if with_types else {})
  if texts == 1:
    arrays = {name: x[:, 0] for name, x in arrays.items()}
  return arrays | {"targets": targets, "weights": weights}
