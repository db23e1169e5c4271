r"""One method of configs/adapters.py on the quickstart's task, small enough for a sweep.

    python -m experiments.train --config=configs/methods.py:method=dora,seed=1 --workdir=runs/dora_1
    python -m benchmarks.methods --results=runs/methods.jsonl      # all of them, and the table

Each run takes 50 steps of 8 sentences of at most 40 tokens, at the method's learning rate in
configs/adapters.py. It is shorter than the quickstart, so the accuracies are lower.

    device      2 CPU cores, float32
    time        about a minute a run, compilation and evaluation included

    :method=dora    one of configs/adapters.py
    :seed=1         of the adapters' start and of the order of the data
    :peak=1e-3      another learning rate
    :split=validation   the split for evaluation; choose learning rates on this one
    :smoke          a few steps on little data: everything runs, nothing is learned
"""

import ml_collections

from configs import arguments, quickstart


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, method="lora", seed=0, peak=0.0, split="test", smoke=False)
  smoke = ",smoke" if args["smoke"] else ""
  config = quickstart.get_config(f"method={args['method']}{smoke}")
  config.seed = args["seed"]
  config.optimizer.peak_learning_rate = args["peak"] or config.optimizer.peak_learning_rate
  config.evaluation.split = args["split"]
  config.data.max_length = 41  # one more than the inputs, whose last token is the answer
  config.data.buckets = (40,)  # one shape, so that all steps of a run can be compared
  if not args["smoke"]:
    config.train.steps = 50
    config.train.batch_size = 8  # sentences
    config.train.checkpoint_every = 50
    config.optimizer.warmup_steps = 5
  return config
