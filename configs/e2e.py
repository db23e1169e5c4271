r"""Restaurants described from tables of facts (E2E NLG), with LoRA or in full fine-tuning.

    python -m experiments.train --config=configs/e2e.py --workdir=runs/e2e
    python -m experiments.train --config=configs/e2e.py:full --workdir=runs/e2e_full
    python -m experiments.evaluate --workdir=runs/e2e --nobase --max_tokens=80 --beams=1 --beams=4

SmolLM2-135M-Instruct learns to write "Aromi is a cheap pub." after
"name[Aromi], eatType[pub], priceRange[cheap]\nText:" (Novikova, Dušek and Rieser 2017, "The E2E
Dataset"; with LoRA: Hu et al. 2021, section 5.4). 2% of the training tables is held out for
validation. The test set is the published development set: 547 other tables with 4,672 references.
Only experiments.evaluate reads it, and prints BLEU; this needs `pip install -e ".[eval]"`.

The files come from https://github.com/tuetschek/e2e-dataset. They are read from the folder `e2e` of
LORA_JAX_DATA, or of ../shared/data if that is not set. The training file is published tokenized
("£ 30", "family - friendly") and the development set is not, so the training file is detokenized.

    :smoke      a few steps on little data: everything runs, nothing is learned
    :full       full fine-tuning; the same steps, batches and order of the data
    :rank=4     another rank
"""

import ml_collections

from configs import arguments, quickstart

_DATA = arguments.data_folder() / "e2e"


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, full=False, rank=0)
  method = "full" if args["full"] else "lora"
  # The rest is as in the quickstart: the model, the adapter, most of the optimizer.
  config = quickstart.get_config(f"method={method},rank={args['rank']}")

  data = config.data
  data.source = str(_DATA / "trainset_tokenized.csv.gz")
  data.format = "csv"
  data.columns = ()  # the header line names them
  data.detokenise = ("mr", "ref")
  data.sign_of = ""
  data.prompt = "{mr}\nText:"
  data.completion = " {ref}"
  data.choices = ()
  data.append_eos = True
  data.split_by = "mr"  # all references of a table are in one split
  data.train, data.validation, data.test = 0.98, 0.02, 0.0
  data.test_source = str(_DATA / "devset.csv")
  data.max_length = 145  # tokens; the longest prompt and completion have 141
  data.buckets = (48, 64, 80, 96, 144)

  train = config.train
  train.steps = 300
  train.batch_size = 16
  train.checkpoint_every = 200  # steps; in full fine-tuning each is 1.6 GB
  train.max_to_keep = 1 if args["full"] else 2

  config.optimizer.warmup_steps = 20

  evaluation = config.evaluation
  evaluation.split = "validation"
  evaluation.examples = 400
  evaluation.batch_size = 32

  if args["smoke"]:
    data.buckets = (144,)
    train.steps, train.batch_size, train.checkpoint_every = 4, 4, 2
    config.optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size = 16, 8
  return config
