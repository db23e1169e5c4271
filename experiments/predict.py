r"""Answers for one's own texts, images or clips by a run: classes, scores, embeddings, transcripts.

    python -m experiments.predict --workdir=runs/sst2 --input="a joy from start to finish"
    python -m experiments.predict --workdir=runs/rte --input=pairs.jsonl > answers.jsonl
    python -m experiments.predict --workdir=runs/cifar --input=photographs
    python -m experiments.predict --workdir=runs/coffee --input=clip.flac
    python -m experiments.predict --workdir=runs/cells --input=smears --draw=copies

--input is a text, or the path of a file: JSONL, JSON, CSV, TSV or Parquet with the columns of the
run's templates, or .txt with a text on each line. For a run on images it is a picture, or a folder
of pictures, which are taken in the order of their names; for one on speech a clip, or a folder of
clips. Each answer is printed as a JSON object on a line of its own, with `index`, the number of the
record from 0, and by the task

    classification    label, and probabilities by class
    regression        score
    embedding         embedding, of length 1
    images            image, the path; label, and probabilities by class
    transcribe, ctc   file, the path; seconds, its length; text; computed_in, the seconds it took
    detection         image, the path; its size; and boxes, each with label, score and box: x, y,
                      width and height in pixels

For a run that detects, --draw=copies writes a copy of each picture with the boxes drawn in, as PNG,
to a new folder.
"""

import json
import pathlib

from absl import app, flags, logging

import lora_jax
from experiments import deployment, inputs, methods, parts, programs
from lora_jax import exchange
from lora_jax.io import outputs
from lora_jax.run import progress

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
_INPUT = flags.DEFINE_string(
  "input",
  None,
  "A text, or a file of them; an image or a clip, or a folder of them.",
  required=True,
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Records that are computed at once.", 1)
_DRAW = flags.DEFINE_string(
  "draw", None, "A new folder, for copies of the pictures with the answers drawn in."
)
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
  marks = [task.mark(each) for each in asked] if _DRAW.value else []
  if None in marks:
    raise app.UsageError(f"--draw: the task {config.task.name} draws nothing into its inputs")
  folder = outputs.new_folder(_DRAW.value) if _DRAW.value else None

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
    batch_size=min(_BATCH_SIZE.value, len(asked)),  # padding rows take as long as others
    watch=lambda batches: progress.watched(
      batches, "answer", compiled=set(), shape_of=task.shape_of, unit=task.UNIT
    ),
  )
  if folder:
    with outputs.whole_folder(folder) as partial:
      for index, (mark, answer) in enumerate(zip(marks, answers, strict=True)):
        mark(answer, partial / f"{index}_{pathlib.Path(answer['image']).stem}.png")
  for index, answer in enumerate(answers):
    print(json.dumps({"index": index} | answer, ensure_ascii=False))


if __name__ == "__main__":
  programs.run(main)
