"""Paths that are written to: each works, or is refused with words before anything is touched."""

import pathlib

import numpy as np
import pytest

from lora_jax.exchange import gguf_files, peft_files
from lora_jax.io import outputs, safetensors


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A current folder that is empty, in one that is not, and a home."""
  (tmp_path / "home").mkdir()
  (tmp_path / "file").write_text("mine")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return tmp_path / "here"


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob("*")
  }


FOLDERS = {
  "new": "here/new",
  "new/": "here/new",
  "deep/er/new": "here/deep/er/new",
  ".": "here",
  "./": "here",
  "../beside": "beside",
  "~/new": "home/new",
  "~": "home",
  "new/..": "here",
}
FOLDERS_REFUSED = {
  "": "the path to write to is empty",
  " ": "the path to write to is empty",
  "/": "the root of the file system",
  "/..": "the root of the file system",
  "..": "holds something already",
  "../file": "is a file",
  "../file/": "is a file",
  "../file/new": "file is a file, and nothing can lie below it",
  "../file/new/deeper": "file is a file, and nothing can lie below it",
}
FILES = {"a.bin": "here/a.bin", "~/a.bin": "home/a.bin", "deep/a.bin": "here/deep/a.bin"}
FILES_REFUSED = {
  "": "the path to write to is empty",
  "/": "the root of the file system",
  ".": "is a folder, and a file is written",
  "..": "is a folder, and a file is written",
  "~": "is a folder, and a file is written",
  "new/": "is a folder, and a file is written",
  "../file/new": "nothing can lie below it",
}


def write(folder):
  with outputs.whole_folder(outputs.new_folder(folder)) as partial:
    (partial / "a").write_text("whole")
    (partial / "b").mkdir()
    (partial / "b" / "c").write_text("too")


@pytest.mark.parametrize(("path", "place"), FOLDERS.items())
def test_a_new_or_an_empty_folder_is_written_and_nothing_else(path, place, here):
  before = contents(here.parent)
  write(path)
  assert contents(here.parent / place) == {"a": b"whole", "b": None, "b/c": b"too"}
  assert before.items() <= contents(here.parent).items()
  assert pathlib.Path.cwd().samefile(here)  # the shell that is in it still is
  assert not list(here.parent.rglob(".*"))


@pytest.mark.parametrize(("path", "words"), FOLDERS_REFUSED.items())
def test_a_folder_that_cannot_be_written_is_refused(path, words, here):
  before = contents(here.parent)
  with pytest.raises((ValueError, FileExistsError, NotADirectoryError), match=words):
    outputs.new_folder(path)
  assert contents(here.parent) == before


@pytest.mark.parametrize(("path", "place"), FILES.items())
def test_a_file_is_where_its_path_says(path, place, here):
  assert outputs.new_file(path) == here.parent / place


@pytest.mark.parametrize(("path", "words"), FILES_REFUSED.items())
def test_a_file_that_cannot_be_written_is_refused(path, words, here):
  for check in (outputs.new_file, outputs.replaceable_file):
    with pytest.raises((ValueError, FileExistsError, NotADirectoryError), match=words):
      check(path)


def test_a_file_that_is_there_is_not_new(here):
  with pytest.raises(FileExistsError, match="is there already"):
    outputs.new_file("../file")
  assert outputs.replaceable_file("../file") == here.parent / "file"


def test_a_link_to_an_empty_folder_stays_a_link(here):
  (here / "target").mkdir()
  (here / "link").symlink_to("target")
  write("link")
  assert (here / "link").is_symlink() and (here / "target" / "a").read_text() == "whole"


def test_a_folder_that_fails_on_the_way_does_not_appear(here):
  with pytest.raises(KeyError), outputs.whole_folder(outputs.new_folder("new")) as partial:
    (partial / "a").write_text("half")
    raise KeyError
  assert not contents(here)


def test_an_adapter_replaces_an_adapter_and_nothing_else(here):
  tensors = {"x.lora_A.weight": np.ones((2, 3), np.float32)}
  for path in ("new", "new", ".", "."):
    if path == ".":
      (here / "new" / peft_files.CONFIG).unlink(missing_ok=True)
      (here / "new" / peft_files.TENSORS).unlink(missing_ok=True)
      if (here / "new").exists():
        (here / "new").rmdir()
    peft_files.write(path, {"peft_type": "LORA"}, tensors)
    assert set(contents(here / path)) == {peft_files.CONFIG, peft_files.TENSORS}
  assert pathlib.Path.cwd().samefile(here)
  (here / "notes").mkdir()
  (here / "notes" / "README.md").write_text("mine")
  with pytest.raises(FileExistsError, match=r"holds README\.md, which is no adapter's"):
    peft_files.write("notes", {"peft_type": "LORA"}, tensors)
  assert (here / "notes" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("path", [".", "", "/", "../file/new", "new/"])
def test_writers_of_one_file_refuse_what_is_no_file(path, here):
  pair = (np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
  before = contents(here.parent)
  with pytest.raises((ValueError, FileExistsError, NotADirectoryError)):
    safetensors.save_file({"a": pair[0]}, path)
  with pytest.raises((ValueError, FileExistsError, NotADirectoryError)):
    gguf_files.write(path, {"x": pair}, alpha=1.0, architecture="llama")
  assert contents(here.parent) == before
