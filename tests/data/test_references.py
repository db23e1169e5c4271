import pytest

from lora_jax.data.records import read
from lora_jax.data.references import by_prompt


def test_completions_of_one_prompt_come_together_in_their_order():
  records = [
    {"mr": "a", "ref": "one "},
    {"mr": "b", "ref": "two"},
    {"mr": "a", "ref": "three"},
    {"mr": "a", "ref": "one"},
  ]
  assert list(by_prompt(records, "{mr}:", " {ref}").items()) == [
    ("a:", ["one", "three", "one"]),
    ("b:", ["two"]),
  ]


def test_a_template_that_a_record_cannot_fill_is_refused():
  with pytest.raises(ValueError, match=r"completion template ' \{text\}': record 0 has no column"):
    by_prompt([{"mr": "a"}], "{mr}", " {text}")
  with pytest.raises(ValueError, match=r"prompt template '\{name\}': record 0 has no column"):
    by_prompt([{"mr": "a"}], "{name}", " {mr}")


def test_the_development_set_has_547_prompts_with_all_of_its_references(public_data):
  references = by_prompt(read(public_data / "e2e" / "devset.csv"), "{mr}", "{ref}")
  assert len(references) == 547
  assert sum(map(len, references.values())) == 4_672
