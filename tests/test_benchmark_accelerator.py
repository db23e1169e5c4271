"""`benchmarks.accelerator` and `benchmarks.generation`: everything runs at a tiny size."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from main_programs import imported

from benchmarks import rows, turns
from benchmarks.models import MODELS

ROOT = Path(__file__).parents[1]
accelerator = imported("benchmarks.accelerator")
generation = imported("benchmarks.generation")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
  env = os.environ | {"OMP_WAIT_POLICY": "passive"}
  command = [sys.executable, "-m", f"benchmarks.{program}", *arguments]
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1100)


@pytest.fixture(scope="module")
def case():
  return MODELS["tiny"].make(np.float32, 2, 8, True)


@pytest.mark.slow
def test_a_merged_adapter_and_one_kept_apart_decode_the_same_tokens(case):
  programs = generation.make_programs(case, rank=2, count=5)
  tokens = {label: np.asarray(program()) for label, program in programs.items()}
  assert tokens[generation.BASE].shape == (2, 5)
  np.testing.assert_array_equal(tokens[generation.MERGED], tokens[generation.APART])
  seconds = turns.run_in_turns({x: turns.timed(f) for x, f in programs.items()}, rounds=2)
  assert all(min(own) > 0 for own in seconds.values())


def test_tokens_of_another_model_are_refused():
  expected = np.arange(8).reshape(4, 2)
  generation.check(expected, expected.tolist())
  with pytest.raises(RuntimeError, match="only 25% of the first tokens"):
    generation.check(expected, [[0, 1], [9, 9], [9, 9], [9, 9]])


@pytest.mark.slow
def test_the_base_of_qlora_is_quantized_and_its_adapters_are_those_of_lora(case):
  adapters = rows.make_adapters(case, 2)
  ours, quantized = rows.ours(case, adapters), rows.qlora(case, adapters)
  kernel = quantized.weights["blocks"]["mlp"]["up"]["kernel"]
  assert type(kernel.w).__name__ == "Quantized"
  np.testing.assert_array_equal(kernel.a, ours.weights["blocks"]["mlp"]["up"]["kernel"].a)
  exact = ours.apply({"params": ours.weights}, case.inputs)
  found = quantized.apply({"params": quantized.weights}, case.inputs)
  # NF4 rounds each kernel by 9 % of its norm.
  assert 0.01 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.3


def test_parts_that_fail_or_have_no_time_are_named_with_the_reason(tmp_path):
  late = accelerator.run("step", [], time.monotonic() - 1, tmp_path / "late.md")
  assert late[0] == "" and "minutes were used up before it began" in late[1]
  wrong = accelerator.run(
    "step", ["--model=tiny", "--ranks=0"], time.monotonic() + 300, tmp_path / "wrong.md"
  )
  assert wrong[0] == "" and wrong[1]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_writes_its_section(tmp_path):
  output = tmp_path / "results.md"
  done = run(
    "accelerator",
    "--model=tiny",
    "--dtype=float32",
    "--batch=2",
    "--length=16",
    "--ranks=2",
    "--rounds=2",
    "--minutes=18",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  report = output.read_text()
  for title in (
    "A step of tiny",
    "Many adapters in one",
    "Greedy decoding",
    "adapter for each row",
  ):
    assert f"## {title}" in report or title in report
  assert "Left out:\n" not in report
  for row in ("QLoRA, NF4, rank 2", "DoRA, rank 2", "| 32 | adapter merged"):
    assert row in report
