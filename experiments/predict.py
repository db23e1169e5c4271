r"""Answers for texts or images of one's own by a run: classes, scores or embeddings, by its task.

    python -m experiments.predict --workdir=runs/sst2 --input="a joy from start to finish"
    python -m experiments.predict --workdir=runs/rte --input=pairs.jsonl > answers.jsonl
    python -m experiments.predict --workdir=runs/cifar --input=photographs

--input is a text, or the path of a file: JSONL, JSON, CSV, TSV or Parquet with the columns of the
run's templates, or .txt with a text on each line. For a run on images it is a picture, or a folder
of pictures, which are taken in the order of their names. Each answer is printed as a JSON object on
a line of its own, with `index`, the number of the record from 0, and by the task

    classification    label, and probabilities by class
    regression        score
    embedding         embedding, of length 1
    images            image, the path; label, and probabilities by class
"""

import json

from absl import app, flags, logging

import lora_jax
from experiments import deployment, inputs, methods, parts, programs
from lora_jax import exchange
from lora_jax.train import progress

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
_INPUT = flags.DEFINE_string(
  "input", None, "A text, or a file of them; an image, or a folder of them.", required=True
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Records that are computed at once.", 1)
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download what the run's config.json names, where it is not on this machine."
)

_RESIDENT = deployment.define_resident()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  run, config = parts.open_run(_WORKDIR.value)
  task = parts.make_task(config)
  inputs.require_of(run, config, ["model.source"], fetch=_FETCH.value)
  inputs.warn_of_changes(run, config, ["model.source"])
  # Before the weights are loaded, for the input may be refused.
  shapes = parts.extend(parts.shapes_of(config.model), task, config)
  asked = task.of_model(shapes).asked(_INPUT.value)

  base = methods.load_base(config)
  task = task.of_model(base)
  model = parts.make_model(base.config)
  axes = parts.trace_axes(model, base.params)
  adapters = exchange.load(run.adapter, base.params, axes, table=base.table)
  weights = methods.finish(config, base.params, adapters, axes)
  weights = deployment.deploy(weights, _RESIDENT.value)
  answers = task.predict(
    lora_jax.adapt(task.forward(model)),
    weights,
    asked,
    batch_size=_BATCH_SIZE.value,
    watch=lambda batches: progress.watched(
      batches, "answer", compiled=set(), shape_of=task.shape_of, unit=task.UNIT
    ),
  )
  for index, answer in enumerate(answers):
    print(json.dumps({"index": index} | answer, ensure_ascii=False))


if __name__ == "__main__":
  programs.run(main)
