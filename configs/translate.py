r"""English to Swedish translation, by LoRA or full fine-tuning: short sentences from Tatoeba.

    python -m experiments.train --config=configs/translate.py --workdir=runs/translate
    python -m experiments.train --config=configs/translate.py:full --workdir=runs/translate_full
    python -m experiments.evaluate --workdir=runs/translate --max_tokens=64 --beams=1 --beams=4

SmolLM2-135M-Instruct, which was trained on English, learns to write " Kan vi prata?" after
"English: Can we talk?\nSwedish:". 1% of the training sentences is held out for validation. The test
set is the development set, 1,000 pairs: experiments.evaluate prints chrF (Popović 2015) and BLEU
against all of its translations of a sentence. The scores need `pip install -e ".[eval]"`.

On two CPU cores that other work shared, it took 15 minutes with LoRA and 22 in full. chrF of 200
sentences rises from 8.8 to 23.6 and to 24.0, greedy, BLEU from 0.1 to 6.7 and to 6.0 (seed 0); see
benchmarks/results.md.

The files are `tatoeba_en_sv/train.tsv.gz` and `dev.tsv.gz`, tab-separated with the columns en, sv
and attribution (sentences of https://tatoeba.org, CC BY 2.0 FR). They are read from the folder
LORA_JAX_DATA, or from ../shared/data if that is not set.

    :smoke              a few steps on little data: everything runs, nothing is learned
    :full               full fine-tuning; the same steps, batches and order of the data
    :rank=4             another rank
    :model=gemma.gguf   another model, by its address, such as Gemma 3 270M
"""

import ml_collections

from configs import arguments, quickstart

_DATA = arguments.data_folder() / "tatoeba_en_sv"


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, full=False, rank=0, model="")
  method = "full" if args["full"] else "lora"
  # The rest is as in the quickstart: the model, the adapter, most of the optimizer.
  config = quickstart.get_config(f"method={method},rank={args['rank']}")
  config.model.source = args["model"] or config.model.source

  data = config.data
  data.source = str(_DATA / "train.tsv.gz")
  data.format = "tsv"
  data.columns = ()  # the header line names them
  data.quoted = False  # quotation marks are characters of the sentences
  data.sign_of = ""
  data.prompt = "English: {en}\nSwedish:"
  data.completion = " {sv}"
  data.choices = ()
  data.append_eos = True
  data.split_by = "en"  # all translations of a sentence are in one split
  data.train, data.validation, data.test = 0.99, 0.01, 0.0
  data.test_source = str(_DATA / "dev.tsv.gz")
  data.max_length = 193  # tokens
  data.buckets = (24, 32, 48, 64, 192)

  train = config.train
  train.steps = 100
  train.batch_size = 32
  train.checkpoint_every = 50  # steps; in full fine-tuning each is 1.6 GB
  train.max_to_keep = 1 if args["full"] else 2

  config.optimizer.warmup_steps = 10

  evaluation = config.evaluation
  evaluation.split = "validation"
  evaluation.examples = 200
  evaluation.batch_size = 32

  if args["smoke"]:
    data.buckets = (192,)
    train.steps, train.batch_size, train.checkpoint_every = 4, 4, 2
    config.optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size = 16, 8
  return config
