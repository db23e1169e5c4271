"""Adapted functions on four devices, in a process of their own: `devices_worker.py`."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("devices_worker.py")
STATEMENTS = re.findall(r"^def (\w+)\(\):", WORKER.read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def done():
  return subprocess.run(
    [sys.executable, WORKER],
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      "PYTHONPATH": os.pathsep.join(sys.path),  # the checkout that the tests are of
    },
  )


@pytest.mark.parametrize("statement", STATEMENTS)
def test_on_four_devices(done, statement):
  assert statement in done.stdout.splitlines(), done.stderr
