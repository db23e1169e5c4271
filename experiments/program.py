"""The program of a run: what trains, by which step, and what it writes.

    program = start(case)                # of one adapter; experiments.sweep has another, of several

`experiments.train` knows of both no more than `Program` says.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import grain
import jax
from ml_collections import ConfigDict

import lora_jax
from experiments import methods, parts, processes, samples, teachers
from experiments.preparation import Case
from lora_jax import exchange
from lora_jax.run import progress, report, workdir
from lora_jax.train import step

PyTree = Any
Results = dict[str, Any]
"""The content of eval.json."""


class Measure(NamedTuple):
  """How weights are measured.

  Attributes:
    evaluate: (weights, batches, what the bar of progress says) to figures.
    show: weights to what the model makes of each chosen example.
  """

  evaluate: Callable[..., dict[str, float]]
  show: Callable[[PyTree], list[str]]

  def add(self, results: Results, when: str, weights: PyTree, case: Case, of: str = "") -> None:
    """Adds the figures and what is shown of weights to results, as `before` or `after`.

    of: what the progress says of whose weights they are, as "member 3".
    """
    results[when] = self.evaluate(weights, case.eval_data, f"evaluate {of}" if of else "evaluate")
    with progress.stage(f"answer as {of}" if of else "answer", disable=case.quiet):
      samples.add(results["samples"], when, self.show(weights))


class Program(NamedTuple):
  """The program that `experiments.train` runs.

  Attributes:
    state: before the first step, as checkpoints hold it.
    frozen: what no step changes.
    apply: the adapted model.
    train_step, steps, log_at, learning_rate: as `lora_jax.train.loop.fit` takes them.
    data: the batches, at the first one.
    weights: (state, frozen) to whole weights. A sweep, whose members start alike, gives those of
      its first member.
    validate: (measure, state, frozen) to figures.
    write_report: writes the page as the run stands.
    finish: (measure, state, frozen, results before) writes what was trained and how good it is.
  """

  state: Any
  frozen: Any
  apply: Callable
  train_step: Callable
  steps: int
  log_at: Collection[int]
  learning_rate: Callable
  data: grain.DatasetIterator
  weights: Callable[[Any, Any], PyTree]
  validate: Callable[[Measure, Any, Any], dict[str, Any]]
  write_report: Callable[[], None]
  finish: Callable[[Measure, Any, Any, Results], None]


def start(case: Case, run: workdir.Workdir) -> Program:
  """One adapter on its base, at the start."""
  config, [specs] = case.config, case.specs
  tx, learning_rate = methods.make_optimizer(config)
  with progress.stage("start the adapters", disable=case.quiet):
    base, adapters = methods.start(
      config.adapter,
      jax.random.key(config.seed),
      case.base.params,
      specs,
      case.axes,
      case.task.run(case.forward),
      case.task.mask,
      case.train_batches(config.seed),
    )
  exchange.check(adapters, base, case.axes, table=case.table)  # that it can end with an adapter/
  weights = lora_jax.attach(base, adapters)
  layout = parts.lay_out(weights, case.base.config, case.mesh)
  if case.mesh.size > 1:
    print(layout)
  weights = jax.device_put(weights, layout.shardings)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  state = step.init_state(trainable, tx)
  state_shardings = layout.follow(state)
  state = jax.device_put(state, state_shardings)
  apply = methods.make_apply(config, case.forward, case.base.params, case.axes)
  teacher = teachers.load(config, case.base, case.task, case.mesh)
  adapted = list(adapters)

  def validate(measure: Measure, state: step.State, frozen: PyTree) -> dict[str, float]:
    weights = lora_jax.join(state.trainable, frozen)
    return measure.evaluate(weights, case.validation_data, "validate", leave=False)

  def write_report() -> None:
    if processes.is_first():
      report.write_report(
        run,
        targets=case.tables[0],
        command=processes.command(),
        lines=case.task.lines,
        unit=case.task.UNIT,
        how=case.how,
      )

  def finish(measure: Measure, state: step.State, frozen: PyTree, results: Results) -> None:
    weights = lora_jax.join(state.trainable, frozen)
    with progress.stage("save the adapter", disable=case.quiet), workdir.writing(run.adapter):
      save(case, config, run, lora_jax.detach(weights, adapted), base)
    measure.add(results, "after", weights, case)
    if processes.is_first():
      workdir.write_json(run.evaluation, results)
      samples.draw(case, results["samples"], run)
    write_report()
    print(f"after:  {case.task.line(results['after'])}")
    print(f"everything is in {run.path}: README.md tells of it, adapter/ is what was trained")

  return Program(
    state=state,
    frozen=frozen,
    apply=apply,
    train_step=methods.make_train_step(
      config, case.task, apply, tx, adapters, state_shardings, teacher
    ),
    steps=config.train.steps,
    log_at=(),
    learning_rate=learning_rate,
    data=case.iterate(case.train_batches(config.seed, **case.own_rows)),
    weights=lambda state, frozen: lora_jax.join(state.trainable, frozen),
    validate=validate,
    write_report=write_report,
    finish=finish,
  )


def save(
  case: Case,
  config: ConfigDict,
  folder: workdir.Workdir,
  adapters: Mapping[str, lora_jax.Adapted],
  base: PyTree,
) -> None:
  """Writes adapters into a folder; all processes must call it, and the first one writes."""
  trained, saved = parts.gather(adapters, base)
  if processes.is_first():
    name = methods.base_name(config)
    exchange.save(
      folder.adapter,
      trained,
      saved,
      case.axes,
      base_model=name,
      table=case.table,
      task_type=case.base.peft_task,
    )
