r"""The cost of giving every row of a batch its own adapter.

    python -m benchmarks.batched_adapters --model=smollm2 --scan_layers
    python -m benchmarks.batched_adapters --model=small --adapters=8,64 --length=1

Measures a forward pass of the base, of one adapter for all rows, and of --adapters adapters dealt
out to the rows, by `lora_jax.gate` and by `lora_jax.select`. The rows of the table take turns as in
`benchmarks.step`, and every ratio is taken within a round.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import lora_jax
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import MODELS, Case
from benchmarks.reporting import define_output, publish
from benchmarks.rows import make_adapters, trained
from benchmarks.turns import ratio, run_in_turns, timed

PyTree = Any
Run = Callable[[], jax.Array]

BASE, ONE = "base alone", "one adapter"
PICKERS = {"gate": lora_jax.gate, "select": lora_jax.select}

_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "The model to run; see benchmarks.models.")
_ADAPTERS = flags.DEFINE_list("adapters", ["8"], "Adapter counts; each has its own rows.")
_RANK = flags.DEFINE_integer("rank", 8, "The rank of every adapter.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Rows per batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 32, "Tokens per row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each row.", lower_bound=2)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of base and computation.")
_SCAN = flags.DEFINE_bool("scan_layers", False, "One scanned block instead of one for each layer.")
_OUTPUT = define_output()

flags.register_validator(
  "adapters",
  lambda counts: counts and all(count.isdecimal() and int(count) for count in counts),
  "--adapters takes positive whole numbers, as in --adapters=8,64",
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  case = MODELS[_MODEL.value].make(
    jnp.dtype(_DTYPE.value), _BATCH.value, _LENGTH.value, _SCAN.value
  )
  table, temporary = make_rows(case, [int(count) for count in _ADAPTERS.value], _RANK.value)
  check_rows(table)
  seconds = run_in_turns({label: timed(run) for label, run in table.items()}, _ROUNDS.value)
  size = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  title = (
    f"{_MODEL.value} ({size / 1e6:,.1f}M), {_BATCH.value} × {_LENGTH.value}, {_DTYPE.value}, "
    f"rank {_RANK.value}"
  )
  report = "\n".join([
    f"## A forward pass with an adapter for each row: {title}",
    "",
    *describe_circumstances("benchmarks.batched_adapters", ["jax", "flax"]),
    f"- {_ROUNDS.value} rounds. Ratios: medians over the rounds, with quartiles. Temporary memory: "
    "memory of the compiled program beyond its arguments and results.",
    "",
    format_table(seconds, temporary),
  ])  # fmt: skip
  publish(report, _OUTPUT.value)


def make_rows(
  case: Case, counts: Sequence[int], rank: int
) -> tuple[dict[str, Run], dict[str, int]]:
  """`{row: the function to time}` and `{row: temporary bytes}`, compiled."""
  fresh = make_adapters(case, rank)
  adapters = [trained(fresh, seed) for seed in range(max(counts))]
  table, temporary = {}, {}

  def add(label: str, f: Callable, *args: PyTree) -> None:
    compiled = jax.jit(f).lower(case.params, *args, case.inputs).compile()
    temporary[label] = compiled.memory_analysis().temp_size_in_bytes
    table[label] = functools.partial(compiled, case.params, *args, case.inputs)

  apply = lora_jax.adapt(case.module.apply, strict=True)

  def base(params, inputs):
    return case.module.apply({"params": params}, inputs)

  def one(params, adapters, inputs):
    return apply({"params": lora_jax.attach(params, adapters)}, inputs)

  def each(params, stacked, slots, inputs, *, pick):
    def row(slot, x):
      weights = lora_jax.attach(params, pick(stacked, slot))
      return apply({"params": weights}, x[None])[0]

    return jax.vmap(row)(slots, inputs)

  add(BASE, base)
  add(ONE, one, adapters[0])
  for count in counts:
    stacked = lora_jax.stack(adapters[:count])
    slots = jnp.arange(len(case.inputs)) % count
    for name, pick in PICKERS.items():
      add(f"{count} adapters, {name}", functools.partial(each, pick=pick), stacked, slots)
  return table, temporary


def check_rows(table: Mapping[str, Run]) -> None:
  """Checks that the first row, which has the same adapter in every case, has the same result.

  Raises:
    RuntimeError: if it has not, so that the times would be meaningless.
  """
  expected = table[ONE]()[0].astype(jnp.float32)
  for label, run in table.items():
    found = run()[0].astype(jnp.float32)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    if label != BASE and error > 0.05:
      raise RuntimeError(f"{label}: the result is {error:.1%} from that of {ONE}")


def format_table(seconds: Mapping[str, Sequence[float]], temporary: Mapping[str, int]) -> str:
  """The table in Markdown."""
  lines = ["| row | ms | / one adapter | temporary, MB |", "| --- | ---: | ---: | ---: |"]
  for label, own in seconds.items():
    lines.append(
      f"| {label} | {1e3 * statistics.median(own):,.1f} | {ratio(own, seconds[ONE])} "
      f"| {temporary[label] / 1e6:,.1f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  flags.mark_flag_as_required("model")
  app.run(main)
