r"""The cost of a training step: time, memory and compilation of LoRA and its alternatives.

    python -m benchmarks.step --model=small
    python -m benchmarks.step --model=smollm2 --output=benchmarks/results.md
    python -m benchmarks.step --model=llama1b --dtype=bfloat16 --steps=5      # on a GPU

A step is forward, backward and AdamW. The rows take turns, in an order that is reversed every other
round, and a ratio is taken within each round. The table has its median and quartiles, so that
neither slow phases of the machine nor a drift decide. The floor and full fine-tuning are always
measured, since the ratios are relative to them.
"""

import contextlib
import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from tqdm import tqdm

from benchmarks import rows, torch_peer
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import MODELS, Case
from benchmarks.reporting import define_output, publish
from benchmarks.rows import ADAPTED, BARE, JaxRow
from benchmarks.torch_peer import TorchRow
from benchmarks.turns import ratio, run_in_turns

Row = JaxRow | TorchRow

LABELS = {
  "floor": "floor: base frozen",
  "full": "full fine-tuning",
  "floor_keeping_products": "floor, products kept",
  "ours": "ours",
  "ours_keeping_products": "ours, products kept",
  "dora": "DoRA",
  "qlora": "QLoRA, NF4",
  "naive": "hand-written layer",
  "merged": "W + sAB formed",
  "qwix": "qwix",
  "torch_full": "PyTorch, full",
  "torch_peft": "PyTorch + peft",
}
ALWAYS = ("floor", "full")  # the ratios are relative to them
FLOOR, FULL = (LABELS[name] for name in ALWAYS)
NEEDS = {
  "qwix": ("qwix",),
  "torch_full": ("torch", "transformers"),
  "torch_peft": ("torch", "transformers", "peft"),
}

_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "The model; see benchmarks.models.")
_ROWS = flags.DEFINE_list("rows", list(LABELS), f"Some of {','.join(LABELS)}.")
_RANKS = flags.DEFINE_list("ranks", ["8"], "Ranks of the adapters; each has its LoRA rows.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each row.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 1, "Steps per turn, timed together.", lower_bound=1)
_COMPILATIONS = flags.DEFINE_integer("compilations", 3, "Per row, in turns.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of base and computation.")
_BATCH = flags.DEFINE_integer("batch", 0, "Rows of a batch; 0 for the model's own.")
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens per row; 0 for the model's own.")
_SCAN = flags.DEFINE_bool("scan_layers", False, "One scanned block instead of one for each layer.")
_OUTPUT = define_output()

flags.register_validator(
  "rows", lambda names: set(names) <= set(LABELS), f"--rows takes some of {', '.join(LABELS)}"
)
flags.register_validator(
  "ranks",
  lambda ranks: ranks and all(rank.isdecimal() and int(rank) for rank in ranks),
  "--ranks takes positive whole numbers, as in --ranks=1,8,64",
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  # Otherwise JAX would reserve most of a GPU, on which PyTorch's processes run too.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  model = MODELS[_MODEL.value]
  batch, length = _BATCH.value or model.batch, _LENGTH.value or model.length
  case = model.make(jnp.dtype(_DTYPE.value), batch, length, _SCAN.value)
  names, left_out = available({*ALWAYS, *_ROWS.value}, case)
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    table = make_rows(case, names, [int(rank) for rank in _RANKS.value], Path(folder))
    compiled = compile_in_turns(table, _COMPILATIONS.value)
    for row in tqdm(table, desc="start"):
      row.start()
      stack.callback(row.close)
    turns = {row.label: functools.partial(row.run, _STEPS.value) for row in table}
    seconds = run_in_turns(turns, _ROUNDS.value)
  size = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  title = f"{_MODEL.value} ({size / 1e6:,.1f}M), {batch} × {length}, {_DTYPE.value}"
  report = "\n\n".join(
    [
      f"## A step of {title}",
      describe_run(names, left_out),
      format_table(table, seconds, compiled),
      format_comparisons(seconds),
    ]
  )
  publish(report, _OUTPUT.value)


def available(names: Collection[str], case: Case) -> tuple[list[str], list[str]]:
  """The rows that can be measured here, and the reason for each of the others."""
  possible, left_out = [], []
  for name in (name for name in LABELS if name in names):
    missing = [m for m in NEEDS.get(name, ()) if importlib.util.find_spec(m) is None]
    if missing:
      left_out.append(f"{LABELS[name]}: {', '.join(missing)} not installed")
    elif name.startswith("torch") and not case.is_language_model:
      left_out.append(f"{LABELS[name]}: for the language models only")
    else:
      possible.append(name)
  return possible, left_out


def make_rows(case: Case, names: Sequence[str], ranks: Sequence[int], folder: Path) -> list[Row]:
  """The rows in the order of the table.

  folder: the folder for files that PyTorch's processes read.
  """
  table: list[Row] = [
    JaxRow(LABELS[name], form(case), case) for name, form in BARE.items() if name in names
  ]
  adapters = {rank: rows.make_adapters(case, rank) for rank in ranks}
  for name, form in ADAPTED.items():
    if name in names:
      table += [
        JaxRow(f"{LABELS[name]}, rank {rank}", form(case, adapters[rank]), case) for rank in ranks
      ]
  if not {"torch_full", "torch_peft"}.isdisjoint(names):
    spec = torch_peer.write_case(case, folder)
    if "torch_full" in names:
      table.append(TorchRow(LABELS["torch_full"], spec))
    if "torch_peft" in names:
      for rank in ranks:
        adapted = torch_peer.with_adapters(spec, case, adapters[rank], folder / f"rank_{rank}")
        table.append(TorchRow(f"{LABELS['torch_peft']}, rank {rank}", adapted))
  return table


def compile_in_turns(table: Sequence[Row], rounds: int) -> dict[str, list[float]]:
  """`{label: seconds of each compilation}` for the rows in JAX."""
  compiled = [row for row in table if isinstance(row, JaxRow)]
  seconds = {row.label: [] for row in compiled}
  turns = [row for _ in range(rounds) for row in compiled]
  for row in tqdm(turns, desc="compile"):
    seconds[row.label].append(row.compile())
  return seconds


def format_table(
  table: Sequence[Row],
  seconds: Mapping[str, Sequence[float]],
  compiled: Mapping[str, Sequence[float]],
) -> str:
  """The table in Markdown."""
  lines = [
    "| row | step, ms | / full | / floor | temporary, MB | trace and compile / floor | trains "
    "| loss |",
    "| --- " + "| ---: " * 7 + "|",
  ]
  for row in table:
    own = seconds[row.label]
    cells = [
      row.label,
      f"{1e3 * statistics.median(own):,.1f}",
      ratio(own, seconds[FULL]),
      ratio(own, seconds[FLOOR]),
      "–" if row.temporary is None else f"{row.temporary / 1e6:,.1f}",
      ratio(compiled[row.label], compiled[FLOOR]) if row.label in compiled else "–",
      f"{row.trainable:,}",
      f"{row.losses[0]:.4f} → {row.losses[-1]:.4f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def format_comparisons(seconds: Mapping[str, Sequence[float]]) -> str:
  """Ours relative to each other LoRA row of the same rank."""
  lines = []
  ours = f"{LABELS['ours']}, rank "
  for label in seconds:
    if label.startswith(ours):
      rank = label.removeprefix(ours)
      others = [other for other in seconds if other.endswith(f", rank {rank}") and other != label]
      lines += [f"- {label} / {other}: {ratio(seconds[label], seconds[other])}" for other in others]
  return "\n".join(lines)


def describe_run(names: Sequence[str], left_out: Sequence[str]) -> str:
  """Device, versions, date and command, and an explanation of the columns."""
  packages = ["jax", "flax", "optax", *dict.fromkeys(m for n in names for m in NEEDS.get(n, ()))]
  lines = [
    *describe_circumstances("benchmarks.step", packages),
    f"- {_ROUNDS.value} rounds, steps in a turn: {_STEPS.value}. Ratios: medians over the rounds, "
    "with quartiles. Temporary memory: that of the compiled step beyond its arguments and results; "
    "for PyTorch the growth of its process's resident memory (on a GPU its allocator's) in a step. "
    "Loss: of the first step and of the last, the same for all rows that do the same.",
  ]
  if left_out:
    lines.append(f"- Left out: {'; '.join(left_out)}")
  return "\n".join(lines)


if __name__ == "__main__":
  flags.mark_flag_as_required("model")
  app.run(main)
