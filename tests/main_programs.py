"""Main programs, run as a user runs them, and as modules for tests of the functions in them."""

import importlib
import os
import pathlib
import subprocess
import sys
import types

from absl import flags


def imported(name: str) -> types.ModuleType:
  """A main program's module, less its flags: several programs have flags of one name."""
  module = importlib.import_module(name)
  for flag in list(flags.FLAGS.flags_by_module_dict().get(name, [])):  # the list is the live one
    delattr(flags.FLAGS, flag.name)
  return module


def call(name: str, *arguments) -> None:
  """Runs a main program in this process, where a test watches what it does."""
  known, given = set(flags.FLAGS), sys.argv
  program = importlib.import_module(f"experiments.{name}")
  sys.argv = [name, *map(str, arguments)]  # where a config looks for its fields
  try:
    flags.FLAGS(sys.argv)
    program.main([name])
  finally:
    sys.argv = given
    for flag in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, flag)
    del sys.modules[program.__name__]


def run(program: str, *arguments, fails: bool = False, **environment: str | None) -> str:
  """Runs `python -m experiments.<program>`; returns what it printed, errors last.

  fails: whether it must end with an error; otherwise it must not.
  environment: its variables beside the tests' own, None for one that is not to be set;
    JAX_NUM_CPU_DEVICES for several devices.
  """
  cached = {} if "JAX_NUM_CPU_DEVICES" in environment else {"JAX_ENABLE_COMPILATION_CACHE": "1"}
  variables = os.environ | {"JAX_PLATFORMS": "cpu"} | cached | environment
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{program}", *map(str, arguments)],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    timeout=600,
    env={name: value for name, value in variables.items() if value is not None},
  )
  assert (done.returncode != 0) == fails, done.stdout + done.stderr
  return done.stdout + done.stderr
