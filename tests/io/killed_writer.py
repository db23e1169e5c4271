"""Kills a writer before each of its system calls, and reports what it left every time.

    python tests/io/killed_writer.py CASE FOLDER

The writer is a child under ptrace, which is Linux's. Prints a JSON list with an object for each
system call: what is at the path after the kill, and after the next, undisturbed writer has come to
its end; with the names alongside. Prints `null` where the system allows no tracing.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys

_PATH = pathlib.Path(__file__).parents[2] / "lora_jax" / "io" / "outputs.py"
# By its file, for the package imports JAX, which makes every child slow to start.
_SPEC = importlib.util.spec_from_file_location("outputs", _PATH)
outputs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(outputs)
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long
_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x100000


def killed_before(number, act):
  """Runs `act` in a child that is killed before a system call; whether it came so far."""
  child = os.fork()
  if not child:
    if _LIBC.ptrace(_TRACEME, 0, None, None):
      os._exit(17)
    os.kill(os.getpid(), signal.SIGSTOP)
    act()
    os._exit(0)
  _, status = os.waitpid(child, 0)
  if os.WIFEXITED(status):
    raise PermissionError("no ptrace here")
  _LIBC.ptrace(_SETOPTIONS, child, None, _TRACESYSGOOD | _EXITKILL)
  entries, entering = 0, True
  while True:
    _LIBC.ptrace(_SYSCALL, child, None, None)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
      assert os.WEXITSTATUS(status) == 0, "the writer failed"
      return False
    assert os.WIFSTOPPED(status), status
    if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
      continue
    entries += entering
    if entering and entries == number:
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      return True
    entering = not entering


def read(path):
  """What is at a path: a text, `{name: text}` of a folder, or None."""
  if path.is_dir():
    return {x.name: x.read_text() for x in sorted(path.iterdir()) if x.is_file()}
  return path.read_text() if path.exists() else None


def write_folder(path, text):
  folder = outputs.replaceable_folder(path, "a", {"a", "b"}, "pair's")
  with outputs.whole_folder(folder) as partial:
    outputs.write_text(partial / "a", text)
    (partial / "b").write_text(text)


def write_config(path, text):
  from lora_jax.run import workdir

  with workdir.open_workdir(path.parent, {"rank": 8}):
    workdir.write_json(path, {"text": text})


def no_exchange():
  outputs.ctypes = type("ctypes", (), {"CDLL": lambda *_: None})


# name: (what comes before, the writer, what is there at first)
CASES = {
  "file": (None, outputs.write_text, True),
  "new file": (None, outputs.write_text, False),
  "folder": (None, write_folder, True),
  "new folder": (None, write_folder, False),
  "folder without an exchange": (no_exchange, write_folder, True),
  "current folder": (os.chdir, write_folder, True),
  "new current folder": (os.chdir, write_folder, False),
  "file of a run": (None, write_config, True),
}


def main(case, folder):
  before, write, is_there = CASES[case]
  path, found = pathlib.Path(folder) / "it", []
  current = before is os.chdir
  if case == "file of a run":
    import lora_jax.run.workdir  # noqa: F401, before the children, which would each do it
  for number in range(1, 10_000):
    os.chdir(folder)
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True) if not path.is_dir() else None
    if current:
      path.mkdir()
      os.chdir(path)
    elif before:
      before()
    if is_there:
      write(path, "old")
    came = killed_before(number, lambda: write(path, "new"))
    killed = read(path)
    write(path, "next")
    found.append(
      {
        "killed": killed,
        "next": read(path),
        "names": sorted({x.name for x in path.parent.iterdir()} - {"lock", "config.json"}),
      }
    )
    if not came:
      return found
  raise AssertionError("the writer comes to no end")


if __name__ == "__main__":
  with contextlib.suppress(PermissionError):
    print(json.dumps(main(*sys.argv[1:])))
    sys.exit()
  print("null")
