"""Damaged archives, data, caches and pages of an index: refused, or read right, within bounds.

`hostile_readers` says what is read and how it is damaged, `hostile_worker` what counts as a fault.
"""

import json
import os
import pathlib
import subprocess
import sys

import bombs
import pytest

TESTS = pathlib.Path(__file__).parent
READERS = ("archives", "records", "caches", "pages", "model archives")


def run(reader: str, seed: int, count: int, folder: pathlib.Path, seconds: int = 10) -> dict:
  """What `hostile_worker` says."""
  arguments = map(str, (reader, seed, count, seconds, folder))
  done = subprocess.run(
    [sys.executable, TESTS / "hostile_worker.py", *arguments],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
    capture_output=True,
    text=True,
    timeout=1100,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_refused_or_read_right(reader, tmp_path):
  check(run(reader, 0, 300, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10_000, 20_000])
@pytest.mark.parametrize("reader", READERS)
def test_thousands_of_damaged_files_are_refused_or_read_right(reader, seed, tmp_path):
  check(run(reader, seed, 5000, tmp_path))


def check(said: dict) -> None:
  assert said["faults"] == []
  # Damage that is always refused, or never, would be no test.
  assert said["outcomes"]["refused"] > 0 and said["outcomes"]["same"] > 0


def test_a_small_file_that_unpacks_to_much_is_refused_in_little_time_and_memory(tmp_path):
  count = len(bombs.BOMBS)
  said = run("bombs", 0, count, tmp_path, seconds=60)
  assert said["faults"] == [] and said["outcomes"] == {"refused": count}


def test_a_reader_that_fails_in_any_way_is_found_out(tmp_path):
  said = run("faulty", 0, 6, tmp_path, seconds=1)
  assert said["outcomes"] == {"same": 1, "refused": 2}
  words = ["KeyError", "MemoryError", "TooSlow", "the message"]
  assert [fault[2].split(":")[0] for fault in said["faults"]] == words
