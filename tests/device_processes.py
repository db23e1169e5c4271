"""Workers: processes with several CPU devices, which print the statements that hold."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence


def xla_flags(*flags: str) -> str:
  """XLA_FLAGS of a process: the tests' own, then these."""
  return " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def run(
  worker: pathlib.Path, statements: Sequence[str] = (), *, devices: int = 4, flags: str = ""
) -> subprocess.CompletedProcess:
  """Runs a worker on some of its statements, on all where none is named.

  flags: more of XLA_FLAGS.
  """
  return subprocess.run(
    [sys.executable, worker, *statements],
    capture_output=True,
    text=True,
    timeout=900,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(f"--xla_force_host_platform_device_count={devices}", flags),
      "PYTHONPATH": os.pathsep.join(sys.path),  # the checkout that the tests are of
    },
  )
