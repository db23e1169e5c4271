r"""Evaluates a run: the base against the base with the run's adapter, on a split of its data.

    python -m experiments.evaluate --workdir=runs/quickstart --split=validation
    python -m experiments.evaluate --workdir=runs/e2e --nobase --beams=1 --beams=4

Or a model that no run has trained, a compressed one say, on the data of a config:

    python -m experiments.evaluate --config=configs/quickstart.py \
        --config.model.source=runs/small/model --config.model.scan_layers=False

Prints a line for each loss and each score of generated texts, and a JSON object with all of them,
which is also kept in the workdir, as eval_test.json. The scores, BLEU and chrF, are those of the
texts for the split's prompts, against all references that its records have. The texts are kept in
the workdir too, in generated/test_adapter_beams4.jsonl for example. The scores need the extra
`eval`.
"""

import functools
import json
import math
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

import lora_jax
from experiments import inputs, methods, parts, programs
from lora_jax import exchange, sharding
from lora_jax.compress import merging
from lora_jax.io import outputs
from lora_jax.run import workdir
from lora_jax.train import evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Or the config of a model and its data.", lock_config=True
)
_MESH = flags.DEFINE_bool("mesh", False, "On the config's mesh, and not on one device.")
_SPLIT = flags.DEFINE_string("split", "test", "The split: train, validation or test.")
_EXAMPLES = flags.DEFINE_integer(
  "examples", 0, "At most so many examples, and prompts to generate from; 0 for all.", 0
)
_BASE = flags.DEFINE_bool("base", True, "Evaluate the base alone too.")
_BEAMS = flags.DEFINE_multi_integer(
  "beams", [], "Generate with so many beams (1: greedy) and report BLEU and chrF; may be repeated."
)
_LENGTH_PENALTY = flags.DEFINE_float(
  "length_penalty", 1.0, "A beam search ranks texts by log-probability / length ** this."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "The most tokens of a generated text.", 1)
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download what the run's config.json names, where it is not on this machine."
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if any(beams < 1 for beams in _BEAMS.value):
    raise app.UsageError(f"--beams {_BEAMS.value} must be at least 1 each")
  if not math.isfinite(_LENGTH_PENALTY.value):
    raise app.UsageError(f"--length_penalty={_LENGTH_PENALTY.value} is not finite")
  logging.set_verbosity(logging.WARNING)
  if (_WORKDIR.value is None) == (_CONFIG.value is None):
    raise app.UsageError("give either --workdir or --config")
  if _CONFIG.value and _FETCH.value:
    raise app.UsageError("--fetch is for a --workdir; a --config is fetched for as it stands")
  if _CONFIG.value and not _BASE.value:
    raise app.UsageError("--nobase leaves nothing of a --config, which has no adapter")
  if _BEAMS.value:
    from lora_jax.train import text_scores  # of an extra of its own; asked for before long work
  run, config = (None, _CONFIG.value) if _CONFIG.value else parts.open_run(_WORKDIR.value)
  if run:
    fields = ["model.source", "data.source", "data.test_source"]
    inputs.require_of(run, config, fields, fetch=_FETCH.value)
    inputs.warn_of_changes(run, config, ["model.source", "data.source"])
  mesh = sharding.make_mesh(**config.mesh) if _MESH.value else None
  if mesh:
    parts.process_rows(config, mesh)
  task = parts.make_task(config)
  records = parts.load_records(config.data, task)
  split = parts.pick(records, _SPLIT.value, "--split")
  # Before the weights are loaded, for a record may still be refused.
  task = parts.task_of_model(task, config)
  limit = _EXAMPLES.value or None
  held_out = task.examples(split)
  asked = task.prompts(split, held_out, limit) if _BEAMS.value else []
  if asked:
    task.check_room(asked, _MAX_TOKENS.value)

  # A config alone tells of no adapter that was trained, LoftQ's base among these.
  if run:
    pretrained = methods.load_base(config, mesh)
  else:
    pretrained = parts.extend(parts.load_model(config.model, mesh), task, config)
  apply = lora_jax.adapt(task.forward(parts.make_model(pretrained.config)))
  candidates = {"base": pretrained.params} if _BASE.value else {}
  if run:
    axes = parts.trace_axes(parts.make_model(pretrained.config), pretrained.params)
    table = pretrained.table
    adapters = exchange.load(run.adapter, pretrained.params, axes, table=table)
    candidates["adapter"] = methods.finish(config, pretrained.params, adapters, axes)
  data = task.eval_batches(held_out[:limit], config.evaluation.batch_size)
  if mesh:
    data = data.map(functools.partial(sharding.put_rows, mesh=mesh))
  eval_step = task.make_eval_step(apply)

  results = {"split": _SPLIT.value}
  if _BEAMS.value:
    results |= {"length_penalty": _LENGTH_PENALTY.value, "max_tokens": _MAX_TOKENS.value}
  for name, weights in candidates.items():
    if mesh:
      weights = jax.device_put(weights, parts.lay_out(weights, pretrained.config, mesh).shardings)
    results[name] = evaluation.evaluate(eval_step, weights, tqdm(data, desc=name), task.metrics)
    print(f"{name:8} {task.line(results[name])}")
    keep(run, results)
    for beams in _BEAMS.value:
      started = time.perf_counter()
      texts = task.write(
        apply,
        merging.keep_smaller(weights),  # once, and not at each token
        asked,
        batch_size=config.evaluation.batch_size,
        max_tokens=_MAX_TOKENS.value,
        beams=beams,
        length_penalty=_LENGTH_PENALTY.value,
        watch=functools.partial(tqdm, desc=f"{name}, beams {beams}"),
      )
      written = [text["text"] for text in texts], [text["references"] for text in texts]
      score = text_scores.bleu(*written) | text_scores.chrf(*written)
      results[name][f"beams {beams}"] = score | {"seconds": time.perf_counter() - started}
      figures = f"BLEU {score['bleu']:.2f}, chrF {score['chrf']:.2f}"
      print(f"{name:8} {figures} of {score['texts']} texts, beams {beams}")
      keep(run, results, texts, f"{name}_beams{beams}")
  print(outputs.as_json(results))


def keep(run: workdir.Workdir | None, results, texts=(), name: str = ""):
  """Writes what is known by now into the workdir, if there is one."""
  if not run:
    return
  workdir.write_json(run.path / f"eval_{results['split']}.json", results)
  if texts:
    lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
    file = run.path / "generated" / f"{results['split']}_{name}.jsonl"
    workdir.write_text(file, "".join(lines))


if __name__ == "__main__":
  programs.run(main)
