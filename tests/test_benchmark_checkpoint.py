"""`python -m benchmarks.checkpoint` on two tiny layers."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_steps_with_a_checkpoint_stand_beside_those_without_and_its_size_beside_what_trains(
  tmp_path,
):
  output = tmp_path / "results.md"
  output.write_text("# Results\n")
  command = [
    *(sys.executable, "-m", "benchmarks.checkpoint", "--model=tiny", "--scan_layers"),
    *("--rank=32", "--every=2", "--rounds=2", f"--folder={tmp_path}", f"--output={output}"),
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert output.read_text() == f"# Results\n\n{done.stdout}"
  assert "`python -m benchmarks.checkpoint --model=tiny --scan_layers" in done.stdout
  assert "| no checkpoint | " in done.stdout and "| 1.000 (1.000–1.000) |" in done.stdout
  cell = r"[\d,.]+ \| \d+\.\d{3} \([\d.–]+\)"
  assert re.search(rf"\| a checkpoint \| {cell} \| {cell} \|\n", done.stdout)
  sizes = re.search(r"It has ([\d.]+) MB; what trains.* ([\d.]+) MB; ", done.stdout)
  written, trains = map(float, sizes.groups())
  assert 0.9 * trains < written < trains + 0.1
  assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
