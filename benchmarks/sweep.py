r"""The gain of training many adapters in one program instead of one after another.

    python -m benchmarks.sweep --model=smollm2 --scan_layers --batch=2 --length=32
    python -m benchmarks.sweep --model=small --members=1,4 --ranks=2,8

For each number of members the same steps run in two forms: a step of every member in turn, by the
step that trains one, and one step of `lora_jax.train.members` for all. Members have different
seeds, the ranks of --ranks in turn, and the same batch. The rows take turns as in
`benchmarks.step`, and a ratio compares the two forms' times in one round, per member and step:
below 1, one program is faster.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import lora_jax
from benchmarks import rows
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import MODELS, Case
from benchmarks.reporting import define_output, publish
from benchmarks.turns import ratio, run_in_turns, timed
from lora_jax.train import members, step

PyTree = Any

FORMS = ("one after another", "one program")

_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "The model; see benchmarks.models.")
_MEMBERS = flags.DEFINE_list("members", ["1", "4", "8", "16"], "Member counts, two rows each.")
_RANKS = flags.DEFINE_list("ranks", ["8"], "The members' ranks, in turn.")
_BATCH = flags.DEFINE_integer("batch", 4, "Rows of a member's batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 32, "Tokens per row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 6, "Turns of each row.", lower_bound=2)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of base and computation.")
_SCAN = flags.DEFINE_bool("scan_layers", False, "One scanned block instead of one for each layer.")
_OUTPUT = define_output()

for _name in ("members", "ranks"):
  flags.register_validator(
    _name,
    lambda counts: counts and all(count.isdecimal() and int(count) for count in counts),
    f"--{_name} takes positive whole numbers, as in --{_name}=4,8",
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  counts = [int(count) for count in _MEMBERS.value]
  ranks = [int(rank) for rank in _RANKS.value]
  case = MODELS[_MODEL.value].make(
    jnp.dtype(_DTYPE.value), _BATCH.value, _LENGTH.value, _SCAN.value
  )
  table = make_rows(case, counts, ranks)
  check_rows(table)
  seconds = run_in_turns({label: timed(row.step) for label, row in table.items()}, _ROUNDS.value)
  size = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  title = (
    f"{_MODEL.value} ({size / 1e6:,.1f}M), {_BATCH.value} × {_LENGTH.value} a member, "
    f"{_DTYPE.value}, rank {', '.join(_RANKS.value)}"
  )
  report = "\n".join([
    f"## Many adapters in one program: {title}",
    "",
    *describe_circumstances("benchmarks.sweep", ["jax", "flax", "optax"]),
    f"- {_ROUNDS.value} rounds. / alone: a member's step in one program relative to the plain step,"
    " the median over the rounds, with quartiles. Temporary memory: that of the compiled step"
    " beyond its arguments and results. Compile: all programs of the row, once.",
    "",
    format_table(table, seconds),
  ])  # fmt: skip
  publish(report, _OUTPUT.value)


@dataclasses.dataclass
class Row:
  """One form of training some members.

  Attributes:
    count: the number of members.
    compile: seconds to trace and compile the row's programs.
    temporary: the temporary memory of its largest program, in bytes.
    step: takes a step of every member; returns their losses [count].
  """

  count: int
  compile: float
  temporary: int
  step: Callable[[], np.ndarray]


def make_rows(
  case: Case, counts: Sequence[int], ranks: Sequence[int]
) -> dict[tuple[str, int], Row]:
  """`{(form, count): row}`, compiled."""
  axes = rows.trace_axes(case)
  apply = lora_jax.adapt(case.module.apply)
  batch = {"inputs": case.inputs, "targets": case.targets}

  def objective(weights, batch):
    outputs = apply({"params": weights}, batch["inputs"])
    return case.loss(outputs, batch["targets"]), jnp.float32(batch["inputs"].size)

  def start(n: int) -> rows.Adapters:
    spec = lora_jax.LoRA(rank=ranks[n % len(ranks)], alpha=rows.ALPHA)
    specs = lora_jax.match(case.params, [("all-linear", spec)], axes)
    return lora_jax.init(jax.random.key(n), case.params, specs, axes)

  starts = [start(n) for n in range(max(counts))]
  alone: dict = {}
  table = {}
  for count in counts:
    of = case.params, objective, starts[:count], batch
    table[FORMS[0], count] = one_after_another(*of, programs=alone)
    table[FORMS[1], count] = one_program(*of)
  return table


def make_tx(learning_rate: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(learning_rate, weight_decay=rows.WEIGHT_DECAY)


def one_after_another(
  params: PyTree,
  objective: step.Objective,
  starts: Sequence[rows.Adapters],
  batch: PyTree,
  programs: dict[tuple, tuple[Any, float]],
) -> Row:
  """Every member by the step that trains one; members of equal rank share a program.

  `programs` maps shapes to compiled steps and the seconds that compiling took; new ones are added.
  """
  tx = make_tx(optax.constant_schedule(rows.LEARNING_RATE))
  train_step = step.make_train_step(objective, tx)
  states, own = [], set()
  for adapters in starts:
    weights = lora_jax.attach(params, adapters)
    trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
    state = step.init_state(trainable, tx)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(state))
    if shapes not in programs:
      jax.clear_caches()
      started = time.perf_counter()
      compiled = train_step.lower(state, frozen, batch).compile()
      programs[shapes] = compiled, time.perf_counter() - started
    own.add(shapes)
    states.append([programs[shapes][0], state, frozen])

  def run() -> np.ndarray:
    losses = []
    for each in states:
      program, state, frozen = each
      each[1], metrics = program(state, frozen, batch)
      losses.append(metrics["loss"])
    jax.block_until_ready([state for _, state, _ in states])
    return np.array(losses)

  return Row(
    len(starts),
    sum(programs[shapes][1] for shapes in own),
    max(programs[shapes][0].memory_analysis().temp_size_in_bytes for shapes in own),
    run,
  )


def one_program(
  params: PyTree, objective: step.Objective, starts: Sequence[rows.Adapters], batch: PyTree
) -> Row:
  """All members by one step."""
  jax.clear_caches()
  count = len(starts)
  steps = 1_000_000  # more than will be taken
  settings = members.Settings(
    steps=jnp.full(count, steps, jnp.int32),
    rates=jnp.full((count, 1), rows.LEARNING_RATE),
    dropout_keys=None,
  )
  state, frozen = members.init(params, members.stack(starts), settings, make_tx)
  batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), batch)
  train_step = members.make_train_step(objective, make_tx)
  started = time.perf_counter()
  compiled = train_step.lower(state, frozen, batches).compile()
  compiling = time.perf_counter() - started
  held = [state]

  def run() -> np.ndarray:
    held[0], metrics = compiled(held[0], frozen, batches)
    jax.block_until_ready(held[0])
    return np.array(metrics["loss"])

  return Row(count, compiling, compiled.memory_analysis().temp_size_in_bytes, run)


def check_rows(table: Mapping[tuple[str, int], Row]) -> None:
  """Takes two steps of each row, which are not timed.

  Raises:
    RuntimeError: if the two forms' losses differ, so that the times would be meaningless.
  """
  losses = {label: np.stack([row.step(), row.step()]) for label, row in table.items()}
  for count in {count for _, count in table}:
    alone, together = (losses[form, count] for form in FORMS)
    error = np.max(np.abs(alone - together) / np.abs(alone))
    if not error < 0.01:
      raise RuntimeError(f"{count} members: the losses of the two forms differ by {error:.2%}")


def format_table(
  table: Mapping[tuple[str, int], Row], seconds: Mapping[tuple[str, int], Sequence[float]]
) -> str:
  """The table in Markdown."""
  lines = [
    "| members | form | a step of all, ms | a member's step, ms | / alone | compile, s "
    "| temporary, MB |",
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  for (form, count), own in seconds.items():
    ms = 1e3 * statistics.median(own)
    alone = ratio(own, seconds[FORMS[0], count])
    row = table[form, count]
    lines.append(
      f"| {count} | {form} | {ms:,.1f} | {ms / count:,.1f} | {alone} "
      f"| {row.compile:.1f} | {row.temporary / 1e6:,.1f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  flags.mark_flag_as_required("model")
  app.run(main)
