"""The benchmark of depthwise convolutions at a small size: a line for each program."""

import pytest
from main_programs import imported


@pytest.mark.slow
def test_each_program_is_measured_by_each_way():
  lines = imported("benchmarks.depthwise").table(size=32, batch=1, rounds=1).splitlines()
  assert lines[0] == "|  | convolution, ms | shifts, ms | shifts / convolution |"
  names = [line.split("|")[1].strip() for line in lines[2:]]
  assert names == ["forward", "gradient", "gradient, depthwise frozen"]
