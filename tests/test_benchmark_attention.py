"""The benchmark of attention at a small size: a line for each length."""

import pytest
from main_programs import imported


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "layers"])
def test_each_length_is_measured_by_each_implementation(name):
  program = imported("benchmarks.attention")
  lines = program.table(getattr(program, name), [32, 64], rounds=1).splitlines()
  assert [line.split("|")[1].strip() for line in lines] == ["tokens", "---", "32", "64"]
  assert all(float(x.split("(")[0]) > 0 for line in lines[2:] for x in line.split("|")[2:-1])
