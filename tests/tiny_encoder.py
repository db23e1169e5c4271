"""A random BERT with its tokenizer, records of pairs, and configs of both for each task."""

import json
import pathlib

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from configs import embed, glue
from lora_jax.io import export, tokenizer
from lora_jax.models import bert

_WORDS = (
  "joy", "of", "fine", "film", "positive", "review", "number", "the", "worst", "dull", "ever",
  "negative", "hello", "world",
)  # fmt: skip
SMALLEST = bert.BertConfig(
  vocab_size=16,
  width=8,
  mlp_width=8,
  num_layers=1,
  num_heads=2,
  head_dim=4,
  max_length=8,
  classes=("a", "b"),
)
"""One layer of 8 values, with a head of two classes."""
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
SETTINGS = {
  "tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "sep_token": "[SEP]",
  "cls_token": "[CLS]", "unk_token": "[UNK]", "mask_token": "[MASK]", "do_lower_case": True,
}  # fmt: skip
BOTH = {
  "data.format": "jsonl", "data.columns": (), "data.split_by": "text", "data.train": 0.6,
  "data.validation": 0.2, "data.test": 0.2, "data.test_source": "", "data.max_length": 24,
  "data.buckets": (24,), "train.steps": 30, "train.batch_size": 8, "train.log_every": 5,
  "train.checkpoint_every": 10, "optimizer.warmup_steps": 2, "optimizer.peak_learning_rate": 1e-2,
  "evaluation.batch_size": 8, "evaluation.samples": 2,
}  # fmt: skip


def wordpiece() -> tokenizers.Tokenizer:
  """As BERT's: lower case, pieces of words, special tokens around a text and between two."""
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  pieces = [*special, *_CHARACTERS, *(f"##{x}" for x in _CHARACTERS), *_WORDS]
  ids = {piece: number for number, piece in enumerate(pieces)}
  words = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
  words.normalizer = normalizers.BertNormalizer(lowercase=True)
  words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  words.decoder = decoders.WordPiece(prefix="##")
  words.add_special_tokens(special)
  words.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
  )
  return words


def write_tokenizer(folder: pathlib.Path) -> tokenizer.Tokenizer:
  """Writes its files into a folder; returns it as it is read."""
  folder.mkdir(parents=True, exist_ok=True)
  wordpiece().save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
  return tokenizer.from_folder(folder)


def write(folder: pathlib.Path) -> None:
  """Writes `model`, of BERT's body, and `data.jsonl` into a folder."""
  words = write_tokenizer(folder / "words")
  config = bert.BertConfig(
    vocab_size=words.vocab_size,
    width=32,
    mlp_width=64,
    num_layers=2,
    num_heads=4,
    head_dim=8,
    max_length=64,
  )
  params = bert.Bert(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  export.save(folder / "model", params, config, words)
  rows = [
    {
      "text": f"a {word} film, number {n}",
      "other": f"number {n + shift}, a {word} review",
      "label": {"fine": "positive", "dull": "negative"}[word],
      "score": {"fine": 4.0, "dull": 1.0}[word],
      "alike": float(shift == 0),
    }
    for n in range(40)
    for word in ("fine", "dull")
    for shift in (0, 9)
  ]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


_CONFIG = """
import pathlib, sys

sys.path.insert(0, {tests!r})
import tiny_encoder

def get_config(text=""):
  config = tiny_encoder.config_of(pathlib.Path({folder!r}), {task!r}, text)
  config.update_from_flattened_dict({fields!r})
  return config
"""


def write_config(folder: pathlib.Path, task: str, fields: dict) -> pathlib.Path:
  """Writes the file of `config_of` a folder, with other fields; returns its path."""
  path, tests = folder / "config.py", str(pathlib.Path(__file__).parent)
  path.write_text(_CONFIG.format(tests=tests, folder=str(folder), task=task, fields=fields))
  return path


def config_of(folder: pathlib.Path, task: str, arguments: str = ""):
  """The config of a task on what `write` wrote, with the arguments of configs/glue.py."""
  if task == "embedding":
    config = embed.get_config(arguments)
    config.task.update({"text": "{text}", "pair": "{other}", "label": "{alike}", "positive": 1.0})
  else:
    name = "rte" if task == "classification" else "stsb"
    config = glue.get_config(f"{name},{arguments}" if arguments else name)
    label = "{label}" if task == "classification" else "{score}"
    config.task.update({"text": "{text}", "pair": "{other}", "label": label})
  if task == "classification":
    config.task.labels = ("negative", "positive")
  data = {"data.source": str(folder / "data.jsonl"), "model.source": str(folder / "model")}
  config.update_from_flattened_dict(BOTH | data)
  return config
