"""`python -m benchmarks.step` on two tiny layers: every row runs, and all of them do the same."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "benchmarks.step", *arguments]
  # PyTorch's threads would spin for minutes where the tests share their cores with others.
  env = os.environ | {"OMP_WAIT_POLICY": "passive"}
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def read_table(report: str) -> dict[str, dict[str, str]]:
  lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
  header, _, *body = lines
  return {cells[0]: dict(zip(header, cells, strict=True)) for cells in body}


def losses(row: dict[str, str]) -> list[float]:
  return [float(loss) for loss in row["loss"].split(" → ")]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
  output = tmp_path_factory.mktemp("benchmarks") / "results.md"
  output.write_text("# Results\n")
  done = run_benchmark(
    "--model=tiny", "--scan_layers", "--rounds=2", "--compilations=1", f"--output={output}"
  )
  assert done.returncode == 0, done.stderr
  assert output.read_text() == f"# Results\n\n{done.stdout}"
  return done.stdout


def test_a_step_is_measured_beside_the_floor_and_full_fine_tuning():
  done = run_benchmark(
    "--model=tiny", "--scan_layers", "--rows=ours", "--rounds=2", "--compilations=1"
  )
  assert done.returncode == 0, done.stderr
  table = read_table(done.stdout)
  assert list(table) == ["floor: base frozen", "full fine-tuning", "ours, rank 8"]
  assert losses(table["ours, rank 8"])[0] == losses(table["full fine-tuning"])[0]


@pytest.mark.slow
def test_rows_that_train_the_same_reach_the_same_loss_in_jax_in_qwix_and_in_pytorch(report):
  table = read_table(report)
  full, ours = table["full fine-tuning"], table["ours, rank 8"]
  assert losses(full)[0] > losses(ours)[-1] > losses(full)[-1]
  has_torch = importlib.util.find_spec("torch") is not None
  if has_torch:
    assert losses(table["PyTorch, full"]) == pytest.approx(losses(full), abs=1e-3)
  dora = table.pop("DoRA, rank 8")
  assert losses(dora)[0] == losses(ours)[0]
  assert int(dora["trains"].replace(",", "")) > int(ours["trains"].replace(",", ""))
  quantized = table.pop("QLoRA, NF4, rank 8")
  assert losses(quantized)[0] == pytest.approx(losses(ours)[0], rel=0.05)
  assert losses(quantized)[0] != losses(ours)[0]
  assert quantized["trains"] == ours["trains"]
  same = [name for name in table if name.endswith(", rank 8")]
  assert len(same) == 4 + has_torch + (importlib.util.find_spec("qwix") is not None)
  for name in same:
    assert losses(table[name]) == pytest.approx(losses(ours), abs=1e-3), name
    assert table[name]["trains"] == ours["trains"]


@pytest.mark.slow
def test_the_report_names_the_command_the_versions_and_every_cell_of_the_baselines(report):
  assert "`python -m benchmarks.step --model=tiny --scan_layers --rounds=2" in report
  for package in ("jax", "flax", "optax", "torch", "transformers", "peft"):
    assert f"{package} {importlib.metadata.version(package)}" in report
  table = read_table(report)
  assert table["full fine-tuning"]["/ full"] == "1.00 (1.00–1.00)"
  assert table["floor: base frozen"]["/ floor"] == "1.00 (1.00–1.00)"
  assert table["floor: base frozen"]["trace and compile / floor"] == "1.00"
  for row in table.values():
    assert float(row["step, ms"].replace(",", "")) > 0
    assert float(row["temporary, MB"].replace(",", "")) > 0
  assert "ours, rank 8 / PyTorch + peft, rank 8: " in report


@pytest.mark.slow
def test_pytorch_s_rows_are_left_out_of_a_model_that_it_does_not_have():
  done = run_benchmark(
    "--model=small",
    "--scan_layers",
    "--batch=1",
    "--length=8",
    "--ranks=1",
    "--rows=naive,torch_peft",
    "--rounds=2",
    "--compilations=1",
  )
  assert done.returncode == 0, done.stderr
  has_torch = importlib.util.find_spec("torch") is not None
  reason = "for the language models only" if has_torch else "torch, peft not installed"
  assert f"- Left out: PyTorch + peft: {reason}" in done.stdout
  expected = ["floor: base frozen", "full fine-tuning", "hand-written layer, rank 1"]
  assert list(read_table(done.stdout)) == expected


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--rows=theirs"], "--rows takes some of floor, full"),
    (["--ranks=8,0"], "--ranks takes positive whole numbers"),
    pytest.param(["--rounds=1"], "rounds", marks=pytest.mark.slow),
    (["--output=no/such/folder/results.md"], "a folder that exists"),
    pytest.param(["--model=huge"], "small|smollm2|llama1b|tiny", marks=pytest.mark.slow),
  ],
)
def test_a_wrong_argument_is_refused_with_what_it_could_be(arguments, words):
  done = run_benchmark("--model=tiny", *arguments)
  assert done.returncode != 0
  assert words in done.stderr + done.stdout
