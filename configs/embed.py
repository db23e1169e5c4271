r"""Embeddings of sentences, on pairs that people rated as alike: STS-B (Cer et al. 2017).

    python -m experiments.train --config=configs/embed.py --workdir=runs/embed
    python -m experiments.predict --workdir=runs/embed --input="A plane is taking off."

all-MiniLM-L6-v2 learns from the pairs with a score of 4 or more, of 5, each among the other second
sentences of its batch. The figure is Spearman's correlation of the cosine of two embeddings with
the score, on the published development set. The files are looked for in the folder `glue/STS-B` of
LORA_JAX_DATA, else of ../shared/data.

    :smoke            a few steps on little data: everything runs, nothing is learned
    :method=full      another method of configs/adapters.py
"""

import ml_collections

from configs import arguments, glue


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, method="lora", rank=0)
  smoke = ",smoke" if args["smoke"] else ""
  # All that is not set here is as on STS-B in configs/glue.py: model, data, optimizer.
  config = glue.get_config(f"stsb,method={args['method']},rank={args['rank']}{smoke}")

  task = config.task
  task.name = "embedding"
  task.positive = 4.0  # pairs of at least this score are alike, and trained on
  task.temperature = 0.05  # by which cosines are divided

  train = config.train
  train.batch_size = 8 if args["smoke"] else 64  # pairs; the more, the more to tell a text from
  if not args["smoke"]:
    train.steps, config.optimizer.warmup_steps = 100, 10
  config.optimizer.peak /= 4  # the model is trained for this already
  return config
