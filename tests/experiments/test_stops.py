"""How main programs end: by signals at any moment, by errors, and with a full disk."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_experiment

ROOT = pathlib.Path(__file__).parents[2]
STOPPED = 130
NUMBERS = [signal.SIGINT, signal.SIGTERM]
# A cold compile each time, as of a model that was never met before.
COLD = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONPATH": str(ROOT)}
# Ctrl-C says nothing to what a shell started in the background, as these tests may have been.
HEED = "signal.signal(signal.SIGINT, signal.SIG_DFL)"


def python(command, first=HEED):
  """The command of a Python that does something of its own first."""
  begin = f"import os, resource, signal, sys; {first}; os.execv(sys.executable, sys.argv[1:])"
  return [sys.executable, "-c", begin, sys.executable, *map(str, command)]


def started(command, first=HEED):
  return subprocess.Popen(
    python(command, first),
    cwd=ROOT,
    env=os.environ | COLD,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def until(process, words):
  """Reads the process's standard error until it holds some words; returns all that it read."""
  read = ""
  while words not in read:
    part = os.read(process.stderr.fileno(), 1000).decode(errors="replace")
    assert part, f"{read}\n{process.communicate()}"
    read += part
  return read


def stopped(process, number):
  """Sends a signal; returns the exit code, what was printed, and the standard error's lines."""
  process.send_signal(number)
  printed, errors = process.communicate(timeout=300)
  assert "Traceback" not in errors and "Fatal" not in errors, errors
  return process.returncode, printed, errors.splitlines()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, smollm2):
  return tiny_experiment.write(tmp_path_factory.mktemp("tiny"), smollm2.tokenizer)


@pytest.fixture(scope="module")
def model(config_file):
  return config_file.parent / "model"


def train_command(config_file, workdir):
  return ["-m", "experiments.train", f"--config={config_file}", f"--workdir={workdir}"]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_run_that_is_stopped_while_it_compiles_ends_with_one_line_and_no_fault(
  number, config_file, tmp_path
):
  process = started(train_command(config_file, tmp_path / "run"))
  until(process, "compiling for")
  code, _, lines = stopped(process, number)
  assert code == 0
  assert lines[-1].startswith("stopped at once; the checkpoints stay, and the same command goes on")
  assert sum("stopped" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_program_that_begins_anew_tells_it_by_its_exit_code(number, config_file, tmp_path):
  process = started(
    [
      *("-m", "experiments.evaluate", f"--config={config_file}", "--split=train"),
    ]
  )
  until(process, "base:")
  code, _, lines = stopped(process, number)
  assert code == STOPPED
  assert lines[-1] == "stopped before its end; the same command starts over"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_run_may_be_stopped_at_any_moment(number, config_file, tmp_path):
  for seed in range(15):
    process = started(train_command(config_file, tmp_path / f"run{seed}"))
    until(process, "look for changes")
    time.sleep(random.Random(seed).uniform(0, 12))
    code, printed, lines = stopped(process, number)
    assert code == 0, lines
    ends = [line for line in (*printed.splitlines(), *lines) if line.startswith("stopped")]
    assert len(ends) == 1 or "everything is in" in printed


PROGRAM = """
import hashlib, sys, threading, time
from experiments import programs
from lora_jax import checks

def main(argv):
  print("begun", file=sys.stderr, flush=True)
  {body}

programs.PATIENCE = 0.5
programs.run(main)
"""


def program(tmp_path, body):
  (tmp_path / "program.py").write_text(PROGRAM.format(body=body.replace("\n", "\n  ")))
  return [tmp_path / "program.py"]


def ended(tmp_path, body, *flags):
  done = subprocess.run(
    [sys.executable, *program(tmp_path, body), *flags],
    cwd=ROOT,
    env=os.environ | COLD,
    capture_output=True,
    text=True,
    timeout=100,
  )
  return done.returncode, done.stdout, done.stderr.removeprefix("begun\n")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
  "body",
  [
    "time.sleep(100)",
    "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # in C, as the compiler is
    "while True:\n  try:\n    time.sleep(100)\n  except BaseException:\n    pass",
    "threading.Thread(target=time.sleep, args=(100,)).start()\ntime.sleep(100)",
  ],
)
def test_a_signal_is_heeded_wherever_a_program_is(body, number, tmp_path):
  process = started(program(tmp_path, body))
  until(process, "begun\n")
  began = time.monotonic()
  code, _, lines = stopped(process, number)
  assert code == STOPPED and time.monotonic() - began < 30
  assert lines == ["stopped before its end; the same command starts over"]


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_arrives_in_a_callback_is_not_lost(number, tmp_path):
  body = f"""
import gc, os
armed = [{int(number)}]
def callback(*_):
  if armed:
    os.kill(os.getpid(), armed.pop())
    time.sleep(0.1)
gc.callbacks.append(callback)
gc.collect()
time.sleep(20)  # longer than the watcher waits for a program to heed it
print("went on to its end")"""
  code, printed, errors = ended(tmp_path, body)
  words = "stopped before its end; the same command starts over\n"
  assert (code, printed, errors) == (STOPPED, "", words)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_after_the_end_changes_nothing(number, tmp_path):
  late = "import atexit, os\natexit.register(lambda: (time.sleep(1), print('last')))"
  process = started(program(tmp_path, f"{late}\nprint('written')"))
  until(process, "begun\n")
  time.sleep(0.3)
  code, printed, lines = stopped(process, number)
  assert (code, printed, lines) == (0, "written\nlast\n", [])


@pytest.mark.slow
def test_a_program_that_nohup_keeps_from_ctrl_c_is_kept_from_it(tmp_path):
  ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
  process = started(program(tmp_path, "time.sleep(2); print('whole')"), ignore)
  until(process, "begun\n")
  code, printed, _ = stopped(process, signal.SIGINT)
  assert (code, printed) == (0, "whole\n")


# ---- errors

OWN = "checks.whole('rank', 0, least=1)"


def test_what_is_refused_is_said_in_one_line(tmp_path):
  words = "ValueError: rank 0 is below 1; use a positive whole number\n"
  assert ended(tmp_path, OWN) == (1, "", words)


def test_where_it_came_from_is_printed_on_request(tmp_path):
  code, _, errors = ended(tmp_path, OWN, "--traceback")
  assert code == 1 and "Traceback" in errors
  assert errors.endswith("ValueError: rank 0 is below 1; use a positive whole number\n")


@pytest.mark.parametrize("body", ["{}['x']", "int('x')", "1 / 0", "[].pop()"])
def test_an_error_that_nobody_wrote_for_people_shows_where_it_came_from(body, tmp_path):
  code, _, errors = ended(tmp_path, f"import json\n{body}")
  assert code == 1 and "Traceback" in errors and "in main" in errors


def test_what_other_threads_say_comes_before_the_reason(tmp_path):
  body = """
def noise():
  import sys
  for _ in range(1000):
    sys.stderr.write("noise\\n")
    time.sleep(0.001)
threads = [threading.Thread(target=noise, daemon=bool(n % 2)) for n in range(4)]
[thread.start() for thread in threads]
import atexit
atexit.register(lambda: print("noise of the end", file=sys.stderr))
raise OSError("the disk is full")"""
  code, _, errors = ended(tmp_path, body)
  assert code == 1
  # Also no empty line, nor one that another thread's words stand in.
  assert errors.endswith("\nOSError: the disk is full\n")


@pytest.mark.slow
def test_a_full_disk_is_the_last_word(config_file, tmp_path):
  limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
  done = subprocess.run(
    python(train_command(config_file, tmp_path / "run"), limit),
    cwd=ROOT,
    env=os.environ | COLD,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f"OSError: {tmp_path / 'run'}") and "cannot be written" in last
  assert "the same command then goes on from the last whole checkpoint" in last
