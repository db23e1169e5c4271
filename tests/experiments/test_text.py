"""Tokens, stop tokens and lengths of texts in the main programs, on a tiny random Llama."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import pytest
import tiny_tokenizers
from absl import flags
from absl.testing import flagsaver
from main_programs import imported
from peers import torch, transformers

from configs import quickstart
from experiments import parts, planning
from lora_jax.data import examples
from lora_jax.io import pretrained, tokenizer
from lora_jax.models import llama
from lora_jax.tasks import texts

plan = imported("experiments.plan")
PROMPT = "Review: good film\nSentiment:"


@pytest.fixture(scope="module")
def program():
  """experiments.generate, in this process."""
  yield importlib.import_module("experiments.generate")
  for flag in list(flags.FLAGS.flags_by_module_dict()["experiments.generate"]):
    delattr(flags.FLAGS, flag.name)


@pytest.fixture
def generate(program, capsys):
  def generate(*arguments):
    with flagsaver.flagsaver():
      flags.FLAGS(["generate", *arguments])
      program.main(["generate"])
    return [json.loads(x)["completion"] for x in capsys.readouterr().out.splitlines()]

  return generate


def by_transformers(folder, prompt, steps, stops):
  words = tokenizer.from_folder(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  asked = torch.tensor([words.encode(prompt)])
  with torch.no_grad():
    found = model.generate(
      asked, max_new_tokens=steps, do_sample=False, eos_token_id=stops, pad_token_id=0
    )[0, asked.shape[1] :].tolist()
  return words, found


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe"])
def test_generation_ends_at_each_stop_token_and_keeps_the_first_space(tmp_path, generate, kind):
  make = tiny_tokenizers.KINDS[kind]
  after = {"after": ["</s>"]} if kind == "byte_level" else {}
  folder = tiny_tokenizers.write(tmp_path / "free", make(**after), std=0.3)
  asked = f"--source={folder}", f"--prompt={PROMPT}", "--max_tokens=12"
  words, free = by_transformers(folder, PROMPT, 12, [words_id(folder, "</s>")])
  [text] = generate(*asked)
  whole = words.decode([*words.encode(PROMPT), *free])
  assert words.decode(words.encode(PROMPT)) + text == whole
  # A token that it writes, by one more of the files.
  stop = next(token for token in free[3:] if token not in free[:3])
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
  [ended] = generate(*asked)
  assert ended == words.decode(free[: free.index(stop)], after=words.encode(PROMPT))
  assert len(ended) < len(text)


def words_id(folder, token):
  return tokenizer.from_folder(folder).vocabulary[token]


def test_what_the_model_has_no_positions_for_is_not_generated(tmp_path, generate):
  folder = tiny_tokenizers.write(
    tmp_path / "short", config={"max_position_embeddings": 16}, std=0.3
  )
  count = len(tokenizer.from_folder(folder).encode(PROMPT))
  asked = f"--source={folder}", f"--prompt={PROMPT}"
  with pytest.raises(ValueError, match=rf"after a prompt of {count} .* 16 positions.*{17 - count}"):
    generate(*asked, f"--max_tokens={18 - count}")
  assert generate(*asked, f"--max_tokens={17 - count}")


@pytest.fixture
def config(tmp_path):
  """The quickstart's, of a model with 32 positions and 40 records, 10 of which are long."""
  folder = tiny_tokenizers.write(tmp_path / "model", config={"max_position_embeddings": 32})
  rows = [{"text": "film " * (30 if n % 4 == 0 else 1) + str(n), "label": "a"} for n in range(40)]
  (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = quickstart.get_config()
  config.model.source = str(folder)
  data = config.data
  data.source, data.format = str(tmp_path / "data.jsonl"), "jsonl"
  data.columns, data.sign_of = (), ""
  data.train, data.validation, data.test = 1.0, 0.0, 0.0
  data.max_length, data.buckets = 33, (32,)
  return config


def test_a_plan_says_how_many_prompts_are_cut_and_how_many_positions_there_are(config):
  printed = plan.describe_data(config, planning.read(config))
  assert (
    "training: 10 of 40 prompts cut to max_length 33; the longest input has 32 tokens, the model "
    "32 positions\n"
  ) in printed


def test_longer_texts_than_the_model_has_positions_are_refused(config):
  config.data.max_length = 34
  with pytest.raises(ValueError, match=r"max_length 34: up to 33 tokens .* 32 positions .* 33"):
    planning.read(config)


def test_a_space_at_the_end_of_the_prompt_is_told_of(config):
  config.data.prompt, config.data.completion = "Review: {text}\nSentiment: ", "{label}"
  config.data.completion = "positive"
  assert "; 40 prompts share a token with their completion" in plan.describe_data(
    config, planning.read(config)
  )


def test_special_tokens_in_a_column_follow_the_config(config):
  found = pretrained.inspect(config.model.source)
  words = found.tokenizer

  def encode(row):
    return parts.make_task(config).of_model(found).examples([row])

  row = {"text": "</s>", "label": "a"}
  [plain] = encode(row)
  assert words.eos_id not in plain.tokens
  config.data.special_tokens = True
  [special] = encode(row)
  assert words.eos_id in special.tokens
  # The config of a run before there was the choice: they were tokens.
  with config.data.unlocked():
    del config.data.special_tokens
  assert encode(row) == [special]


def test_choices_follow_the_end_of_the_prompt(tmp_path, config):
  folder = tiny_tokenizers.write(tmp_path / "words", tiny_tokenizers.sentencepiece_bpe())
  words = tokenizer.from_folder(folder)
  found = dataclasses.replace(pretrained.inspect(config.model.source), tokenizer=words)

  def choice_ids():
    return parts.make_task(config).of_model(found).choice_ids()

  config.data.prompt, config.data.choices = "[{text}]", ("positive", "negative")
  row = {"text": "good"}
  first = [
    examples.encode([row], words, "[{text}]", choice, 40, False)[0].targets[0]
    for choice in config.data.choices
  ]
  assert choice_ids() == first
  config.data.prompt, config.data.choices = "{text}", (" positive", " negative")
  spaced = [words.vocabulary[f"▁{choice}"] for choice in ("positive", "negative")]
  assert choice_ids() == spaced


def test_the_positions_of_a_text_are_those_of_what_is_fed_to_the_model():
  model = llama.LlamaConfig(
    vocab_size=8,
    width=8,
    mlp_width=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_length=16,
    dtype=jnp.float32,
  )
  texts.check_generation([[1] * 10, [1] * 12], 5, model)
  with pytest.raises(ValueError, match=r"after a prompt of 12 tokens: up to 17 tokens .* use 5 or"):
    texts.check_generation([[1] * 10, [1] * 12], 6, model)
