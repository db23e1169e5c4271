import pytest

from lora_jax.data.detokenise import detokenise, detokenise_columns
from lora_jax.data.records import read


@pytest.mark.parametrize(
  ("apart", "together"),
  [
    ("There is a place , Alimentum , in town .", "There is a place, Alimentum, in town."),
    ("It 's cheap , is n't it ? They 're", "It's cheap, isn't it? They're"),
    ("open : come in !", "open: come in!"),
    ("prices of £ 20 - 25 or £ 20- £ 25", "prices of £20-25 or £20-£25"),
    ("a family - friendly pub", "a family-friendly pub"),
    ("The ' Cotto ' is near ' The Portland Arms ' .", "The 'Cotto' is near 'The Portland Arms'."),
    ("priceRange[£ 20 - 25], near[Café Rouge]", "priceRange[£20-25], near[Café Rouge]"),
    ("  two  spaces\tand a tab ", "two spaces and a tab"),
    ("", ""),
  ],
)
def test_the_spaces_of_the_tokeniser_go_and_a_second_pass_changes_nothing(apart, together):
  assert detokenise(apart) == together
  assert detokenise(together) == together


@pytest.mark.parametrize(
  "text", ["20 -- or more", "the Wrestlers' pub", "a 5-star pub: £20-25 (cheap), isn't it?", "3 - "]
)
def test_text_as_people_write_it_stays(text):
  assert detokenise(text) == " ".join(text.split())


def test_only_the_named_columns_change_and_the_records_stay_as_they_were():
  records = [{"mr": "£ 30", "ref": "a , b"}]
  assert detokenise_columns(records, ["ref"]) == [{"mr": "£ 30", "ref": "a, b"}]
  assert records == [{"mr": "£ 30", "ref": "a , b"}]
  assert detokenise_columns(records, []) == records


def test_what_has_no_text_is_refused_with_its_record():
  with pytest.raises(ValueError, match="detokenise: record 1 has no column 'ref'; it has mr"):
    detokenise_columns([{"ref": "a"}, {"mr": "b"}], ["ref"])
  with pytest.raises(ValueError, match="column 'ref' of record 0 holds a int, not text"):
    detokenise_columns([{"ref": 3}], ["ref"])


def test_the_tokenised_development_references_become_the_published_ones_again(public_data):
  published = read(public_data / "e2e" / "devset.csv")
  lines = (public_data / "e2e" / "lora_valid.txt").read_text(encoding="utf-8").splitlines()
  tokenised = [line.split("||")[1] for line in lines]
  assert len(published) == len(tokenised) == 4_672
  pairs = [
    (text, " ".join(record["ref"].split()))
    for text, record in zip(tokenised, published, strict=True)
  ]
  untouched = sum(" ".join(text.split()) == wanted for text, wanted in pairs)
  restored = sum(detokenise(text) == wanted for text, wanted in pairs)
  left_alone = sum(detokenise(wanted) == wanted for _, wanted in pairs)
  assert untouched / len(pairs) == pytest.approx(0.037, abs=5e-4)
  assert restored / len(pairs) == pytest.approx(0.979, abs=5e-4)
  assert left_alone / len(pairs) > 0.98


def test_both_files_write_their_meaning_representations_in_one_way(public_data):
  train = read(public_data / "e2e" / "trainset_tokenized.csv.gz")
  published = read(public_data / "e2e" / "devset.csv")
  train, held_out = (
    {part for row in detokenise_columns(rows, ["mr"]) for part in row["mr"].split(", ")}
    for rows in (train, published)
  )
  assert not held_out - train
  raw = {part for row in published for part in row["mr"].split(", ")}
  assert raw == held_out
