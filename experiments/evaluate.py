r"""Evaluates a run: the base against the base with the run's adapter, on a split of its data.

    python -m experiments.evaluate --workdir=runs/quickstart --split=validation

Prints one line for each, and a JSON object with both.
"""

import json

from absl import app, flags, logging
from tqdm import tqdm

import lora_jax
from experiments import parts
from lora_jax.data import batches
from lora_jax.data.examples import choice_ids
from lora_jax.models import llama
from lora_jax.train import evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", "The split: train, validation or test.")
_EXAMPLES = flags.DEFINE_integer("examples", 0, "At most so many examples; 0 for all.", 0)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  run, config = parts.open_run(_WORKDIR.value)
  records = parts.load_records(config.data)
  split = parts.pick(records, _SPLIT.value, "--split")

  pretrained = parts.load_model(config.model)
  model = llama.Llama(pretrained.config)
  params, adapters = parts.load_adapter(
    run.adapter, pretrained.params, parts.trace_axes(model, pretrained.params)
  )
  held_out = parts.encode(config.data, split, pretrained.tokenizer)
  data = batches.eval_batches(
    held_out[: _EXAMPLES.value or None],
    config.evaluation.batch_size,
    buckets=config.data.buckets,
    pad_id=pretrained.tokenizer.pad_id,
  )
  eval_step = evaluation.make_eval_step(
    lora_jax.adapt(model.apply), choice_ids(pretrained.tokenizer, config.data.choices)
  )

  results = {"split": _SPLIT.value}
  for name, weights in {
    "base": pretrained.params,
    "adapter": lora_jax.attach(params, adapters),
  }.items():
    results[name] = evaluation.evaluate(eval_step, weights, tqdm(data, desc=name))
    print(f"{name:8} {parts.describe(results[name])}")
  print(json.dumps(results))


if __name__ == "__main__":
  app.run(main)
