import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.examples import Example, choice_ids, encode
from lora_jax.data.labels import sign_label
from lora_jax.data.records import read

PROMPT = "Review: {text}\nSentiment:"
COMPLETION = " {label}"
SPACED_PROMPT = "Review: {text}\nSentiment: "


def encode_texts(tokenizer, pairs, max_length=1_000, append_eos=False):
  records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
  return encode(records, tokenizer, "{prompt}", "{completion}", max_length, append_eos)


def test_an_example_is_the_prompts_tokens_and_then_the_completions(byte_tokenizer):
  [example] = encode_texts(byte_tokenizer, [("abc", "de")])
  assert example == Example(tokens=tuple(b"abcde"), prompt_length=3, cut=0)
  assert example.inputs == tuple(b"abcd")
  assert example.targets == tuple(b"de")
  assert list(example.positions) == [2, 3]


def test_eos_is_the_last_target_and_no_input(byte_tokenizer):
  [example] = encode_texts(byte_tokenizer, [("abc", "de")], append_eos=True)
  assert example.targets == (*b"de", byte_tokenizer.eos_id)
  assert example.inputs == tuple(b"abcde")


def test_bos_comes_once_and_before_the_prompt_alone(byte_tokenizer_with_bos):
  [example] = encode_texts(byte_tokenizer_with_bos, [("abc", "de")])
  assert example.tokens == (258, *b"abcde")
  assert example.prompt_length == 4


def test_a_long_prompt_loses_its_left_and_keeps_bos_and_completion(
  byte_tokenizer, byte_tokenizer_with_bos
):
  [example] = encode_texts(byte_tokenizer, [("abcdef", "gh")], max_length=5)
  assert example == Example(tokens=tuple(b"defgh"), prompt_length=3, cut=3)
  [example] = encode_texts(byte_tokenizer_with_bos, [("abcdef", "gh")], max_length=5)
  assert example == Example(tokens=(258, *b"efgh"), prompt_length=3, cut=4)


@given(
  pairs=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1, max_size=8)), min_size=1),
  max_length=st.integers(34, 60),
  append_eos=st.booleans(),
  bos=st.booleans(),
)
def test_completions_survive_whole_and_targets_follow_their_positions(
  byte_tokenizer, byte_tokenizer_with_bos, pairs, max_length, append_eos, bos
):
  tokenizer = byte_tokenizer_with_bos if bos else byte_tokenizer
  pairs = [
    (p.encode(errors="replace").decode(), c.encode(errors="replace").decode()) for p, c in pairs
  ]
  examples = encode_texts(tokenizer, pairs, max_length, append_eos)
  for (prompt, completion), example in zip(pairs, examples, strict=True):
    eos = (tokenizer.eos_id,) if append_eos else ()
    assert example.targets == (*completion.encode(), *eos)
    assert len(example.tokens) <= max_length
    assert len(example.tokens) + example.cut == len(
      (*tokenizer.before, *prompt.encode(), *example.targets)
    )
    kept = example.tokens[len(tokenizer.before) : example.prompt_length]
    assert kept and prompt.encode().endswith(bytes(kept))
    assert tuple(example.tokens[p + 1] for p in example.positions) == example.targets
    assert tuple(example.inputs[p + 1] for p in example.positions[:-1]) == example.targets[:-1]


def test_a_completion_without_room_is_refused_with_the_length_it_needs(byte_tokenizer):
  pairs = [("a", "1234"), ("a", "12345"), ("a", "1234567")]
  with pytest.raises(ValueError, match=r"2 of 3 completions \(first: record 1\).*length >= 8"):
    encode_texts(byte_tokenizer, pairs, max_length=5)
  assert encode_texts(byte_tokenizer, pairs, max_length=8)


def test_parts_without_tokens_are_refused(byte_tokenizer, byte_tokenizer_with_bos):
  with pytest.raises(ValueError, match="record 1: the prompt has no tokens"):
    encode_texts(byte_tokenizer, [("a", "b"), ("", "b")])
  with pytest.raises(ValueError, match="record 0: the completion has no tokens"):
    encode_texts(byte_tokenizer, [("a", "")])
  [example] = encode_texts(byte_tokenizer_with_bos, [("", "b")])
  assert example.tokens == (258, *b"b")
  [example] = encode_texts(byte_tokenizer, [("a", "")], append_eos=True)
  assert example.targets == (byte_tokenizer.eos_id,)


def test_templates_are_checked_before_anything_is_tokenised():
  class Untouched:
    eos_id = 0

    def encode(self, text, *, add_special_tokens=True):
      raise AssertionError(f"tokenised {text!r}")

  records = [{"text": "a", "label": "b"}, {"text": "a"}]
  with pytest.raises(ValueError, match=r"completion template .*record 1 has no column 'label'"):
    encode(records, Untouched(), PROMPT, COMPLETION, 64, False)
  with pytest.raises(ValueError, match=r"prompt template .*no column 'txt'"):
    encode(records, Untouched(), "{txt}", " x", 64, False)
  with pytest.raises(ValueError, match="the data set is empty"):
    encode([], Untouched(), PROMPT, COMPLETION, 64, False)


def test_eos_is_refused_where_the_tokenizer_has_none(byte_tokenizer):
  class Endless:
    eos_id = None
    encode = byte_tokenizer.encode

  with pytest.raises(ValueError, match="this tokenizer has no EOS"):
    encode_texts(Endless(), [("a", "b")], append_eos=True)


def test_choices_are_told_apart_by_their_first_token(byte_tokenizer, byte_tokenizer_with_bos):
  assert choice_ids(byte_tokenizer, ["yes", "no"]) == [ord("y"), ord("n")]
  assert choice_ids(byte_tokenizer_with_bos, ["yes", "no"]) == [ord("y"), ord("n")]
  with pytest.raises(ValueError, match="' yes' and ' no' both begin with token 32"):
    choice_ids(byte_tokenizer, [" yes", " no"])
  with pytest.raises(ValueError, match="choice '' has no tokens"):
    choice_ids(byte_tokenizer, ["yes", ""])


def test_the_prompt_of_an_example_is_what_generation_begins_with(smollm2):
  tokenizer = smollm2.tokenizer
  record = {"text": "A café with ½ a plot.", "label": "positive"}
  [example] = encode([record], tokenizer, PROMPT, COMPLETION, 64, True)
  start = example.tokens[: example.prompt_length]
  assert list(start) == tokenizer.encode(PROMPT.format(**record))
  assert example.targets[-1] == tokenizer.eos_id
  assert tokenizer.decode(example.targets[:-1], after=start) == " positive"
  # A space at the prompt's end is drawn into the completion's word, and is learnt with it: the
  # tokens are those of the text, wherever the templates divide it.
  [spaced] = encode([record], tokenizer, SPACED_PROMPT, "{label}", 64, True)
  assert spaced == Example(
    tokens=example.tokens, prompt_length=example.prompt_length, cut=0, shared=True
  )


def test_the_movie_reviews_fit_and_their_labels_are_one_token_each(smollm2, ratings_file):
  path = ratings_file("movieReviewSnippets")
  records = sign_label(read(path, format="tsv", columns=("id", "rating", "text")), "rating")
  examples = encode(records, smollm2.tokenizer, PROMPT, COMPLETION, 128, False)
  assert len(examples) == 10_072
  assert not any(example.cut for example in examples)
  choices = choice_ids(smollm2.tokenizer, [" positive", " negative"])
  assert {example.targets for example in examples} == {(choice,) for choice in choices}
  # For SmolLM2 no token has characters of both, so each part's ids are those that it has alone.
  for record, example in list(zip(records, examples, strict=True))[::97]:
    alone = [
      smollm2.tokenizer.encode(template.format(**record)) for template in (PROMPT, COMPLETION)
    ]
    assert example.tokens == (*alone[0], *alone[1]) and not example.shared
