"""Adapted functions on a mesh of explicit axes, in a process of their own: `explicit_worker.py`."""

import os
import pathlib
import re
import subprocess
import sys

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


def run(statements):
  return subprocess.run(
    [sys.executable, WORKER, *statements],
    capture_output=True,
    text=True,
    timeout=900,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      "PYTHONPATH": os.pathsep.join(sys.path),  # the checkout that the tests are of
    },
  )


@pytest.fixture(scope="module")
def done():
  return run(STATEMENTS)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_on_explicit_axes(done, statement):
  assert statement in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("statement", SLOW_STATEMENTS)
def test_on_explicit_axes_slowly(statement):
  done = run([statement])
  assert statement in done.stdout.splitlines(), done.stderr
