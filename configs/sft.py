r"""Conversations of one's own, with LoRA or in full fine-tuning: the assistant's turns are learnt.

    python -m experiments.preview --config=configs/sft.py:data=mine.jsonl
    python -m experiments.train --config=configs/sft.py:data=mine.jsonl --workdir=runs/mine
    python -m experiments.chat --workdir=runs/mine

    python -m experiments.train --config=configs/sft.py --workdir=runs/sft
    python -m experiments.train --config=configs/sft.py:full --workdir=runs/sft_full

A line of the file is a conversation, {"messages": [{"role": "user", "content": "…"}, {"role":
"assistant", "content": "…"}]}, perhaps with "tools". Other layouts are told by their columns, see
`lora_jax.data.conversations`. The model's own chat template writes a conversation as text. The loss
is taken on the turns of the assistant and on the token that ends each.

Without a file, the conversations are those of `chat_sft/train.jsonl`; `chat_sft/dev.jsonl` is the
test. They are looked for in the folder LORA_JAX_DATA, else in ../shared/data. Of a file of one's
own, a tenth is held out for the test.

    :data=mine.jsonl    another file: .jsonl, .json, .csv, .tsv or .parquet
    :smoke              a few steps on little data: everything runs, nothing is learnt
    :full               full fine-tuning; the same steps, batches and order of the data
    :rank=4             another rank
    :model=address      another model, which has a chat template
"""

import ml_collections
from ml_collections import config_dict

from configs import arguments, quickstart

_DATA = arguments.data_folder() / "chat_sft"


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, full=False, rank=0, model="", data="")
  method = "full" if args["full"] else "lora"
  # What is not said here is as in the quickstart: the model, the adapter, most of the optimiser.
  config = quickstart.get_config(f"method={method},rank={args['rank']}")
  config.model.source = args["model"] or config.model.source

  task = config.task
  task.name = "chat"
  task.learn = "all"  # turns of the assistant; or the last one
  task.template = config_dict.placeholder(str)  # a name or a .jinja file; None: the model's own
  task.date = "2026-01-01"  # what templates that ask for the day are told; a run keeps it

  data = config.data
  for field in ("prompt", "completion", "special_tokens", "choices", "append_eos"):
    del data[field]  # of prompts
  data.source = args["data"] or str(_DATA / "train.jsonl")
  data.format = "auto"  # by the file's name
  data.columns = ()  # the file names them
  # The layout: messages, conversations, prompt or instruction; auto tells it by the columns.
  data.conversation = "auto"
  data.sign_of = ""
  data.split_by = "messages"
  if args["data"]:
    data.train, data.validation, data.test = 0.9, 0.0, 0.1
  else:
    data.train, data.validation, data.test = 1.0, 0.0, 0.0
    data.test_source = str(_DATA / "dev.jsonl")
  data.max_length = 641  # tokens of a conversation up to its last answer's end
  data.too_long = "drop"  # what becomes of a longer one: cut_left, cut_right, drop or error
  data.packed_length = 640  # tokens of a training row, which several conversations share
  data.buckets = (192, 384, 640)  # of evaluation

  train = config.train
  train.steps = 40  # nine tenths of the conversations
  train.batch_size = 4  # rows of a step, 2,560 tokens
  train.accumulate = 4  # a row at a time
  train.checkpoint_every = 20  # steps; in full fine-tuning each is 1.6 GB
  train.keep = 1 if args["full"] else 2

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
