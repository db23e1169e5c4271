"""`python -m benchmarks.batched_adapters` on two tiny layers."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "benchmarks.batched_adapters", "--model=tiny", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_each_number_of_adapters_has_its_rows_beside_the_one_adapter(tmp_path):
  output = tmp_path / "results.md"
  output.write_text("# Results\n")
  done = run_benchmark(
    "--scan_layers",
    "--batch=4",
    "--length=3",
    "--adapters=2,3",
    "--rank=2",
    "--rounds=2",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  assert output.read_text() == f"# Results\n\n{done.stdout}"
  assert "`python -m benchmarks.batched_adapters --model=tiny --scan_layers" in done.stdout
  lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "| " in line]
  table = {cells[0]: cells[1:] for cells in lines[2:]}
  each = [f"{count} adapters, {way}" for count in (2, 3) for way in ("gate", "select")]
  assert list(table) == ["base alone", "one adapter", *each]
  assert table["one adapter"][1] == "1.00 (1.00–1.00)"
  assert all(float(milliseconds.replace(",", "")) > 0 for milliseconds, *_ in table.values())


def test_a_number_of_adapters_that_is_none_is_refused():
  done = run_benchmark("--adapters=8,0")
  assert done.returncode != 0
  assert "--adapters takes positive whole numbers" in done.stderr + done.stdout
