r"""Supervised fine-tuning on conversations, by LoRA or in full: it learns the assistant's turns.

    python -m experiments.preview --config=configs/sft.py:data=mine.jsonl
    python -m experiments.train --config=configs/sft.py:data=mine.jsonl --workdir=runs/mine
    python -m experiments.chat --workdir=runs/mine

    python -m experiments.train --config=configs/sft.py --workdir=runs/sft
    python -m experiments.train --config=configs/sft.py:full --workdir=runs/sft_full

Each line of the file is a conversation, {"messages": [{"role": "user", "content": "…"}, {"role":
"assistant", "content": "…"}]}, optionally with "tools". Other layouts are recognized by their
columns; see `lora_jax.data.conversations`. The model's own chat template renders a conversation as
text. The loss covers the turns of the assistant and the token that ends each.

On two CPU cores (AMD EPYC) it takes 11 minutes with LoRA and 15 in full: the loss of the
assistant's turns on the held-out conversations falls from 1.853 to 1.745 and 1.748, the means of
three seeds (`--config.seed=1`); see benchmarks/results.md.

Without `data`, the config trains on `chat_sft/train.jsonl` and tests on `chat_sft/dev.jsonl`, in
the folder LORA_JAX_DATA, or in ../shared/data if that is not set. With `data`, a tenth of the
file is held out for the test.

    :data=mine.jsonl    another file: .jsonl, .json, .csv, .tsv or .parquet
    :smoke              a few steps on little data: everything runs, nothing is learned
    :full               full fine-tuning; the same steps, batches and order of the data
    :rank=4             another rank
    :model=address      another model with a chat template
"""

import ml_collections
from ml_collections import config_dict

from configs import arguments, quickstart

_DATA = arguments.data_folder() / "chat_sft"


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, full=False, rank=0, model="", data="")
  method = "full" if args["full"] else "lora"
  # The rest is as in the quickstart: the model, the adapter, most of the optimizer.
  config = quickstart.get_config(f"method={method},rank={args['rank']}")
  config.model.source = args["model"] or config.model.source

  task = config.task
  task.name = "chat"
  task.learn = "all"  # turns of the assistant; "last": only the last one
  task.template = config_dict.placeholder(str)  # a name or a .jinja file; None: the model's own
  task.date = "2026-01-01"  # for templates that print the date; a run keeps it

  data = config.data
  quickstart.remove_prompts(data)
  data.source = args["data"] or str(_DATA / "train.jsonl")
  data.format = "auto"  # by the file's name
  data.columns = ()  # the file names them
  # The layout: messages, conversations, prompt or instruction; auto: by the columns.
  data.conversation = "auto"
  data.sign_of = ""
  data.split_by = "messages"
  if args["data"]:
    data.train, data.validation, data.test = 0.9, 0.0, 0.1
  else:
    data.train, data.validation, data.test = 1.0, 0.0, 0.0
    data.test_source = str(_DATA / "dev.jsonl")
  data.max_length = 641  # tokens of a conversation up to the end of its last answer
  data.too_long = "drop"  # longer conversations: cut_left, cut_right, drop or error
  data.packed_length = 640  # tokens of a training row of several conversations
  data.buckets = (192, 384, 640)  # for evaluation

  train = config.train
  train.steps = 40  # these see nine tenths of the conversations
  train.batch_size = 4  # rows per step, 2,560 tokens
  train.accumulate = 4  # one row at a time
  train.checkpoint_every = 20  # steps; in full fine-tuning each is 1.6 GB
  train.max_to_keep = 1 if args["full"] else 2

  config.optimizer.warmup_steps = 10

  evaluation = config.evaluation
  evaluation.examples = 0  # all
  evaluation.batch_size = 4
  evaluation.samples = 2

  if args["smoke"]:
    data.max_length, data.packed_length, data.buckets = 129, 128, (128,)
    train.steps, train.batch_size, train.accumulate, train.checkpoint_every = 4, 2, 1, 2
    config.optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size, evaluation.samples = 4, 2, 1
  return config
