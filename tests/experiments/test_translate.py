"""configs/translate.py: English to Swedish, scored against all translations of a sentence."""

import pytest
import tiny_tokenizers

from configs import translate
from experiments import parts
from lora_jax.io import pretrained


@pytest.fixture(scope="module")
def records(public_data):
  config = translate.get_config()
  data = public_data / "tatoeba_en_sv"
  config.data.source, config.data.test_source = str(data / "train.tsv.gz"), str(data / "dev.tsv.gz")
  return parts.load_records(config.data, parts.make_task(config))


def test_no_sentence_of_the_test_is_trained_on_and_no_split_shares_one(records):
  english = {name: {row["en"] for row in rows} for name, rows in records.items()}
  assert len(records["test"]) == 1000 and len(records["train"]) > 20_000
  assert not english["train"] & english["test"]
  assert not english["train"] & english["validation"]


def test_a_text_is_scored_against_all_translations_of_its_sentence(records, tmp_path):
  config = translate.get_config()
  folder = tiny_tokenizers.write(tmp_path, config={"max_position_embeddings": 8192})
  config.data.max_length, config.data.buckets = 2048, (2047,)
  task = parts.make_task(config).of_model(pretrained.inspect(folder))
  rows = records["test"]
  asked = task.prompts(rows, task.examples(rows), None)
  assert len(asked) == len({row["en"] for row in rows}) < len(rows)
  for each in asked:
    sentence = each["prompt"].removeprefix("English: ").removesuffix("\nSwedish:")
    assert each["references"] == [row["sv"] for row in rows if row["en"] == sentence]
  assert max(len(each["references"]) for each in asked) > 2
