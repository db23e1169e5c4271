"""A model's folder in a zip archive: unpacked once and held against it; hostile ones refused."""

import zipfile

import jax
import numpy as np
import pytest
import tiny_encoder
from test_archives import zip_bytes

from lora_jax.io import assets, model_archives, pretrained


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  tiny_encoder.write(folder)
  return folder / "model"


def files_of(folder, prefix=""):
  return {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}


def write(path, files):
  path.write_bytes(zip_bytes(files))
  return path


@pytest.mark.parametrize("prefix", ["", "all-models/bert/"])
def test_a_model_in_an_archive_is_the_model_in_its_folder(folder, tmp_path, prefix):
  others = {f"{prefix}1_Pooling/config.json": b"{}", f"{prefix}weights.bin": b"pickled"}
  path = write(tmp_path / "model.zip", files_of(folder, prefix) | others)
  found, expected = pretrained.load(path), pretrained.load(folder)
  assert found.config == expected.config and found.source == str(path)
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  assert pretrained.inspect(path).config == expected.config
  unpacked = model_archives.folder_of(path)
  assert {x.name for x in unpacked.iterdir()} == {x.name for x in folder.iterdir()}


def test_what_was_unpacked_is_used_again_and_mended_where_it_was_changed(folder, tmp_path):
  path = write(tmp_path / "model.zip", files_of(folder))
  unpacked = model_archives.folder_of(path)
  before = {x.name: x.stat().st_mtime_ns for x in unpacked.iterdir()}
  assert model_archives.folder_of(path) == unpacked
  assert {x.name: x.stat().st_mtime_ns for x in unpacked.iterdir()} == before
  tensors = unpacked / "model.safetensors"
  damaged = bytearray(tensors.read_bytes())
  damaged[-1] ^= 1
  tensors.write_bytes(damaged)
  (unpacked / "config.json").unlink()
  assert model_archives.folder_of(path) == unpacked
  assert files_of(unpacked) == files_of(folder)


def test_a_path_of_another_kind_stays_as_it_is(folder, tmp_path):
  (tmp_path / "model.gguf").write_bytes(b"GGUF")
  for path in (folder, tmp_path / "model.gguf"):
    assert model_archives.folder_of(path) == path


def test_no_file_is_written_outside_of_the_cache(folder, tmp_path, cache):
  files = files_of(folder) | {"../evil.json": b"{}", "/tmp/evil/config.json": b"{}"}
  model_archives.folder_of(write(tmp_path / "model.zip", files))
  assert not list(tmp_path.glob("**/evil.json"))
  assert {x.name for x in tmp_path.iterdir()} == {"model.zip", "cache"}


@pytest.mark.parametrize(
  ("files", "words"),
  [
    ({"a.txt": b"text"}, "holds no model; an archive must have one folder with config.json"),
    ({"config.json": b"{}", "x/model.safetensors": b""}, "holds no model"),
    (
      {f"{x}/{y}": b"{}" for x in "ab" for y in ("config.json", "model.safetensors")},
      "holds 2 models",
    ),
  ],
)
def test_an_archive_without_one_model_is_refused(tmp_path, files, words):
  with pytest.raises(ValueError, match=words):
    model_archives.folder_of(write(tmp_path / "model.zip", files))


def test_a_damaged_archive_is_refused_and_nothing_is_left(folder, tmp_path, cache):
  whole = zip_bytes(files_of(folder))
  for name, content in {"cut": whole[:-40], "flipped": bytes([*whole[:400], *[0] * 2000])}.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read from its archive"):
      model_archives.folder_of(tmp_path / name)
  broken = bytearray(whole)
  start = whole.index(b"model.safetensors") + 200
  broken[start : start + 200] = bytes(200)
  (tmp_path / "broken").write_bytes(broken)
  with pytest.raises(ValueError, match=r"model\.safetensors"):
    model_archives.folder_of(tmp_path / "broken")
  assert not list(cache.glob("unpacked/*/*")) and assets.cache_folder() == cache


def test_a_bomb_is_refused(tmp_path, cache):
  path = tmp_path / "model.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("config.json", "{}")
    with file.open("model.safetensors", "w", force_zip64=True) as member:
      for _ in range(300):
        member.write(bytes(1 << 20))
  with pytest.raises(ValueError, match="over the limit of"):
    model_archives.folder_of(path)
  assert not list(cache.glob("unpacked/*/*"))
