"""`python -m benchmarks.sweep` on two tiny layers."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "benchmarks.sweep", "--model=tiny", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_each_number_of_members_has_both_forms(tmp_path):
  output = tmp_path / "results.md"
  output.write_text("# Results\n")
  done = run_benchmark(
    "--scan_layers",
    "--batch=2",
    "--length=3",
    "--members=1,3",
    "--ranks=1,2",
    "--rounds=2",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  assert output.read_text() == f"# Results\n\n{done.stdout}"
  assert "`python -m benchmarks.sweep --model=tiny --scan_layers" in done.stdout
  lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "| " in line]
  forms = [(int(count), form) for count, form, *_ in lines[2:]]
  assert forms == [
    (count, form) for count in (1, 3) for form in ("one after another", "one program")
  ]
  for count, form, together, each, ratio, compiling, _ in lines[2:]:
    milliseconds = float(each.replace(",", ""))
    assert milliseconds > 0 and float(compiling) > 0, form
    assert abs(float(together.replace(",", "")) - int(count) * milliseconds) < 0.1 * int(count)
    assert (ratio == "1.00 (1.00–1.00)") == (form == "one after another")


def test_a_number_of_members_that_is_none_is_refused():
  done = run_benchmark("--members=4,0")
  assert done.returncode != 0
  assert "--members takes positive whole numbers" in done.stderr + done.stdout
