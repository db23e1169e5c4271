"""Batches of whole texts: where padding is, which text a token is of, what fills a batch."""

import numpy as np
import pytest

from lora_jax.data import encoded
from lora_jax.data.encoded import Encoded, EncodedExample

PAD = 9


def text(*ids, types=None):
  types = types or (0,) * len(ids)
  return Encoded(ids=ids, types=types, spans=((1, len(ids) - 1),))


ONE = [
  EncodedExample(texts=(text(2, 5, 6, 3, types=(0, 0, 1, 1)),), target=1, cut=0),
  EncodedExample(texts=(text(2, 7, 3),), target=0, cut=2),
  EncodedExample(texts=(text(*range(10, 17)),), target=2, cut=0),
]
HOW = {"buckets": (4, 8), "pad_id": PAD}


def test_a_batch_has_its_texts_their_padding_and_rows_that_do_not_count():
  short, long = encoded.eval_batches(ONE, 2, with_types=True, **HOW)
  np.testing.assert_array_equal(short["tokens"], [[2, 5, 6, 3], [2, 7, 3, PAD]])
  np.testing.assert_array_equal(short["mask"], [[True] * 4, [True] * 3 + [False]])
  np.testing.assert_array_equal(short["types"], [[0, 0, 1, 1], [0] * 4])
  assert short["targets"].tolist() == [[1], [0]] and short["targets"].dtype == np.int32
  assert short["weights"].tolist() == [[1], [1]] and short["index"].tolist() == [0, 1]
  assert long["tokens"].shape == (2, 8) and long["index"].tolist() == [2, -1]
  assert long["weights"].tolist() == [[1], [0]] and not long["mask"][1].any()
  assert (long["tokens"][1] == PAD).all()


def test_types_are_left_out_for_a_model_without_them():
  [batch, _] = encoded.eval_batches(ONE, 2, with_types=False, **HOW)
  assert set(batch) == {"tokens", "mask", "targets", "weights", "index"}


def test_texts_that_are_encoded_apart_share_a_row_and_a_length():
  pairs = [
    EncodedExample(texts=(text(2, 5, 3), text(2, 6, 7, 8, 3)), target=4.5, cut=0),
    EncodedExample(texts=(text(2, 5, 3), text(2, 6, 3)), target=0.0, cut=0),
  ]
  assert [len(pair.inputs) for pair in pairs] == [5, 3]
  [batch] = encoded.eval_batches(pairs, 2, with_types=True, **HOW)
  assert batch["tokens"].shape == batch["mask"].shape == batch["types"].shape == (2, 2, 8)
  assert batch["mask"].sum(axis=-1).tolist() == [[3, 3], [3, 5]]
  assert batch["targets"].tolist() == [[0.0], [4.5]] and batch["targets"].dtype == np.float32


def test_the_shards_of_a_training_batch_are_its_rows_and_a_seed_decides_it():
  whole = encoded.train_batches(ONE * 4, 4, seed=3, with_types=True, **HOW)
  again = encoded.train_batches(ONE * 4, 4, seed=3, with_types=True, **HOW)
  other = encoded.train_batches(ONE * 4, 4, seed=4, with_types=True, **HOW)
  shards = [
    encoded.train_batches(ONE * 4, 4, seed=3, with_types=True, shard_index=n, shard_count=2, **HOW)
    for n in (0, 1)
  ]
  differ = False
  for step in range(6):
    for name, array in whole[step].items():
      np.testing.assert_array_equal(array, again[step][name])
      np.testing.assert_array_equal(array, np.concatenate([shard[step][name] for shard in shards]))
      differ |= not np.array_equal(array, other[step][name])
  assert differ


def test_lengths_are_described_and_no_examples_are_refused():
  assert encoded.describe(ONE) == {"examples": 3, "cut": 1, "longest": 7}
  with pytest.raises(ValueError, match="no examples to make batches of"):
    encoded.train_batches([], 2, seed=0, with_types=True, **HOW)
