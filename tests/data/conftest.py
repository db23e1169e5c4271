"""Shared by the data tests: a small tokenizer and the real files."""

import pytest

from lora_jax.data import messages, records
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


@pytest.fixture(scope="session")
def conversations(public_data):
  """Real ones, with system messages, several turns, tools and calls of them."""
  rows = [
    row
    for name in ("chat_sft", "chat_tools")
    for row in records.read(public_data / name / "dev.jsonl")[:12]
  ]
  return [messages.check(row) for row in rows]
