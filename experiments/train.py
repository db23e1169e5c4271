r"""Trains an adapter: config, data, model, adapters, optimizer, restore, evaluate, loop, evaluate.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.train --config=configs/quickstart.py:method=dora --workdir=runs/dora \
        --config.adapter.rank=4

A config with several members, as configs/quickstart.py:sweep, trains them all in one program: see
experiments/sweep.py.

The same command run again goes on where it stopped, wherever that was; Ctrl-C and SIGTERM save.
The workdir then holds README.md, which tells of the run, config.json, metrics.jsonl, checkpoints/,
adapter/ (as `peft` loads it), eval.json, loss.png and tensorboard/.

config.mesh says how the run is laid out on the devices. On a cluster the same command, with
--distributed, is started once on each host (`experiments.processes`); two processes of one machine:

    python -m experiments.launch --processes=2 -- \
        experiments.train --config=configs/quickstart.py --workdir=runs/two
"""

import functools

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import (
  parts,
  preparation,
  processes,
  program,
  programs,
  samples,
  sweep,
  sweep_config,
)
from lora_jax.run import progress, report, workdir
from lora_jax.train import loop
from lora_jax.train.checkpoint import Checkpoints

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells each file that it writes
  processes.join()
  with processes.open_workdir(_WORKDIR.value, _CONFIG.value.to_dict()) as run:
    train(_CONFIG.value, run)


def train(config, run):
  """Runs one config, or the sweep that it asks for, in its workdir."""
  if sweep_config.is_sweep(config):
    fields = sweep_config.list_members(config)
    case = preparation.prepare(config, sweep_config.member_configs(config, fields), run)
    trained = sweep.start(case, run, fields)
  else:
    case = preparation.prepare(config, [config], run)
    print(case.tables[0])
    trained = program.start(case, run)
  eval_step = case.task.make_eval_step(trained.apply)
  measure = program.Measure(
    evaluate=functools.partial(case.evaluate, eval_step),
    show=samples.make_show(case, trained.apply),
  )
  state, frozen = trained.state, trained.frozen

  with Checkpoints(
    run.checkpoints,
    keep=config.train.max_to_keep,
    fingerprint=workdir.fingerprint(config.to_dict()),
  ) as checkpoints:
    weights = trained.weights(state, frozen)
    restored = checkpoints.restore(state)
    if restored:
      state = restored.state
      parts.go_on(trained.data, restored.data_state, checkpoints.path(int(state.step)))
      print(f"restored: step {int(state.step)} of {trained.steps}")
    results = measure_before(case, run, measure, weights)
    del weights
    trained = trained._replace(state=None)  # what trains would be in memory twice
    print(f"before: {case.task.line(results['before'])}")

    with (
      processes.metrics_writer(run, step=int(state.step)) as writer,
      progress.Progress(
        start=int(state.step), total=trained.steps, unit=case.task.UNIT, disable=case.quiet
      ) as bar,
    ):
      trained.write_report()
      try:
        state = loop.fit(
          state,
          frozen,
          trained.train_step,
          trained.data,
          steps=trained.steps,
          learning_rate=trained.learning_rate,
          log_every=config.train.log_every,
          log_at=trained.log_at,
          checkpoint_every=config.train.checkpoint_every,
          evaluate_every=case.evaluate_every,
          evaluate=functools.partial(trained.validate, measure),
          checkpoints=checkpoints,
          writer=writer,
          progress=bar,
          shape_of=case.task.shape_of,
          unit=case.task.UNIT,
        )
      except (loop.Interrupted, FloatingPointError):
        trained.write_report()
        raise
  trained.finish(measure, state, frozen, results)


def measure_before(case, run, measure, weights):
  """The content of eval.json before training: read if it exists, otherwise measured and written."""
  if processes.agree(run.evaluation.exists()):
    results = report.read_results(run.evaluation)
    samples.check(results["samples"], case.task.given(case.chosen))
    return results
  results = {
    "split": case.config.evaluation.split,
    "data": case.described,
    "before": None,  # the order is that of the file
    "samples": case.task.given(case.chosen),
  }
  measure.add(results, "before", weights, case)
  if processes.is_first():
    workdir.write_json(run.evaluation, results)
    samples.draw(case, results["samples"], run)
  return results


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  programs.run(main, resumes=True, several=processes.is_asked)
