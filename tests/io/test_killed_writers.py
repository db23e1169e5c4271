"""Writers that are killed, at every system call that they make, and what the next one finds."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import killed_writer
import numpy as np
import pytest

from lora_jax.exchange import peft_files
from lora_jax.io import outputs

ROOT = pathlib.Path(__file__).parents[2]
OLD, NEW, NEXT = ({"a": text, "b": text} for text in ("old", "new", "next"))
CONFIG_OLD, CONFIG_NEW, CONFIG_NEXT = (
  json.dumps({"text": text}, indent=2) + "\n" for text in ("old", "new", "next")
)
# case: (before, after, after the next writer, what else may be there for a moment)
CASES = {
  "file": ("old", "new", "next", []),
  "new file": (None, "new", "next", []),
  "folder": (OLD, NEW, NEXT, []),
  "new folder": (None, NEW, NEXT, []),
  "folder without an exchange": (OLD, NEW, NEXT, [None]),
  # What must stay itself, as the current folder, is filled file by file: without old and new at
  # once.
  "current folder": (OLD, NEW, NEXT, [{"b": "old"}, {}, {"a": "new"}]),
  "new current folder": ({}, NEW, NEXT, [{"a": "new"}]),
  "file of a run": (CONFIG_OLD, CONFIG_NEW, CONFIG_NEXT, []),
}


@pytest.fixture
def in_memory():
  """A folder where waiting for the disk takes no time."""
  memory = pathlib.Path("/dev/shm")
  with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
    yield folder


@pytest.mark.skipif(sys.platform != "linux", reason="ptrace is Linux's")
@pytest.mark.parametrize("case", CASES)
def test_a_writer_killed_at_any_system_call_leaves_the_old_or_the_new_and_the_next_one_works(
  case, in_memory
):
  command = [sys.executable, killed_writer.__file__, case, in_memory]
  done = subprocess.run(
    command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  if found is None:
    pytest.skip("needs ptrace, which this system forbids")
  before, after, following, passing = CASES[case]
  states = [each["killed"] for each in found]
  assert len(found) > 30, "system calls of one write"
  assert states[0] == before and states[-1] == after
  for n, state in enumerate(states, start=1):
    assert state in (before, after, *passing), f"killed before call {n}"
  # Not even for a moment where there is another way.
  assert sum(state not in (before, after) for state in states) <= len(states) // 20
  for n, each in enumerate(found, start=1):
    assert each["next"] == following, f"killed before call {n}"
    assert each["names"] == ["it"], f"killed before call {n}, and the next writer left it"


def test_what_an_earlier_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
  """In a container every command has the same process number."""
  for path in (f".merged.{os.getpid()}", f".merged.partial-{os.getpid():08x}"):
    (tmp_path / path).mkdir()
    (tmp_path / path / "half").write_text("half")
  with outputs.whole_folder(outputs.new_folder(tmp_path / "merged")) as partial:
    outputs.write_text(partial / "whole", "whole")
  assert (tmp_path / "merged" / "whole").read_text() == "whole"
  # Names of earlier versions may be somebody's own.
  assert {x.name for x in tmp_path.iterdir()} == {"merged", f".merged.{os.getpid()}"}


def test_what_another_writer_is_at_work_on_is_left_alone(tmp_path):
  with outputs.whole_file(tmp_path / "it") as first:
    first.write_text("first")
    with outputs.whole_file(tmp_path / "it") as second:
      second.write_text("second")
    assert (tmp_path / "it").read_text() == "second"
  assert (tmp_path / "it").read_text() == "first"
  assert [x.name for x in tmp_path.iterdir()] == ["it"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
  (tmp_path / ".it.partial-0123abcd").write_text("a file")
  (tmp_path / ".it.partial-notes").mkdir()
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "mine").write_text("mine")
  (tmp_path / ".it.partial-89abcdef").symlink_to(tmp_path / "elsewhere")
  before = sorted(tmp_path.rglob("*"))
  outputs.write_text(tmp_path / "it", "new")
  assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "it"])


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
  outputs.write_text(tmp_path / "it", "old")
  with pytest.raises(KeyboardInterrupt), outputs.whole_file(tmp_path / "it") as partial:
    partial.write_text("half")
    raise KeyboardInterrupt
  assert (tmp_path / "it").read_text() == "old"
  assert [x.name for x in tmp_path.iterdir()] == ["it"]


def test_a_link_to_a_folder_stays_and_what_it_points_to_is_replaced(tmp_path):
  tensors = {"x.lora_A.weight": np.ones((2, 3), np.float32)}
  (tmp_path / "elsewhere").mkdir()
  peft_files.write(tmp_path / "elsewhere" / "adapter", {"peft_type": "LORA", "r": 1}, tensors)
  (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "adapter")
  peft_files.write(tmp_path / "link", {"peft_type": "LORA", "r": 2}, tensors)
  assert (tmp_path / "link").is_symlink()
  content = json.loads((tmp_path / "elsewhere" / "adapter" / peft_files.CONFIG).read_text())
  assert content["r"] == 2
  assert [x.name for x in (tmp_path / "elsewhere").iterdir()] == ["adapter"]


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(tmp_path):
  (tmp_path / "mine").write_text("mine")
  (tmp_path / "link").symlink_to(tmp_path / "mine")
  outputs.write_text(tmp_path / "link", "new")
  assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "link").read_text() == "new"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 120, "old", "new", "complete", "[a]*?"])
def test_a_name_may_be_any_that_the_file_system_takes(name, tmp_path):
  for text in ("first", "second"):
    outputs.write_text(tmp_path / "file" / name, text)
    with outputs.whole_folder(tmp_path / "folder" / name) as partial:
      outputs.write_text(partial / name, text)
  assert [x.name for x in (tmp_path / "file").iterdir()] == [name]
  assert (tmp_path / "file" / name).read_text() == "second"
  assert (tmp_path / "folder" / name / name).read_text() == "second"


# What may write by other means: the writer itself; what unpacks archives into a folder of its own;
# a log that grows by lines; a lock; and a process that prints nowhere.
_OTHER_WRITERS = {
  "lora_jax/io/outputs.py",
  "lora_jax/io/archives.py",
  "lora_jax/io/assets.py",
  "lora_jax/run/metrics.py",
  "lora_jax/run/workdir.py",
  "experiments/processes.py",
}
_WRITE = re.compile(r"open\([^)]*\"[rbt]*[wax+][rbt+]*\"|\.write_(text|bytes)\(|savefig\(")
_WHOLE = re.compile(r"(outputs|workdir)\.write_(text|bytes)\(|savefig\(partial\b")


def test_there_is_no_other_writer():
  found = {}
  for room in ("lora_jax", "experiments", "configs"):
    for path in (ROOT / room).rglob("*.py"):
      lines = path.read_text().splitlines()
      wrong = [x for x in lines if _WRITE.search(x) and not _WHOLE.search(x)]
      if wrong:
        found[str(path.relative_to(ROOT))] = wrong
  assert not {path: lines for path, lines in found.items() if path not in _OTHER_WRITERS}
