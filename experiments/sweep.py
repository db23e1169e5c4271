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
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import lora_jax
from experiments import methods, parts, processes, samples
from lora_jax import exchange, sharding, tables
from lora_jax.data import batches, packing
from lora_jax.data.examples import choice_ids
from lora_jax.models import llama
from lora_jax.train import evaluation, loop, members, metrics, plot, progress, report, workdir
from lora_jax.train.checkpoint import Checkpoints

PyTree = Any
Fields = dict[str, Any]

FIELDS = (
  "seed", "adapter.rank", "adapter.alpha", "adapter.rslora", "optimizer.peak",
  "optimizer.schedule", "optimizer.warmup_steps", "train.steps",
)  # fmt: skip
"""What members may differ in; all else is one for the whole program."""


def is_sweep(config: ConfigDict) -> bool:
  """Whether a config asks for more than one run."""
  return bool(config.sweep.grid or config.sweep.members)


def train(config: ConfigDict, run: workdir.Workdir) -> None:
  """Runs a config's sweep in its workdir."""
  # Everything that can be wrong with a member is found before the model is loaded, or, where it is
  # a matter of the model's shapes, before anything is computed.
  fields = list_members(config)
  configs = member_configs(config, fields)
  mesh = sharding.make_mesh(**config.mesh)
  own_rows = parts.process_rows(config, mesh)
  check_shapes_of_batches(config)
  rules = [methods.rules_of(each.adapter) for each in configs]
  rates = [methods.make_optimizer(each)[1] for each in configs]
  records = parts.load_records(config.data)
  train_records = parts.pick(records, "train", "data.train")
  held_out_records = parts.pick(records, config.evaluation.split, "evaluation.split")
  pretrained = parts.load_model(config.model, mesh)
  encode = functools.partial(parts.encode, config.data, tokenizer=pretrained.tokenizer)
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
  print("\n".join(f"  {n}: {label(each)}" for n, each in enumerate(fields)))

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

  quiet = not processes.is_first()
  with progress.stage("start the adapters", disable=quiet):
    starts = [
      methods.start(
        each.adapter, jax.random.key(each.seed), pretrained.params, spec, axes, model.apply,
        train_batches(each.seed),
      )
      for each, spec in zip(configs, specs, strict=True)
    ]  # fmt: skip
  exchange.check(starts[0], pretrained.params, axes)  # that the run can end with adapters
  adapters = members.stack(starts)
  like = jax.eval_shape(lambda x: x, starts)
  del starts
  make_tx = functools.partial(methods.optimizer_at, configs[0])
  settings = make_settings(configs, rates, adapters)
  state, frozen = members.init(pretrained.params, adapters, settings, make_tx)
  shardings = lay_out(state, frozen, mesh)
  state, frozen = jax.device_put((state, frozen), shardings)
  apply = lora_jax.adapt(model.apply)
  train_step = members.make_train_step(
    methods.make_objective(config, apply), make_tx,
    parts=config.train.accumulate, shardings=shardings[0],
  )  # fmt: skip
  eval_step = evaluation.make_eval_step(apply, choices)
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
        checkpoint_every=config.train.checkpoint_every,
        evaluate_every=0,
        evaluate=None,
        checkpoints=checkpoints,
        writer=writer,
        progress=bar,
      )

  rows = []
  diverged, made = sharding.gather((state.diverged, state.states.step))
  for n, each in enumerate(configs):
    row = {"member": n, **fields[n], "steps": int(made[n])}
    if diverged[n]:
      rows.append(row | {"outcome": f"diverged at step {made[n] + 1}"})
      continue
    weights = members.member_weights(state, frozen, n)
    results = copy.deepcopy(common)
    results["after"] = evaluation.evaluate(
      eval_step, weights, watched(eval_data, f"evaluate member {n}")
    )
    samples.add(results["samples"], "after", answer(weights))
    rows.append(row | {"outcome": "finished", **results["after"]})
    trained, base = parts.gather(members.unstack(state, frozen, n, like[n]), pretrained.params)
    if processes.is_first():
      folder = workdir.Workdir(run.path / "members" / str(n))
      folder.path.mkdir(parents=True, exist_ok=True)
      exchange.save(folder.adapter, trained, base, axes, base_model=config.model.source)
      write_member(folder, each, results, lines_of(metrics.read_metrics(run.metrics), n))
      report.write_report(folder, targets=str(targets[n]), command=command_of(fields[n]))
  if processes.is_first():
    write_results(run, fields, common, rows)
  print(f"after, on {config.evaluation.split}:\n{format_rows(rows, tables.rendered)}")
  print(f"everything is in {run.path}: results.md is the table, members/ has a folder of each")


# ---- members


def list_members(config: ConfigDict) -> list[Fields]:
  """The fields that each member changes: every one of `sweep.members` with every point of the grid.

  Raises:
    ValueError: for an empty or repeated field or member, and a field that members cannot differ in.
  """
  section = config.sweep
  grid = [(name, tuple(values)) for name, values in section.grid]
  names = [name for name, _ in grid]
  for name, values in grid:
    if not values:
      raise ValueError(f"sweep.grid {name!r} has no values, so there is no member to train")
    if len(set(values)) < len(values) or names.count(name) > 1:
      raise ValueError(f"sweep.grid {name!r} is there twice, or has one value twice: {values}")
  found = []
  for own in section.members or ({},):
    both = sorted(set(own) & set(names))
    if both:
      raise ValueError(f"sweep.members and sweep.grid both set {', '.join(both)}; choose one")
    for point in itertools.product(*(values for _, values in grid)):
      found.append(dict(own) | dict(zip(names, point, strict=True)))
  for name in dict.fromkeys(name for each in found for name in each):
    if name not in FIELDS:
      raise ValueError(
        f"sweep: members cannot differ in {name!r}; one program has one base, one kind of batch "
        f"and one optimiser, and its members differ in {', '.join(FIELDS)}. Make it a run of its "
        "own"
      )
  repeated = [each for n, each in enumerate(found) if each in found[:n]]
  if repeated:
    raise ValueError(f"sweep: two members have the same fields, {repeated[0]}")
  return found


def member_configs(config: ConfigDict, fields: Sequence[Fields]) -> list[ConfigDict]:
  """The config of each member, as of a run of its own.

  Raises:
    ValueError: when a field is none of the config, or of another type; or the members' method or
      the config's other options cannot be in a sweep.
  """
  if config.train.evaluate_every:
    raise ValueError(
      f"train.evaluate_every {config.train.evaluate_every}: a sweep validates at its end alone; "
      "set it to 0"
    )
  found = []
  for n, each in enumerate(fields):
    member = config.copy_and_resolve_references().lock()  # no field is added
    member.sweep.grid, member.sweep.members = (), ()
    try:
      member.update_from_flattened_dict(each)
    except (KeyError, TypeError) as error:
      raise ValueError(f"sweep: member {n}, {each}: {error}") from None
    found.append(member)
  if config.adapter.method == "adalora" and len({each.train.steps for each in found}) > 1:
    raise ValueError(
      "sweep: AdaLoRA's budget of ranks follows train.steps, which is part of the program; its "
      "members must make as many steps"
    )
  return found


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


# ---- what came of it


def label(fields: Fields) -> str:
  """`peak 0.001, rank 4` of what a member changes."""
  return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in fields.items())


def lines_of(logged: Sequence[Mapping[str, float]], member: int) -> list[dict[str, float]]:
  """One member's lines of the log, as those of a run of its own."""
  end = f"/{member}"
  return [
    {"step": line["step"]}
    | {name.removesuffix(end): x for name, x in line.items() if name.endswith(end)}
    | {"tokens_per_second": line["tokens_per_second"]}
    for line in logged
    if f"loss{end}" in line
  ]


def write_member(
  folder: workdir.Workdir,
  config: ConfigDict,
  results: Mapping[str, Any],
  lines: Sequence[Mapping[str, float]],
) -> None:
  """Writes what a run has beside its adapter."""
  workdir.write_json(folder.config, config.to_dict())
  workdir.write_json(folder.evaluation, results)
  workdir.write_text(folder.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def command_of(fields: Fields) -> str:
  """What trains a member alone."""
  own = [f"--config.{name}={value}" for name, value in fields.items()]
  arguments = [each for each in sys.argv[1:] if not each.startswith("--workdir")]
  alone = ["--config.sweep.grid=()", "--config.sweep.members=()", *own, "--workdir=..."]
  return shlex.join(["python", "-m", "experiments.train", *arguments, *alone])


def format_rows(rows: Sequence[Mapping[str, Any]], render: Callable) -> str:
  """The table of all members, by `render(header, rows)`."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
  return render([name.rpartition(".")[2] for name in names], cells)


def write_results(
  run: workdir.Workdir,
  fields: Sequence[Fields],
  common: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
) -> None:
  """Writes the table, for people and for programs, and draws the members' losses."""
  page = [
    f"# {run.path.name}: {len(rows)} adapters, trained in one program",
    f"On {common['split']}, before: {parts.describe(common['before'])}. After:",
    format_rows(rows, tables.markdown),
  ]
  finished = [row for row in rows if row["outcome"] == "finished"]
  if finished:
    best = min(finished, key=lambda row: row["loss"])
    n = best["member"]
    page.append(f"The lowest loss is that of `members/{n}` ({label(fields[n])}).")
  page.append(f"![the losses over the steps]({run.plot.name})")
  workdir.write_text(run.path / "results.md", "\n\n".join(page) + "\n")
  workdir.write_json(run.path / "results.json", {"before": common["before"], "members": list(rows)})
  labels = [f"{n}: {label(each)}" for n, each in enumerate(fields)]
  plot.plot_members(metrics.read_metrics(run.metrics), labels, run.plot)


def _cell(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
