r"""Starts one run as several processes of this machine, to try out what a cluster does with many.

    python -m experiments.launch --processes=2 -- \
        experiments.train --config=configs/quickstart.py:smoke --workdir=runs/two

They talk over the loopback interface. On a CPU each has one device, or as many as
XLA_FLAGS=--xla_force_host_platform_device_count says. A machine with several accelerators needs no
second process: one drives them all.

Ctrl-C and SIGTERM are handed on to the processes, which save and stop at the end of a step, and
before they have begun at once; a second one ends them at once. When one of them fails, the others
are stopped, and its exit code is returned. Each exit code is one of `experiments.programs`.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

_STOPPED = 130

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes to start.", lower_bound=1)


def main(argv):
  if len(argv) < 2:
    raise app.UsageError("say what to start: -- experiments.train --config=... --workdir=...")
  sys.exit(launch(argv[1:], _PROCESSES.value))


def launch(command: Sequence[str], count: int) -> int:
  """Runs `python -m command...` as processes that know each other; returns the exit code."""
  shared = [f"--coordinator=127.0.0.1:{_free_port()}", f"--num_processes={count}"]
  processes: list[subprocess.Popen] = []
  told = []

  def hand_on(*_):
    for process in processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill() if told else process.terminate()
    told.append(True)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, hand_on)
  try:
    while len(processes) < count and not told:
      one = [sys.executable, "-m", *command, *shared, f"--process_id={len(processes)}"]
      # In a session of its own, or Ctrl-C would reach it as well as this process.
      processes.append(subprocess.Popen(one, start_new_session=True))
    if told:  # maybe while the last of them was being started
      for process in processes:
        process.terminate()
    codes = [None] * len(processes)
    while None in codes and not any(codes):
      time.sleep(0.1)
      codes = [process.poll() for process in processes]
    code = next(filter(None, codes), 0)
    # Until they listen, SIGTERM ends them as it ends any program.
    if told and (len(processes) < count or code == -signal.SIGTERM):
      print("stopped before it began", file=sys.stderr)
      return _STOPPED
    return code if code >= 0 else 128 - code  # as a shell does for one that a signal ended
  finally:
    for process in processes:
      process.kill()  # nothing, for those that have come to their end
      process.wait()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


if __name__ == "__main__":
  app.run(main)
