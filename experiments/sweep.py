"""Trains many adapters at once on one base: what experiments.train does with a config's `sweep`.

    python -m experiments.train --config=configs/quickstart.py:sweep --workdir=runs/sweep
    python -m experiments.evaluate --workdir=runs/sweep/members/3

Each member is the config with some of its fields changed. Up to rounding, its result is that of
`experiments.train` with that config alone. All members are one compiled program, one resumable run,
and one table:

    runs/sweep/
      results.md, results.json      a row for each member
      loss.png, metrics.jsonl       loss/0, loss/1, ... of the members
      checkpoints/                  of all members together
      members/0/                    what a run of its own leaves, but for checkpoints
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import lora_jax
from experiments import methods, parts, processes, program, samples, sweep_config, sweep_results
from experiments.preparation import Case
from lora_jax import exchange, families, sharding, tables, tree
from lora_jax.data import batches
from lora_jax.run import metrics, progress, report, workdir
from lora_jax.train import members
from lora_jax.weights import is_weight

PyTree = Any


def start(
  case: Case, run: workdir.Workdir, fields: Sequence[sweep_config.Fields]
) -> program.Program:
  """The members on their base, at the start; `fields` are those that each of them changes."""
  configs, base = case.configs, case.base
  check_starts(base.params, case.specs, case.axes)
  print(f"{case.tables[0]}\n{len(configs)} members; the table shows the first:")
  print("\n".join(f"  {n}: {sweep_config.label(each)}" for n, each in enumerate(fields)))
  with progress.stage("start the adapters", disable=case.quiet):
    starts = [
      methods.start(
        each.adapter,
        jax.random.key(each.seed),
        base.params,
        specs,
        case.axes,
        case.task.run(case.forward),
        case.task.mask,
        case.train_batches(each.seed),
      )[1]
      for each, specs in zip(configs, case.specs, strict=True)
    ]
    starts = [with_own_start(case, *each) for each in zip(configs, starts, strict=True)]
  exchange.check(starts[0], base.params, case.axes, table=case.table)  # that the run can end so
  adapters = members.stack(starts)
  like = jax.eval_shape(lambda x: x, starts)
  del starts
  make_tx = functools.partial(methods.optimizer_at, configs[0])
  settings = make_settings(configs, case.learning_rates, adapters)
  state, frozen = members.init(base.params, adapters, settings, make_tx)
  del adapters  # what trains is in the state
  shardings = lay_out(state, frozen, base.config, case.mesh)
  state, frozen = jax.device_put((state, frozen), shardings)
  apply = lora_jax.adapt(case.forward)
  each_data = [case.train_batches(each.seed, **case.own_rows) for each in configs]

  def validate(
    measure: program.Measure, state: members.Members, frozen: members.Frozen
  ) -> dict[str, np.ndarray]:
    """The metrics of the members that made the last step; NaN for the others."""
    steps, made = sharding.gather((state.step, state.states.step))
    found = {}
    for n in np.flatnonzero(made == steps):
      weights = members.member_weights(state, frozen, n)
      what = f"validate member {n}"
      scores = measure.evaluate(weights, case.validation_data, what, leave=False)
      for name, score in scores.items():
        found.setdefault(name, np.full(len(configs), np.nan))[n] = score
    return found

  def finish(
    measure: program.Measure,
    state: members.Members,
    frozen: members.Frozen,
    common: program.Results,
  ) -> None:
    rows, changed = [], sweep_config.settings(configs, fields)
    diverged, made = sharding.gather((state.diverged, state.states.step))
    for n, each in enumerate(configs):
      row = {"member": n, **changed[n], "updates": int(made[n])}
      if diverged[n]:
        rows.append(row | {"outcome": f"diverged at step {made[n] + 1}"})
        continue
      weights, results = members.member_weights(state, frozen, n), copy.deepcopy(common)
      measure.add(results, "after", weights, case, of=f"member {n}")
      rows.append(row | {"outcome": "finished", **results["after"]})
      folder = workdir.Workdir(run.path / "members" / str(n))
      with progress.stage(f"save member {n}", disable=case.quiet):
        if processes.is_first():
          with workdir.writing(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        with workdir.writing(folder.path):
          adapters = members.unstack(state, frozen, n, like[n])
          program.save(case, each, folder, adapters, base.params)
        if processes.is_first():
          lines = sweep_results.lines_of(metrics.read_metrics(run.metrics), each, n, len(configs))
          sweep_results.write_member(folder, each, results, lines)
          command = sweep_results.command_of(fields[n])
          samples.draw(case, results["samples"], folder)
          report.write_report(
            folder,
            targets=case.tables[n],
            command=command,
            lines=case.task.lines,
            unit=case.task.UNIT,
            how=case.how,
          )
    if processes.is_first():
      sweep_results.write_results(run, fields, common, rows, case.task)
    table = sweep_results.format_rows(rows, tables.rendered)
    print(f"after, on {case.config.evaluation.split}:\n{table}")
    print(f"everything is in {run.path}: results.md is the table, members/ has a folder of each")

  return program.Program(
    state=state,
    frozen=frozen,
    apply=apply,
    train_step=members.make_train_step(
      methods.make_objective(case.config, case.task, apply),
      make_tx,
      parts=case.config.train.accumulate,
      shardings=shardings[0],
      in_turn=members.in_turn(case.axes),
    ),
    steps=settings.rates.shape[1],
    log_at={each.train.steps for each in configs},
    learning_rate=lambda step: settings.rates[:, step],
    data=case.iterate(batches.stacked(each_data), axis=1),
    weights=lambda state, frozen: members.member_weights(state, frozen, 0),
    validate=validate,
    write_report=lambda: None,  # there is one for each member, at the end
    finish=finish,
  )


def with_own_start(
  case: Case, config: ConfigDict, adapters: Mapping[str, lora_jax.Adapted]
) -> dict[str, lora_jax.Adapted]:
  """The adapters of a member with the leaves that the task adds as its own seed starts them; in the
  base, which all members share, they are those of the run's."""
  own = tree.flatten(parts.extend(case.loaded, case.task, config).params, is_leaf=is_weight)
  shared = tree.flatten(case.base.params, is_leaf=is_weight)
  return {
    path: dataclasses.replace(x, dw=x.dw + (own[path] - shared[path]))
    if own[path] is not shared[path]
    else x
    for path, x in adapters.items()
  }


def check_starts(
  params: PyTree, specs: Sequence[Mapping[str, Any]], axes: Mapping[str, lora_jax.Axes]
) -> None:
  """Raises ValueError, by shapes alone, when the members cannot start or be stacked."""
  starts = [methods.init_shapes(params, spec, axes) for spec in specs]
  jax.eval_shape(members.stack, starts)


def make_settings(
  configs: Sequence[ConfigDict], rates: Sequence[Any], adapters: Mapping[str, lora_jax.Adapted]
) -> members.Settings:
  """The settings of each member in the program."""
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
  state: members.Members, frozen: members.Frozen, config: families.Config, mesh: Mesh
) -> tuple[members.Members, members.Frozen]:
  """The sharding of every array: a member's arrays lie as those of a run of its own would."""
  first = jax.eval_shape(lambda *of: members.member_weights(*of, 0), state, frozen)
  layout = parts.lay_out(first, config, mesh)
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
