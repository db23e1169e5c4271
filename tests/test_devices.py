"""Adapted functions on four devices, in a process of their own: `devices_worker.py`."""

import pathlib
import re

import device_processes
import pytest

WORKER = pathlib.Path(__file__).with_name("devices_worker.py")
STATEMENTS = re.findall(r"^def (\w+)\(\):", WORKER.read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def done():
  return device_processes.run(WORKER)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_on_four_devices(done, statement):
  assert statement in done.stdout.splitlines(), done.stderr
