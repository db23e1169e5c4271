r"""All that is to be measured on one GPU or TPU, in one command of at most --minutes.

    python -m benchmarks.accelerator --output=benchmarks/results.md
    python -m benchmarks.accelerator --model=tiny --batch=2 --length=16 --minutes=5   # on a CPU

Each part is a program of this folder in a process of its own, so that the memory of one is free for
the next: training steps (floor, full fine-tuning, LoRA at two ranks, DoRA, QLoRA, a hand-written
layer, `peft`), greedy decoding, an adapter for each row, and sweeps. Each prints device, versions,
its own command, times and memory. A part that fails, or that finds the minutes used up, is named
with the reason, and the others are kept.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from benchmarks.reporting import define_output, publish

_MODEL = flags.DEFINE_string("model", "llama1b", "The model of all parts; see benchmarks.models.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of base and computation.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows of a batch that trains.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens per row that trains.", lower_bound=1)
_RANKS = flags.DEFINE_list("ranks", ["8", "64"], "Ranks of the adapters in training steps.")
_MINUTES = flags.DEFINE_float("minutes", 10.0, "The time for all parts together.", lower_bound=0.1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each row.", lower_bound=2)
_OUTPUT = define_output()

_ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  ends = time.monotonic() + 60 * _MINUTES.value
  common = [
    f"--model={_MODEL.value}",
    f"--dtype={_DTYPE.value}",
    f"--rounds={_ROUNDS.value}",
    "--scan_layers",
  ]
  sections, left_out = [], []
  with tempfile.TemporaryDirectory() as folder:
    for name, arguments in parts():
      report, reason = run(name, [*common, *arguments], ends, Path(folder) / f"{name}.md")
      print(f"benchmarks.{name}: {reason or 'done'}", file=sys.stderr)
      sections += [report] if report else []
      left_out += [f"- benchmarks.{name}: {reason}"] if reason else []
  if left_out:
    sections.append("\n".join(["Left out:", "", *left_out]))
  publish("\n\n".join(sections), _OUTPUT.value)


def parts() -> list[tuple[str, list[str]]]:
  """The programs and their own arguments, the most important first."""
  rows = "floor,full,ours,naive,torch_full,torch_peft,dora,qlora,ours_keeping_products"
  sizes = [f"--batch={_BATCH.value}", f"--length={_LENGTH.value}"]
  few = max(1, _BATCH.value // 8)
  return [
    ("step", [*sizes, f"--rows={rows}", f"--ranks={','.join(_RANKS.value)}", "--compilations=1"]),
    ("sweep", [f"--batch={few}", f"--length={_LENGTH.value}", "--members=1,4,8,16"]),
    ("generation", [f"--prompt={min(128, _LENGTH.value)}", "--batches=1,32"]),
    ("batched_adapters", [f"--length={min(128, _LENGTH.value)}", "--adapters=8"]),
  ]


def run(name: str, arguments: Sequence[str], ends: float, output: Path) -> tuple[str, str | None]:
  """The report of one program, and the reason if there is none."""
  remaining = ends - time.monotonic()
  if remaining <= 0:
    return "", "the minutes were used up before it began"
  command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, f"--output={output}"]
  try:
    done = subprocess.run(
      command, cwd=_ROOT, capture_output=True, text=True, timeout=remaining, check=False
    )
  except subprocess.TimeoutExpired:
    return "", "it had not ended when the minutes were used up"
  if done.returncode:
    return "", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
  return output.read_text().strip(), None


if __name__ == "__main__":
  app.run(main)
