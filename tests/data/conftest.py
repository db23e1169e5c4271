"""Shared by the data tests: a small tokenizer and the real files."""

import pytest

from lora_jax.io import assets

REVIEWS = (
  "pypi://vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014/"
)


class ByteTokenizer:
  """A token a byte, so that a test can write its ids down; BOS only where it is given."""

  eos_id, pad_id = 256, 257

  def __init__(self, before=()):
    self.before = list(before)

  def encode(self, text, *, add_special_tokens=True):
    return (self.before if add_special_tokens else []) + list(text.encode())

  def decode(self, ids):
    return bytes(i for i in ids if i < 256).decode()


@pytest.fixture(scope="session")
def byte_tokenizer():
  return ByteTokenizer()


@pytest.fixture(scope="session")
def byte_tokenizer_with_bos():
  return ByteTokenizer(before=[258])


@pytest.fixture(scope="session")
def ratings_file():
  """Returns the path of one of the rated sets: sentences with the mean of human ratings."""
  return lambda name: assets.resolve(f"{REVIEWS}{name}_GroundTruth.txt")
