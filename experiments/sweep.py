"""Trains many adapters at once on one base: what experiments.train does with a config's `sweep`.

    python -m experiments.train --config=configs/quickstart.py:sweep --workdir=runs/sweep
    python -m experiments.evaluate --workdir=runs/sweep/members/3

Each member is the config with some of its fields changed, and becomes what `experiments.train`
makes of that config alone, to rounding. All of them are one compiled program, one run that can be
stopped and goes on, and one table:

    runs/sweep/
      results.md, results.json      a row for each member
      loss.png, metrics.jsonl       loss/0, loss/1, ... of the members
      checkpoints/                  of all members together
      members/0/                    what a run of its own leaves, but for checkpoints
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import lora_jax
from experiments import methods, parts, processes, samples, sweep_config, sweep_results
from lora_jax import exchange, sharding, tables
from lora_jax.data import batches, packing
from lora_jax.data.examples import choice_ids
from lora_jax.models import llama
from lora_jax.train import evaluation, loop, members, metrics, progress, report, workdir
from lora_jax.train.checkpoint import Checkpoints

PyTree = Any


def train(config: ConfigDict, run: workdir.Workdir) -> None:
  """Runs a config's sweep in its workdir."""
  # Everything that can be wrong with a member is found before the model is loaded, or, where it is
  # a matter of the model's shapes, before anything is computed.
  fields = sweep_config.list_members(config)
  configs = sweep_config.member_configs(config, fields)
  for each in configs:
    parts.check_numbers(each)
  mesh = sharding.make_mesh(**config.mesh)
  own_rows = parts.process_rows(config, mesh)
  check_shapes_of_batches(config)
  quiet = not processes.is_first()
  rules = [methods.rules_of(each.adapter) for each in configs]
  rates = [methods.make_optimizer(each)[1] for each in configs]
  with progress.stage("read the data", disable=quiet):
    records = parts.load_records(config.data)
  train_records = parts.pick(records, "train", "data.train")
  held_out_records = parts.pick(records, config.evaluation.split, "evaluation.split")
  pretrained = parts.load_model(config.model, mesh)
  encode = functools.partial(parts.encode, config.data, tokenizer=pretrained.tokenizer)
  with progress.stage("tokenise", disable=quiet):
    train_examples = encode(train_records)
    held_out = encode(held_out_records)[: config.evaluation.examples or None]
  choices = choice_ids(pretrained.tokenizer, config.data.choices)
  print(f"data: {len(train_examples):,} to train on, {len(held_out):,} held out")

  model = llama.Llama(pretrained.config)
  axes = parts.trace_axes(model, pretrained.params)
  specs = [lora_jax.match(pretrained.params, each, axes) for each in rules]
  check_starts(pretrained.params, specs, axes)
  targets = [lora_jax.summary(pretrained.params, each, axes) for each in specs]
  print(f"{targets[0]}\n{len(configs)} members, of which this is the first:")
  print("\n".join(f"  {n}: {sweep_config.label(each)}" for n, each in enumerate(fields)))

  shapes = {"buckets": config.data.buckets, "pad_id": pretrained.tokenizer.pad_id}

  def train_batches(seed: int, **rows: int) -> grain.MapDataset:
    size = config.train.batch_size
    if config.data.packed_length:
      return packing.packed_batches(
        train_examples, size, seed=seed, length=config.data.packed_length,
        pad_id=pretrained.tokenizer.pad_id, **rows,
      )  # fmt: skip
    return batches.train_batches(train_examples, size, seed=seed, **shapes, **rows)

  train_data = iter(
    batches.stacked([train_batches(each.seed, **own_rows) for each in configs])
    .map(functools.partial(sharding.put_rows, mesh=mesh, axis=1))
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )
  eval_data = batches.eval_batches(
    held_out, batch_size=config.evaluation.batch_size, **shapes, **own_rows
  ).map(functools.partial(sharding.put_rows, mesh=mesh))

  with progress.stage("start the adapters", disable=quiet):
    starts = [
      methods.start(
        each.adapter, jax.random.key(each.seed), pretrained.params, spec, axes, model.apply,
        train_batches(each.seed),
      )[1]
      for each, spec in zip(configs, specs, strict=True)
    ]  # fmt: skip
  exchange.check(starts[0], pretrained.params, axes)  # that the run can end with adapters
  adapters = members.stack(starts)
  like = jax.eval_shape(lambda x: x, starts)
  del starts
  make_tx = functools.partial(methods.optimizer_at, configs[0])
  settings = make_settings(configs, rates, adapters)
  state, frozen = members.init(pretrained.params, adapters, settings, make_tx)
  del adapters  # what trains is in the state
  shardings = lay_out(state, frozen, mesh)
  state, frozen = jax.device_put((state, frozen), shardings)
  apply = lora_jax.adapt(model.apply)
  train_step = members.make_train_step(
    methods.make_objective(config, apply), make_tx,
    parts=config.train.accumulate, shardings=shardings[0],
  )  # fmt: skip
  eval_step = evaluation.make_eval_step(apply, choices, config.train.loss_chunk)
  watched = functools.partial(progress.watched, compiled=set(), disable=quiet)
  chosen = samples.choose(held_out, config.evaluation.samples)
  answer = samples.make_answer(apply, pretrained, chosen, mesh) if chosen else lambda weights: []

  with Checkpoints(
    run.checkpoints, keep=config.train.keep, fingerprint=workdir.fingerprint(config.to_dict())
  ) as checkpoints:
    start_weights = members.member_weights(state, frozen, 0)
    restored = checkpoints.restore(state)
    if restored:
      state = restored.state
      train_data.set_state(restored.data_state)
      print(f"restored: step {int(state.step)} of {settings.rates.shape[1]}")

    # Every method of a sweep starts as the base, so one member's start stands for all.
    if processes.agree(run.evaluation.exists()):
      common = json.loads(run.evaluation.read_text())
    else:
      common = {
        "split": config.evaluation.split,
        "before": evaluation.evaluate(eval_step, start_weights, watched(eval_data, "evaluate")),
        "samples": samples.describe(chosen, pretrained.tokenizer),
      }
      with progress.stage("answer", disable=quiet):
        samples.add(common["samples"], "before", answer(start_weights))
      if processes.is_first():
        workdir.write_json(run.evaluation, common)
    del start_weights
    print(f"before: {parts.describe(common['before'])}")

    steps = settings.rates.shape[1]
    with (
      processes.metrics_writer(run, step=int(state.step)) as writer,
      progress.Progress(start=int(state.step), total=steps, disable=quiet) as bar,
    ):
      state = loop.fit(
        state,
        frozen,
        train_step,
        train_data,
        steps=steps,
        learning_rate=lambda step: settings.rates[:, step],
        log_every=config.train.log_every,
        log_at={each.train.steps for each in configs},
        checkpoint_every=config.train.checkpoint_every,
        evaluate_every=0,
        evaluate=None,
        checkpoints=checkpoints,
        writer=writer,
        progress=bar,
      )

  rows, changed = [], sweep_config.settings(configs, fields)
  diverged, made = sharding.gather((state.diverged, state.states.step))
  for n, each in enumerate(configs):
    row = {"member": n, **changed[n], "updates": int(made[n])}
    if diverged[n]:
      rows.append(row | {"outcome": f"diverged at step {made[n] + 1}"})
      continue
    weights = members.member_weights(state, frozen, n)
    results = copy.deepcopy(common)
    results["after"] = evaluation.evaluate(
      eval_step, weights, watched(eval_data, f"evaluate member {n}")
    )
    with progress.stage(f"answer as member {n}", disable=quiet):
      samples.add(results["samples"], "after", answer(weights))
    rows.append(row | {"outcome": "finished", **results["after"]})
    with progress.stage(f"save member {n}", disable=quiet):
      trained, base = parts.gather(members.unstack(state, frozen, n, like[n]), pretrained.params)
      if processes.is_first():
        folder = workdir.Workdir(run.path / "members" / str(n))
        with workdir.writing(folder.path):
          folder.path.mkdir(parents=True, exist_ok=True)
          exchange.save(folder.adapter, trained, base, axes, base_model=config.model.source)
        lines = sweep_results.lines_of(metrics.read_metrics(run.metrics), each, n, len(configs))
        sweep_results.write_member(folder, each, results, lines)
        report.write_report(
          folder, targets=str(targets[n]), command=sweep_results.command_of(fields[n])
        )
  if processes.is_first():
    sweep_results.write_results(run, fields, common, rows)
  print(f"after, on {config.evaluation.split}:\n{sweep_results.format_rows(rows, tables.rendered)}")
  print(f"everything is in {run.path}: results.md is the table, members/ has a folder of each")


def check_shapes_of_batches(config: ConfigDict) -> None:
  """Raises ValueError when members' batches of one step may differ in shape."""
  if not config.data.packed_length and len(config.data.buckets) > 1:
    raise ValueError(
      f"data.buckets {tuple(config.data.buckets)}: members draw batches of their own, which must "
      f"have one length in one program; keep one, as ({config.data.buckets[-1]},), or set "
      "data.packed_length"
    )


def check_starts(
  params: PyTree, specs: Sequence[Mapping[str, Any]], axes: Mapping[str, lora_jax.Axes]
) -> None:
  """Raises ValueError, by shapes alone, when the members cannot start or be stacked."""

  def start(params: PyTree, spec: Mapping[str, Any]) -> dict[str, lora_jax.Adapted]:
    return lora_jax.init(jax.random.key(0), params, spec, axes)

  starts = [jax.eval_shape(functools.partial(start, spec=spec), params) for spec in specs]
  jax.eval_shape(members.stack, starts)


def make_settings(
  configs: Sequence[ConfigDict], rates: Sequence[Any], adapters: Mapping[str, lora_jax.Adapted]
) -> members.Settings:
  """What the program is told of each member."""
  longest = max(each.train.steps for each in configs)
  at_step = np.full((len(configs), longest), np.nan, np.float32)
  for n, each in enumerate(configs):
    at_step[n, : each.train.steps] = jax.vmap(rates[n])(jnp.arange(each.train.steps))
  drops = any(adapter.drops for adapter in adapters.values())
  return members.Settings(
    steps=jnp.array([each.train.steps for each in configs], jnp.int32),
    rates=jnp.asarray(at_step),
    dropout_keys=jnp.stack([jax.random.key(each.seed) for each in configs]) if drops else None,
  )


def lay_out(
  state: members.Members, frozen: members.Frozen, mesh: Mesh
) -> tuple[members.Members, members.Frozen]:
  """The sharding of every array: a member's arrays lie as those of a run of its own would."""
  first = jax.eval_shape(lambda *of: members.member_weights(*of, 0), state, frozen)
  layout = parts.lay_out(first, mesh)
  if mesh.size > 1:
    print(layout)
  whole = NamedSharding(mesh, jax.P())

  def behind_members(tree: PyTree) -> PyTree:
    one = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], tree))
    return jax.tree.map(
      lambda place: NamedSharding(mesh, jax.P(None, *place.spec)), layout.follow(one)
    )

  return (
    members.Members(whole, behind_members(state.states), whole),
    members.Frozen(
      jax.tree.map(lambda x: x.sharding, frozen.params),
      behind_members(frozen.adapters),
      jax.tree.map(lambda _: whole, frozen.settings),
    ),
  )
