import collections

import pytest

from lora_jax.data.labels import sign_label
from lora_jax.data.records import read


def rated(*ratings):
  return [{"rating": rating} for rating in ratings]


def test_the_neutral_zone_is_left_out_and_its_edges_are_kept():
  labelled = sign_label(rated("2", "0.5", "0.49", "0", "-0.49", "-0.5", "-3"), "rating")
  assert [(r["rating"], r["label"]) for r in labelled] == [
    ("2", "positive"),
    ("0.5", "positive"),
    ("-0.5", "negative"),
    ("-3", "negative"),
  ]


def test_zero_has_no_sign_even_without_a_neutral_zone():
  assert [r["label"] for r in sign_label(rated(0.1, 0.0, -0.1), "rating", neutral=0.0)] == [
    "positive",
    "negative",
  ]


def test_words_and_column_can_be_chosen_and_records_stay_as_they_were():
  records = rated("1")
  assert sign_label(records, "rating", above="good", below="bad", into="verdict") == [
    {"rating": "1", "verdict": "good"}
  ]
  assert records == rated("1")


@pytest.mark.parametrize("value", ["n/a", "", None, "nan", "inf"])
def test_a_rating_that_is_no_number_is_refused_with_its_record(value):
  with pytest.raises(ValueError, match=r"record 1, column 'rating': .* is not a finite number"):
    sign_label(rated("1", value), "rating")


def test_other_misuse_is_refused():
  with pytest.raises(ValueError, match=r"no column 'score'.*it has rating"):
    sign_label(rated("1"), "score")
  with pytest.raises(ValueError, match="already has a column 'rating'"):
    sign_label(rated("1"), "rating", into="rating")
  with pytest.raises(ValueError, match="none of the 2 ratings in 'rating' has a size of"):
    sign_label(rated("0.1", "-0.1"), "rating")
  with pytest.raises(ValueError, match="neutral is -1"):
    sign_label(rated("1"), "rating", neutral=-1)


def test_the_movie_reviews_have_balanced_labels(ratings_file):
  path = ratings_file("movieReviewSnippets")
  records = read(path, format="tsv", columns=("id", "rating", "text"))
  labels = collections.Counter(record["label"] for record in sign_label(records, "rating"))
  assert labels == {"negative": 5_076, "positive": 4_996}
