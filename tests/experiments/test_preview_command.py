"""experiments.preview: what it shows is read back, and is the tokens of the task's examples."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import main_programs
import pytest
import tiny_experiment

from experiments import parts, samples
from lora_jax.compress import storage
from lora_jax.io import pretrained
from lora_jax.models import llama

SST2 = [
  {"sentence": text, "label": label}
  for text, label in (("a é joy 😀", "1"), ("no\tjoy\x1b[2J", "0"), ("", "0"), ("dull", "0"))
]
CHATS = [
  {
    "messages": [
      {"role": "user", "content": f'Is "x" <|im_end|> {n}\n?'},
      {"role": "assistant", "content": "Yes 😀é."},
      {"role": "user", "content": "And now?" * n},
      {"role": "assistant", "content": "No."},
    ]
  }
  for n in (1, 2, 40, 3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_tokenizer):
  folder = tmp_path_factory.mktemp("preview")
  fields = {"max_length": 9, "buckets": (8,)}
  tiny_experiment.write(folder, smollm2_tokenizer, max_length=128, data=fields)
  (folder / "chats.jsonl").write_text("".join(json.dumps(x) + "\n" for x in CHATS))
  return folder


def configs(folder):
  """`{task: the text of its config file}`."""
  fields = {
    "data.train": 1.0,
    "data.validation": 0.0,
    "data.test": 0.0,
    "data.test_source": "",
    "data.max_length": 97,
  }
  chats = f"data={folder / 'chats.jsonl'},model={folder / 'model'}"
  return {
    "completion": (folder / "config.py").read_text(),
    "chat": f"from configs import sft\n\ndef get_config(text=''):\n"
    f"  config = sft.get_config({chats!r})\n  config.update_from_flattened_dict({fields!r})\n"
    f"  return config\n",
    "classification": "from configs import classify\n\ndef get_config(text=''):\n"
    f"  config = classify.get_config()\n  config.model.source = {str(folder / 'model')!r}\n"
    f"  data = config.data\n  data.source = {str(folder / 'sst2.jsonl')!r}\n"
    "  data.format, data.columns, data.test_source, data.quoted = 'jsonl', (), '', None\n"
    "  data.train, data.validation, data.test = 1.0, 0.0, 0.0\n"
    "  config.task.text, config.task.label = 'Say: {sentence}', '{label}'\n"
    "  config.task.labels = ('0', '1')\n  data.split_by = 'sentence'\n  return config\n",
  }


@pytest.fixture
def preview(folder, capsys, monkeypatch, tmp_path):
  """`(task, *arguments) -> what is printed`; no weights may be loaded."""

  def load(*unused, **options):
    raise AssertionError("the weights are loaded")

  monkeypatch.setattr(pretrained, "load", load)
  (folder / "sst2.jsonl").write_text("".join(json.dumps(x) + "\n" for x in SST2))

  def preview(task, *arguments):
    path = folder / f"{task}_config.py"
    path.write_text(configs(folder)[task])
    capsys.readouterr()
    main_programs.call("preview", f"--config={path}", *arguments)
    return capsys.readouterr().out

  return preview


def examples_of(folder, name):
  scope = {}
  exec(configs(folder)[name], scope)
  config = scope["get_config"]()
  task = parts.make_task(config)
  rows = parts.load_records(config.data, task)["train"]
  task = parts.task_of_model(task, config)
  return task, task.examples(rows)


def read_back(printed):
  """Of each example that is shown: (text, tokens, is special, is learnt) of each text."""
  found = []
  for line in printed.splitlines():
    if line.startswith("example "):
      found.append([])
    elif line[:2] in (". ", "+ ") and found:
      for token in re.findall(r'"(?:[^"\\]|\\.)*"(?:x\d+)?|\S+', line[2:]):
        quoted = re.fullmatch(r'("(?:[^"\\]|\\.)*")(?:x(\d+))?', token)
        text = json.loads(quoted[1]) if quoted else token
        count = int(quoted[2] or 1) if quoted else 1
        found[-1].append((text, count, not quoted, line[0] == "+"))
  return found


@pytest.mark.parametrize(
  "name", ["completion", pytest.param("classification", marks=pytest.mark.slow), "chat"]
)
def test_what_is_shown_is_the_tokens_of_examples_and_what_is_learnt_of_them(preview, folder, name):
  printed = preview(name, "--examples=3")
  task, examples = examples_of(folder, name)
  chosen = samples.choose(examples, 3)
  shown = read_back(printed)
  assert len(shown) == len(chosen) == 3
  decode = task.model.tokenizer.decode
  special = set(task.model.tokenizer.special_tokens.values())
  for example, tokens in zip(chosen, shown, strict=True):
    assert sum(count for _, count, _, _ in tokens) == len(example.tokens)
    assert sum(count for _, count, _, learnt in tokens if learnt) == len(example.targets)
    text = "".join(text for text, *_ in tokens)
    wanted = "".join(text for text, _, _, learnt in tokens if learnt)
    if name == "classification":
      assert text == decode(example.inputs) + task.labels[example.targets[0]]
      assert wanted == task.labels[example.targets[0]]
    else:
      assert text == decode(example.tokens, skip_special_tokens=False)
      assert wanted == decode(example.targets, skip_special_tokens=False)
      assert [x for x, _, is_special, _ in tokens if is_special] == [
        decode([n], skip_special_tokens=False) for n in example.tokens if n in special
      ]
  for line in task.lines(task.describe(train=examples)):
    assert f"{line}\n" in printed


@pytest.mark.slow
def test_what_was_cut_and_left_out_is_counted(preview):
  printed = preview("chat", "--examples=9")
  assert "train: 3 conversations, 0 of them cut to max_length 97; 1 longer ones left out" in printed
  assert len(read_back(printed)) == 3
  printed = preview("chat", "--config.data.too_long=cut_left", "--examples=4")
  assert "train: 4 conversations, 1 of them cut to max_length 97; 0 longer ones" in printed
  assert re.search(r": 97 tokens, \d+ of them learned, \d+ more are cut\n", printed)
  assert ", 7 more are cut\n" in preview("completion", "--config.data.max_length=6")


def test_in_colours_the_text_is_that_of_the_marks(preview, monkeypatch):
  plain = [
    "".join(text for text, *_ in tokens).replace("\x1b", "\\u001b")
    for tokens in read_back(preview("classification", "--examples=4"))
  ]
  shown = preview("classification", "--color=always", "--examples=4")
  assert "\x1b[2J" not in shown  # of the text, which would clear the screen
  for text in plain:
    assert text.replace("\t", "\\t") in re.sub(r"\x1b\[[\d;]*m", "", shown)
  learnt = re.findall(r"\x1b\[48;5;[\d;]*m([^\x1b]*)\x1b\[0m", shown)
  assert len(learnt) == 4 and set(learnt) <= {"0", "1"}
  special = preview("chat", "--color=always", "--examples=1")
  assert re.findall(r"\x1b\[[\d;]*;1m([^\x1b]*)\x1b", special)[:2] == ["<|im_start|>", "<|im_end|>"]
  assert "⏎\x1b[0m\n" in special


def test_colours_are_for_a_terminal_whose_user_did_not_decline_them(preview, monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  assert "\x1b[" in preview("completion", "--examples=1")
  monkeypatch.setenv("NO_COLOR", "1")
  assert "\x1b[" not in preview("completion", "--examples=1")


def test_another_split_and_a_wrong_one(preview):
  with pytest.raises(ValueError, match="--split 'best' is no split of the data; there are train"):
    preview("completion", "--split=best")
  assert "\ntest: " in f"\n{preview('completion', '--split=test')}"


@pytest.mark.slow
def test_a_compressed_model_is_previewed_without_its_tensors(
  preview, tmp_path, smollm2_tokenizer, monkeypatch
):
  config = llama.LlamaConfig(
    vocab_size=smollm2_tokenizer.vocab_size,
    width=8,
    mlp_width=8,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_length=16,
    tie_embeddings=True,
  )
  params = llama.Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  storage.save(tmp_path / "small", params, config, smollm2_tokenizer)
  monkeypatch.setattr(storage, "load", None)
  (tmp_path / "small" / storage.TENSORS).unlink()
  printed = preview("completion", f"--config.model.source={tmp_path / 'small'}")
  assert printed.replace("16 positions", "128 positions") == preview("completion")
