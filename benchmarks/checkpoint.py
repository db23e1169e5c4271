r"""The cost of a checkpoint in training: the time that the loop waits, and the size on disk.

    python -m benchmarks.checkpoint --model=smollm2 --scan_layers --output=benchmarks/results.md
    python -m benchmarks.checkpoint --model=smollm2 --scan_layers --trains=full --every=50

Turns of --every steps without a checkpoint alternate with turns with one, saved as in
`experiments.train`: the loop waits for the step, the arrays are copied, and the rest is written
while the next steps run. A turn with a checkpoint ends when it is on disk, so its whole cost is
counted. The order is reversed every other round, and the ratio is taken within a round. It is
measured in wall-clock time and in the processor time of all threads. The latter shows the same cost
on a CPU and is not disturbed by other programs.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from tqdm import tqdm

import lora_jax
from benchmarks import rows
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import MODELS, Case
from benchmarks.reporting import define_output, publish
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.optimizer import adamw
from lora_jax.train.step import State, init_state, make_train_step

WITHOUT, WITH = "no checkpoint", "a checkpoint"

_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "The model; see benchmarks.models.")
_TRAINS = flags.DEFINE_enum("trains", "lora", ["lora", "full"], "Adapters, or the whole model.")
_RANK = flags.DEFINE_integer("rank", 8, "The rank of the adapters.", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 10, "Steps per turn, one of them saved.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each kind.", lower_bound=2)
_SCAN = flags.DEFINE_bool("scan_layers", False, "One scanned block instead of one for each layer.")
_FOLDER = flags.DEFINE_string("folder", None, "The folder to write to; a temporary one by default.")
_OUTPUT = define_output()


class Measured(NamedTuple):
  """Per round: wall-clock and processor seconds of the turns, seconds of the call that saves, and
  seconds until the checkpoint is on disk."""

  turns: dict[str, list[float]]
  processors: dict[str, list[float]]
  held: list[float]
  written: list[float]
  bytes: int


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)  # Orbax logs each file that it writes
  model = MODELS[_MODEL.value]
  case = model.make(jnp.float32, model.batch, model.length, _SCAN.value)
  state, run = make_run(case)
  arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
    measured = measure(state, run, Path(folder), _EVERY.value, _ROUNDS.value)
  size = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  what = f"LoRA of rank {_RANK.value}" if _TRAINS.value == "lora" else "full fine-tuning"
  report = "\n".join([
    f"## A checkpoint every {_EVERY.value} steps: {_MODEL.value} ({size / 1e6:,.1f}M), {what}, "
    f"{model.batch} × {model.length}, float32",
    "",
    *describe_circumstances("benchmarks.checkpoint", ["jax", "orbax-checkpoint"]),
    f"- {_ROUNDS.value} rounds. Medians over the rounds, with quartiles for the ratio.",
    "",
    format_table(measured, _EVERY.value),
    "",
    f"- The loop waits for {1e3 * statistics.median(measured.held):,.0f} ms; the checkpoint is "
    f"on disk after {1e3 * statistics.median(measured.written):,.0f} ms.",
    f"- It has {measured.bytes / 1e6:,.1f} MB; what trains, with the optimizer's two moments, "
    f"{arrays / 1e6:,.1f} MB; the base, {4 * size / 1e6:,.1f} MB.",
  ])  # fmt: skip
  publish(report, _OUTPUT.value)


def make_run(case: Case) -> tuple[State, Callable[[State], State]]:
  """The initial state, and `state -> state` that takes a step and does not wait."""
  if _TRAINS.value == "lora":
    form = rows.ours(case, rows.make_adapters(case, _RANK.value))
  else:
    form = rows.full(case)
  tx = adamw(lambda step: 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
  trainable, frozen = lora_jax.partition(form.weights, form.mask)

  def objective(weights, batch):
    return case.loss(form.apply({"params": weights}, batch["inputs"]), batch["targets"]), 1.0

  train_step = make_train_step(objective, tx)
  batch = {"inputs": case.inputs, "targets": case.targets}
  return init_state(trainable, tx), lambda state: train_step(state, frozen, batch)[0]


def measure(
  state: State, run: Callable[[State], State], folder: Path, every: int, rounds: int
) -> Measured:
  """Measures the turns; the first of each kind compiles and is not counted."""
  turns, processors = {WITHOUT: [], WITH: []}, {WITHOUT: [], WITH: []}
  held, written = [], []
  with Checkpoints(folder, keep=1, fingerprint="") as checkpoints:

    def turn(state: State, saved: bool) -> State:
      for step in range(every):
        state = run(state)
        if saved and step == 0:
          jax.block_until_ready(state)
          started = time.perf_counter()
          checkpoints.save(state, {})
          held.append(time.perf_counter() - started)
      jax.block_until_ready(state)
      checkpoints.wait()
      return state

    for saved in (False, True):
      state = turn(state, saved)
    held.clear()
    for i in tqdm(range(rounds), desc="rounds"):
      for label in turns if i % 2 == 0 else reversed(turns):
        started, used = time.perf_counter(), time.process_time()
        state = turn(state, saved=label == WITH)
        turns[label].append(time.perf_counter() - started)
        processors[label].append(time.process_time() - used)
    for _ in tqdm(range(rounds), desc="alone"):
      state = jax.block_until_ready(run(state))
      started = time.perf_counter()
      checkpoints.save(state, {})
      checkpoints.wait()
      written.append(time.perf_counter() - started)
    latest = checkpoints.latest()
    size = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file())
  return Measured(turns, processors, held, written, size)


def format_table(measured: Measured, every: int) -> str:
  """The table in Markdown."""
  lines = [
    "| turn | ms a step | / without | processors, ms a step | / without |",
    "| --- " + "| ---: " * 4 + "|",
  ]
  for label in measured.turns:
    cells = [label]
    for seconds in (measured.turns, measured.processors):
      ratios = [x / y for x, y in zip(seconds[label], seconds[WITHOUT], strict=True)]
      low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
      cells.append(f"{1e3 * statistics.median(seconds[label]) / every:,.1f}")
      cells.append(f"{median:.3f} ({low:.3f}–{high:.3f})")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  flags.mark_flag_as_required("model")
  app.run(main)
