r"""Trains an adapter: config, data, model, adapters, optimiser, restore, evaluate, loop, evaluate.

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
import json

import grain
import jax
from absl import app, flags, logging
from ml_collections import config_flags

import lora_jax
from experiments import methods, parts, processes, samples, sweep, sweep_config, teachers
from lora_jax import exchange, sharding
from lora_jax.data import batches, packing
from lora_jax.data.examples import choice_ids
from lora_jax.models import llama
from lora_jax.train import evaluation, loop, progress, report, step, workdir
from lora_jax.train.checkpoint import Checkpoints

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells each file that it writes
  processes.join()
  with processes.open_workdir(_WORKDIR.value, _CONFIG.value.to_dict()) as run:
    try:
      with loop.interruptible():
        program = sweep.train if sweep_config.is_sweep(_CONFIG.value) else train
        program(_CONFIG.value, run)
    except loop.Interrupted as stopped:  # asked for, and saved: no error
      print(stopped)


def train(config, run):
  """Runs one config in its workdir."""
  # The adapter's settings and the data are checked before the model is loaded, and the targets
  # before anything is computed.
  parts.check_numbers(config)
  mesh = sharding.make_mesh(**config.mesh)
  own_rows = parts.process_rows(config, mesh)
  rules = methods.rules_of(config.adapter)
  teachers.check(config)
  methods.merge_format(config)
  tx, learning_rate = methods.make_optimizer(config)
  quiet = not processes.is_first()
  with progress.stage("read the data", disable=quiet):
    records = parts.load_records(config.data)
  train_records = parts.pick(records, "train", "data.train")
  held_out_records = parts.pick(records, config.evaluation.split, "evaluation.split")
  if config.train.evaluate_every:
    validation_records = parts.pick(records, "validation", "train.evaluate_every")
  pretrained = parts.load_model(config.model, mesh)
  encode = functools.partial(parts.encode, config.data, tokenizer=pretrained.tokenizer)
  with progress.stage("tokenise", disable=quiet):
    train_examples = encode(train_records)
    held_out = encode(held_out_records)[: config.evaluation.examples or None]
  choices = choice_ids(pretrained.tokenizer, config.data.choices)
  print(f"data: {len(train_examples):,} to train on, {len(held_out):,} held out")

  model = llama.Llama(pretrained.config)
  axes = parts.trace_axes(model, pretrained.params)
  specs = lora_jax.match(pretrained.params, rules, axes)
  table = lora_jax.summary(pretrained.params, specs, axes)
  print(table)

  shapes = {"buckets": config.data.buckets, "pad_id": pretrained.tokenizer.pad_id}
  train_batches = functools.partial(
    batches.train_batches, train_examples, config.train.batch_size, seed=config.seed, **shapes
  )
  if config.data.packed_length:
    train_batches = functools.partial(
      packing.packed_batches, train_examples, config.train.batch_size, seed=config.seed,
      length=config.data.packed_length, pad_id=pretrained.tokenizer.pad_id,
    )  # fmt: skip
  eval_batches = functools.partial(
    batches.eval_batches, batch_size=config.evaluation.batch_size, **shapes, **own_rows
  )
  put_rows = functools.partial(sharding.put_rows, mesh=mesh)
  # Made, and put on the devices, by another thread some steps ahead.
  train_data = iter(
    train_batches(**own_rows)
    .map(put_rows)
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )
  eval_data = eval_batches(held_out).map(put_rows)
  validation_data = None
  if config.train.evaluate_every:
    validation_data = eval_batches(encode(validation_records)).map(put_rows)

  with progress.stage("start the adapters", disable=quiet):
    base, adapters = methods.start(
      config.adapter, jax.random.key(config.seed), pretrained.params, specs, axes, model.apply,
      train_batches(),
    )  # fmt: skip
  exchange.check(adapters, base, axes)  # that the run can end with an adapter/
  weights = lora_jax.attach(base, adapters)
  layout = parts.lay_out(weights, mesh)
  if mesh.size > 1:
    print(layout)
  weights = jax.device_put(weights, layout.shardings)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  state = step.init_state(trainable, tx)
  state_shardings = layout.follow(state)
  state = jax.device_put(state, state_shardings)
  apply = methods.make_apply(config, model, pretrained.params, axes)
  teacher = teachers.load(config, pretrained, mesh)
  train_step = methods.make_train_step(config, apply, tx, adapters, state_shardings, teacher)
  eval_step = evaluation.make_eval_step(apply, choices, config.train.loss_chunk)
  watched = functools.partial(progress.watched, compiled=set(), disable=quiet)
  chosen = samples.choose(held_out, config.evaluation.samples)
  answer = samples.make_answer(apply, pretrained, chosen, mesh) if chosen else lambda weights: []

  def write_report():
    if processes.is_first():
      report.write_report(run, targets=str(table), command=processes.command())

  with Checkpoints(
    run.checkpoints, keep=config.train.keep, fingerprint=workdir.fingerprint(config.to_dict())
  ) as checkpoints:
    restored = checkpoints.restore(state)
    if restored:
      state = restored.state
      train_data.set_state(restored.data_state)
      print(f"restored: step {int(state.step)} of {config.train.steps}")

    if processes.agree(run.evaluation.exists()):
      results = json.loads(run.evaluation.read_text())
    else:
      results = {
        "split": config.evaluation.split,
        "before": evaluation.evaluate(eval_step, weights, watched(eval_data, "evaluate")),
        "samples": samples.describe(chosen, pretrained.tokenizer),
      }
      with progress.stage("answer", disable=quiet):
        samples.add(results["samples"], "before", answer(weights))
      if processes.is_first():
        workdir.write_json(run.evaluation, results)
    print(f"before: {parts.describe(results['before'])}")
    adapted = list(adapters)
    del weights, trainable, adapters  # what trains is in the state, and would be in memory twice

    with (
      processes.metrics_writer(run, step=int(state.step)) as writer,
      progress.Progress(start=int(state.step), total=config.train.steps, disable=quiet) as bar,
    ):
      write_report()
      try:
        state = loop.fit(
          state,
          frozen,
          train_step,
          train_data,
          steps=config.train.steps,
          learning_rate=learning_rate,
          log_every=config.train.log_every,
          checkpoint_every=config.train.checkpoint_every,
          evaluate_every=config.train.evaluate_every,
          evaluate=lambda weights: evaluation.evaluate(
            eval_step, weights, watched(validation_data, "validate", leave=False)
          ),
          checkpoints=checkpoints,
          writer=writer,
          progress=bar,
        )
      except (loop.Interrupted, FloatingPointError):
        write_report()
        raise

  weights = lora_jax.join(state.trainable, frozen)
  with progress.stage("save the adapter", disable=quiet), workdir.writing(run.adapter):
    trained, saved = parts.gather(lora_jax.detach(weights, adapted), base)
    if processes.is_first():
      exchange.save(run.adapter, trained, saved, axes, base_model=methods.base_name(config))
  results["after"] = evaluation.evaluate(eval_step, weights, watched(eval_data, "evaluate"))
  with progress.stage("answer", disable=quiet):
    samples.add(results["samples"], "after", answer(weights))
  if processes.is_first():
    workdir.write_json(run.evaluation, results)
  write_report()
  print(f"after:  {parts.describe(results['after'])}")
  print(f"everything is in {run.path}: README.md tells of it, adapter/ is what was trained")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
