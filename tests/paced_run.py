"""`experiments.train` that goes no further than a file says, for tests that stop it on its way.

    python tests/paced_run.py run.limit --config=... --workdir=...

The file holds a step. The run waits once it has logged that step, and once it is done, until the
file says a later one; so it cannot end before whoever watches it has acted.
"""

import pathlib
import runpy
import sys
import time

from lora_jax.run import metrics

limit = pathlib.Path(sys.argv[1])
write = metrics.MetricsWriter.write


def wait_at(step: float) -> None:
  while step >= float(limit.read_text() or 0):  # empty while it is written
    time.sleep(0.001)


def paced_write(self, step, values):
  write(self, step, values)
  wait_at(step)


if __name__ == "__main__":
  metrics.MetricsWriter.write = paced_write
  sys.argv = [sys.argv[0], *sys.argv[2:]]
  try:
    runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    if not end.code:
      wait_at(1e9)
    raise
