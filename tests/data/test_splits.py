import collections
import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.labels import sign_label
from lora_jax.data.records import read
from lora_jax.data.splits import normalise, split, without

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}
TEXTS = st.lists(st.text(), min_size=1, max_size=30)


def as_records(texts):
  return [{"id": number, "text": text} for number, text in enumerate(texts)]


def place(texts):
  parts = split(as_records(texts), "text", FRACTIONS)
  return {record["text"]: name for name, part in parts.items() for record in part}


@given(texts=TEXTS)
def test_every_record_is_in_one_split_and_keeps_its_order(texts):
  parts = split(as_records(texts), "text", FRACTIONS)
  assert list(parts) == list(FRACTIONS)
  ids = [[record["id"] for record in part] for part in parts.values()]
  assert sorted(itertools.chain(*ids)) == list(range(len(texts)))
  assert all(part == sorted(part) for part in ids)


FILLING = [str(number) for number in range(40)]  # several in each split, by their hash


@given(texts=TEXTS, data=st.data())
def test_a_records_split_depends_on_nothing_but_its_text(texts, data):
  assert min(collections.Counter(place(FILLING).values()).values()) > 1
  alone = {text: place([text, *FILLING])[text] for text in texts}
  found = place([*FILLING, *data.draw(st.permutations(texts))])
  assert {text: found[text] for text in texts} == alone


@given(texts=st.lists(st.text(), min_size=1, max_size=12, unique_by=normalise), data=st.data())
def test_no_split_is_empty_as_long_as_there_are_texts_for_all(texts, data):
  parts = split(as_records(texts), "text", FRACTIONS)
  filled = [name for name, part in parts.items() if part]
  assert filled == [["train"], ["train", "test"], list(FRACTIONS)][min(len(texts), 3) - 1]
  assert sum(map(len, parts.values())) == len(texts)
  assert place(data.draw(st.permutations(texts))) == place(texts)


def test_an_empty_split_gets_the_nearest_text_of_the_largest_and_no_other_moves():
  """By `printf %s N | sha256sum`, of 0 to 8 the points are 0.375, 0.421, 0.830, 0.305, 0.295,
  0.937, 0.906, 0.474 and 0.174."""
  texts = [str(number) for number in range(9)]
  parts = split(as_records(texts), "text", {"a": 0.48, "empty": 0.3, "b": 0.22})
  found = {name: [record["text"] for record in part] for name, part in parts.items()}
  assert found == {"a": ["0", "1", "3", "4", "8"], "empty": ["7"], "b": ["2", "5", "6"]}


def test_alike_records_stay_together_in_a_small_set_too():
  parts = split(as_records(["One", "two", "ONE", "one ", "Three"]), "text", FRACTIONS)
  assert sorted(len(part) for part in parts.values()) == [1, 1, 3]


@given(texts=TEXTS, space=st.sampled_from([" ", "\n", "\t ", "\u00a0"]))
def test_spellings_of_the_same_sentence_are_in_the_same_split(texts, space):
  respelled = [space + space.join(text.casefold().split()) + space for text in texts]
  parts = split(as_records(texts + respelled), "text", FRACTIONS)
  seen = [{normalise(record["text"]) for record in part} for part in parts.values()]
  assert sum(map(len, seen)) == len(set.union(*seen))


def test_the_split_is_the_same_in_every_process_and_release():
  code = (
    "from lora_jax.data.splits import split\n"
    "parts = split([{'t': str(n)} for n in range(12)], 't', {'a': 0.5, 'b': 0.5})\n"
    "print(*[record['t'] for record in parts['a']])"
  )
  for seed in ("1", "2"):
    out = subprocess.run(
      [sys.executable, "-c", code],
      env=os.environ | {"PYTHONHASHSEED": seed},
      capture_output=True,
      text=True,
      check=True,
    )
    # Those N for which the first digit that `printf %s N | sha256sum` prints is below 8.
    assert out.stdout.split() == ["0", "1", "3", "4", "7", "8", "9", "10", "11"]


def test_the_shares_come_out_as_asked_for():
  parts = split(as_records(map(str, range(20_000))), "text", FRACTIONS)
  for name, share in FRACTIONS.items():
    assert abs(len(parts[name]) / 20_000 - share) < 0.015  # over four standard deviations


@pytest.mark.parametrize(
  "fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": float("nan")}]
)
def test_fractions_that_are_no_shares_of_one_are_refused(fractions):
  with pytest.raises(ValueError, match="must be positive and have the sum 1"):
    split(as_records(["x"]), "text", fractions)


def test_fractions_may_carry_rounding_errors():
  assert 0.7 + 0.2 + 0.1 != 1
  assert split(as_records(["x"]), "text", {"a": 0.7, "b": 0.2, "c": 0.1})


def test_a_missing_column_is_refused():
  with pytest.raises(ValueError, match="split: record 0 has no column 'sentence'"):
    split(as_records(["x"]), "sentence", FRACTIONS)
  with pytest.raises(ValueError, match="held_out: record 0 has no column 'text'"):
    without(as_records(["x"]), [{"sentence": "x"}], "text")


def test_without_leaves_out_every_spelling_of_what_is_held_out():
  train = as_records(["One  day.", "Two", "one day. "])
  assert [r["text"] for r in without(train, as_records(["ONE DAY."]), "text")] == ["Two"]


def test_published_splits_that_share_sentences_are_made_disjoint(public_data):
  columns = ("source", "label", "mark", "sentence")
  train = read(public_data / "glue/CoLA/in_domain_train.tsv", columns=columns)
  dev = read(public_data / "glue/CoLA/in_domain_dev.tsv", columns=columns)
  kept = without(train, dev, "sentence")
  assert len(train) - len(kept) == 6
  assert not {normalise(r["sentence"]) for r in kept} & {normalise(r["sentence"]) for r in dev}


def test_the_movie_reviews_split_without_a_shared_sentence(ratings_file):
  path = ratings_file("movieReviewSnippets")
  records = sign_label(read(path, format="tsv", columns=("id", "rating", "text")), "rating")
  parts = split(records, "text", {"train": 0.9, "validation": 0.05, "test": 0.05})
  assert {name: len(part) for name, part in parts.items()} == {
    "train": 9_034,
    "validation": 525,
    "test": 513,
  }
  seen = [{normalise(record["text"]) for record in part} for part in parts.values()]
  assert sum(map(len, seen)) == len(set.union(*seen))
