"""Adapted functions on a mesh of explicit axes, in a process of their own: `explicit_worker.py`."""

import pathlib
import re

import device_processes
import jax
import pytest

WORKER = pathlib.Path(__file__).with_name("explicit_worker.py")
FOUND = re.findall(r"^def (\w+)\(\):", WORKER.read_text(), flags=re.MULTILINE)
STATEMENTS = [name for name in FOUND if not name.startswith("slow_")]
SLOW_STATEMENTS = [name for name in FOUND if name.startswith("slow_")]


# JAX 0.8 cannot differentiate a scan of a function under `jax.sharding.auto_axes`.
OLD = {"gradients_pass_through_a_scan", "slow_values_and_gradients_of_every_use_and_of_every_kind"}
if not hasattr(jax, "reshard"):  # JAX 0.8
  STATEMENTS = [name for name in STATEMENTS if name not in OLD]
  SLOW_STATEMENTS = [name for name in SLOW_STATEMENTS if name not in OLD]


@pytest.fixture(scope="module")
def done():
  return device_processes.run(WORKER, STATEMENTS)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_on_explicit_axes(done, statement):
  assert statement in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("statement", SLOW_STATEMENTS)
def test_on_explicit_axes_slowly(statement):
  done = device_processes.run(WORKER, [statement])
  assert statement in done.stdout.splitlines(), done.stderr
