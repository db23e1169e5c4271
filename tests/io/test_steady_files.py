"""Files that are written to while they are read, and what is no regular file."""

import os

import pytest

from lora_jax.io import fingerprints, steady_files


def test_a_file_that_holds_still_is_read(tmp_path):
  path = tmp_path / "data"
  path.write_bytes(b"content")
  with steady_files.opened(path) as file:
    assert file.read() == b"content"


@pytest.mark.parametrize("size", [3, 7, 20])
def test_a_file_that_is_cut_overwritten_or_grows_meanwhile_is_refused(tmp_path, size):
  path = tmp_path / "data"
  path.write_bytes(b"content")
  os.utime(path, ns=(0, 0))  # a clock may be coarser than this test is quick
  with (
    pytest.raises(ValueError, match=rf"changed while it was read, from 7 to {size} bytes"),
    steady_files.opened(path),
  ):
    path.write_bytes(b"x" * size)


def test_that_a_file_changed_is_said_before_what_was_wrong_with_it(tmp_path):
  path = tmp_path / "data"
  path.write_bytes(b"content")
  with pytest.raises(ValueError, match="changed while") as caught, steady_files.opened(path):
    path.write_bytes(b"con")
    raise ValueError("it ends too early")
  assert str(caught.value.__cause__) == "it ends too early"


def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path):
  path, other = tmp_path / "data", tmp_path / "other"
  path.write_bytes(b"content")
  other.write_bytes(b"x")
  with steady_files.opened(path) as file:
    other.replace(path)
    assert file.read() == b"content"


def test_a_pipe_is_refused_at_once_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for use in (steady_files.check, fingerprints.of):
    with pytest.raises(ValueError, match="pipe"):
      use(tmp_path / "pipe")
  with pytest.raises(ValueError, match="device"):
    steady_files.check("/dev/zero")
