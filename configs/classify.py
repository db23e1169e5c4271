r"""Sentiment classification with a classification head and LoRA: SST-2 (Socher et al. 2013).

    python -m experiments.train --config=configs/classify.py --workdir=runs/classify

SmolLM2-135M-Instruct gets a head of two classes at a text's last token. In transformers this is
LlamaForSequenceClassification. The head trains in full alongside the adapters. Both are saved as
PEFT's SEQ_CLS. 1% of the 67,349 training phrases is held out for validation. The test set is the
published development set, 872 sentences.

The files are `glue/SST-2/train.tsv` and `dev.tsv` in the folder LORA_JAX_DATA, or in
../shared/data if that is not set.

    :smoke            a few steps on little data: everything runs, nothing is learned
    :method=dora      another method of configs/adapters.py
"""

import ml_collections

from configs import arguments, quickstart

_DATA = arguments.data_folder() / "glue" / "SST-2"


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, method="lora", rank=0)
  # The rest is as in the quickstart: the model, the adapter, most of the optimizer.
  config = quickstart.get_config(f"method={args['method']},rank={args['rank']}")

  task = config.task
  task.name = "classification"
  task.text = "{sentence}"
  task.pair = ""  # template of a second text, for encoders only
  task.label = "{label}"
  task.labels = ("0", "1")  # negative and positive, as the file has them

  data = config.data
  quickstart.remove_prompts(data)
  del data.packed_length
  data.source = str(_DATA / "train.tsv")
  data.format = "tsv"
  data.columns = ()  # the header line names them
  data.quoted = False  # quotation marks are characters of the sentences
  data.sign_of = ""
  data.split_by = "sentence"
  data.train, data.validation, data.test = 0.99, 0.01, 0.0
  data.test_source = str(_DATA / "dev.tsv")
  data.max_length = 97  # tokens and a class; longer texts are truncated at the end
  data.buckets = (16, 24, 32, 48, 96)

  train = config.train
  train.steps = 400
  train.batch_size = 32
  train.checkpoint_every = 200

  config.optimizer.warmup_steps = 20

  evaluation = config.evaluation
  evaluation.examples = 0  # all

  if args["smoke"]:
    data.buckets = (96,)
    train.steps, train.batch_size, train.checkpoint_every = 4, 4, 2
    config.optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size = 16, 8
  return config
