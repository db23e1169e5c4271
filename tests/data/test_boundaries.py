"""Where a prompt ends and its completion begins, held to the `tokenizers` library's own offsets."""

import json

import pytest
import tiny_tokenizers
import tokenizers
from peers import transformers

from lora_jax.data.examples import choice_ids, describe, encode
from lora_jax.io import tokenizer as tokenizer_room

RECORD = {"text": "good", "label": "positive"}
TEMPLATES = [
  ("Review: {text}\nSentiment:", " {label}"),
  ("Review: {text}\nSentiment:\n", "{label}"),
  ("[{text}]", "{label}"),
  ("Sentiment: ", "{label}"),
  ("{text}", "{label}"),
  ("é 日本 {text}", "\n {label} é"),
  ("  {text}  ", "  {label}"),
]
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def saved(folder, words, settings=SETTINGS):
  folder.mkdir(exist_ok=True)
  words.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


@pytest.fixture(scope="module", params=tiny_tokenizers.KINDS)
def folder(request, tmp_path_factory):
  return saved(tmp_path_factory.mktemp("words"), tiny_tokenizers.KINDS[request.param]())


@pytest.fixture(scope="module")
def ours(folder):
  return tokenizer_room.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder):
  return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize(("prompt", "completion"), TEMPLATES)
def test_an_example_has_the_tokens_of_the_whole_text(ours, theirs, prompt, completion):
  [example] = encode([RECORD], ours, prompt, completion, 80, False)
  asked, answer = prompt.format(**RECORD), completion.format(**RECORD)
  assert list(example.tokens) == theirs(asked + answer).input_ids
  # Of the prompt are the tokens that end within it.
  found = theirs.backend_tokenizer.encode(asked + answer, add_special_tokens=False)
  inside = [end <= len(asked) for _, end in found.offsets]
  assert example.prompt_length == 1 + inside.index(False)
  start, _ = found.offsets[inside.index(False)]
  assert example.shared == (start < len(asked))


def test_a_completion_is_decoded_with_its_first_space(ours):
  for prompt, completion in TEMPLATES[:3]:
    [example] = encode([RECORD], ours, prompt, completion, 80, False)
    start = example.tokens[: example.prompt_length]
    text = ours.decode(example.targets, after=start)
    assert text == completion.format(**RECORD)
    assert ours.decode([*start, *example.targets]).endswith(text)


def test_choices_have_the_tokens_that_follow_the_prompt(ours):
  for prompt, completion in TEMPLATES[:3]:
    choices = [completion.format(label=label) for label in ("positive", "negative")]
    first = [
      encode([{"text": "good", "label": label}], ours, prompt, completion, 80, False)[0].targets[0]
      for label in ("positive", "negative")
    ]
    ending = prompt.rpartition("}")[2]
    assert choice_ids(ours, choices, prompt=ending) == first
  assert len(choice_ids(ours, [" positive", " negative"])) == 2


def test_choices_that_begin_at_different_tokens_are_refused(tmp_path):
  words = tokenizer_room.from_folder(saved(tmp_path, tiny_tokenizers.byte_level()))
  with pytest.raises(
    ValueError, match=r"'positive' and '!' begin at different tokens.*move the sp"
  ):
    choice_ids(words, ["positive", "!"], prompt="Sentiment: ")


def test_a_token_of_both_is_the_prompts_only_where_the_prompt_has_no_other(tmp_path):
  words = tokenizer_room.from_folder(saved(tmp_path, tiny_tokenizers.byte_level(before=())))
  [example] = encode([{"a": "Rev", "b": "iew film"}], words, "{a}", "{b}", 80, False)
  assert words.decode(example.tokens[: example.prompt_length]) == "Review"
  assert words.decode(example.targets) == " film" and example.shared
  with pytest.raises(ValueError, match="record 0: the completion has no tokens"):
    encode([{"a": "Rev", "b": "iew"}], words, "{a}", "{b}", 80, False)
  assert describe([example]) == {"examples": 1, "cut": 0, "shared": 1, "longest": 1}


@pytest.mark.parametrize("written", ["", "<s>"])
@pytest.mark.parametrize("after", [(), ("</s>",)])
def test_bos_comes_once_and_eos_never_before_the_end(tmp_path, written, after):
  words = tokenizer_room.from_folder(saved(tmp_path, tiny_tokenizers.byte_level(after=after)))
  prompt = written + "Review: {text}\nSentiment:"
  for max_length, cut in ((80, False), (6, True)):
    [example] = encode([RECORD], words, prompt, " {label}", max_length, True)
    assert example.tokens.count(words.bos_id) == 1 and example.tokens[0] == words.bos_id
    assert example.tokens.count(words.eos_id) == 1 and example.tokens[-1] == words.eos_id
    assert (example.cut > 0) == cut
    if not cut:
      asked = words.encode(prompt.format(**RECORD))
      assert list(example.tokens[: example.prompt_length]) == asked
  # Nor twice, where the completion writes it out.
  [example] = encode([RECORD], words, prompt, " {label}</s>", 80, True)
  assert example.tokens.count(words.eos_id) == 1


def test_special_tokens_in_a_column_are_text_and_in_a_template_tokens(folder, ours):
  record = {"q": "what does </s> mean, and <s>?", "a": "</s> ends"}
  for prompt, completion in (("Q: {q}\nA:", " {a}"), ("<s>Q: {q}</s> A:", " {a}</s>")):
    [plain] = encode([record], ours, prompt, completion, 300, False)
    meant = [ours.bos_id] + [ours.eos_id] * (prompt + completion).count("</s>")
    assert [i for i in plain.tokens if i in (ours.bos_id, ours.eos_id)] == meant
    [special] = encode([record], ours, prompt, completion, 300, False, special_tokens=True)
    text = prompt.format(**record) + completion.format(**record)
    assert list(special.tokens) == ours.encode(text)
    assert special.tokens.count(ours.eos_id) == len(meant) + 1
  # As the library encodes a text in which no special token is one, which unigram finds as pieces.
  fields = json.loads((folder / "tokenizer.json").read_text())
  if fields["model"]["type"] == "Unigram":
    fields["model"]["vocab"][1][0], fields["model"]["vocab"][2][0] = "<BOS>", "<EOS>"
    fields["added_tokens"], fields["post_processor"] = [], None
  words = tokenizers.Tokenizer.from_str(json.dumps(fields))
  words.encode_special_tokens = True
  text = "Q: {q}\nA: {a}".format(**record)
  [plain] = encode([record], ours, "Q: {q}\nA:", " {a}", 300, False)
  bare = words.encode(text, add_special_tokens=False).ids
  assert list(plain.tokens) == [ours.bos_id, *bare]
  assert ours.encode(text, special_tokens=False) == [ours.bos_id, *bare]
  # Without one in the columns nothing changes by asking.
  [example] = encode([RECORD], ours, "<s>{text}</s>", " {label}", 80, False)
  assert list(example.tokens) == ours.encode("<s>good</s> positive")


def test_half_of_a_surrogate_pair_is_refused_with_the_text(ours):
  with pytest.raises(ValueError, match=r"U\+D83D, half of a surrogate pair, is in the text 'a"):
    ours.encode("a\ud83d")
