r"""Sentence embeddings, trained on pairs that people rated as similar: STS-B (Cer et al. 2017).

    python -m experiments.train --config=configs/embed.py --workdir=runs/embed
    python -m experiments.predict --workdir=runs/embed --input="A plane is taking off."

all-MiniLM-L6-v2 trains on the pairs with a score of at least 4 out of 5. The other second sentences
of a batch are the negatives. The metric is Spearman's correlation between the cosine of two
embeddings and the score, on the published development set. The files are read from the folder
`glue/STS-B` of LORA_JAX_DATA, or of ../shared/data if that is not set.

    :smoke            a few steps on little data: everything runs, nothing is learned
    :method=full      another method of configs/adapters.py
"""

import ml_collections

from configs import arguments, glue


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, method="lora", rank=0)
  smoke = ",smoke" if args["smoke"] else ""
  # The rest is as on STS-B in configs/glue.py: model, data, optimizer.
  config = glue.get_config(f"stsb,method={args['method']},rank={args['rank']}{smoke}")

  task = config.task
  task.name = "embedding"
  task.positive = 4.0  # pairs with at least this score are trained on
  task.temperature = 0.05  # divides the cosines

  train = config.train
  train.batch_size = 8 if args["smoke"] else 64  # pairs; a larger batch has more negatives
  if not args["smoke"]:
    train.steps, config.optimizer.warmup_steps = 100, 10
  config.optimizer.peak_learning_rate /= 4  # the model is already trained for this
  config.optimizer.rates = ()  # there is no head
  return config
