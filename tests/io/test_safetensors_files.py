"""Safetensors against the library's own files, in one piece and in shards, and damaged ones."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from lora_jax.io import safetensors as files


@pytest.fixture
def tensors():
  torch.manual_seed(0)
  return {
    "a": torch.randn(3, 5),
    "b": torch.randn(4).to(torch.bfloat16),
    "c": torch.randn(2, 2, 2).to(torch.float16),
  }


@pytest.fixture
def path(tensors, tmp_path):
  path = tmp_path / files.SINGLE
  safetensors.torch.save_file(tensors, path)
  return path


@pytest.fixture
def sharded(tensors, tmp_path):
  folder = tmp_path / "sharded"
  folder.mkdir()
  places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
  for shard in set(places.values()):
    held = {name: tensors[name] for name, place in places.items() if place == shard}
    safetensors.torch.save_file(held, folder / shard)
  (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return folder


def assert_same(found, tensors):
  assert set(found) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())


def test_files_written_by_torch_are_read_with_their_dtypes(path, tensors):
  found = files.load_file(path)
  assert_same(found, tensors)
  assert [found[name].dtype for name in "abc"] == [np.float32, ml_dtypes.bfloat16, np.float16]


def test_torch_reads_what_is_written_transposed_views_included(tmp_path):
  array = np.arange(12, dtype=np.float32).reshape(3, 4)
  low = np.arange(3).astype(ml_dtypes.bfloat16)
  path = tmp_path / "w.safetensors"
  files.save_file({"t": array.T, "low": low}, path, metadata={"format": "pt"})
  found = safetensors.torch.load_file(path)
  np.testing.assert_array_equal(found["t"].numpy(), array.T)
  assert found["low"].dtype == torch.bfloat16
  with safetensors.safe_open(path, framework="pt") as file:
    assert file.metadata() == {"format": "pt"}
  assert [other.name for other in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_failed_write_leaves_the_older_file_and_no_other(path, tensors):
  with pytest.raises(Exception, match="object"):
    files.save_file({"a": np.array([None])}, path)
  assert_same(files.load_file(path), tensors)
  assert [other.name for other in path.parent.iterdir()] == [files.SINGLE]


@pytest.mark.parametrize("kind", ["path", "sharded"])
def test_a_folder_gives_every_tensor_of_one_file_or_of_its_shards(kind, tensors, request):
  folder = request.getfixturevalue(kind)
  folder = folder if folder.is_dir() else folder.parent
  assert_same({name: read() for name, read in files.open_folder(folder).items()}, tensors)


def test_a_file_cut_short_anywhere_is_refused(path):
  data = path.read_bytes()
  for end in range(0, len(data), 11):
    path.write_bytes(data[:end])
    with pytest.raises(ValueError, match=r"not a whole safetensors file .* again"):
      files.load_file(path)


def test_a_header_that_is_no_header_is_refused(path):
  path.write_bytes(b"\xff" * 200)
  with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
    files.load_file(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such file"):
    files.load_file(tmp_path / "none.safetensors")


def test_pickled_weights_are_not_read(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(FileNotFoundError, match=r"pickled weights .* are not read: convert them"):
    files.open_folder(tmp_path)


def test_a_missing_shard_is_named(sharded):
  (sharded / "two.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"two.safetensors: no such file"):
    files.open_folder(sharded)


def test_an_index_that_disagrees_with_a_shard_is_refused(sharded):
  index = json.loads((sharded / files.INDEX).read_text())
  index["weight_map"]["d"] = index["weight_map"].pop("a")
  (sharded / files.INDEX).write_text(json.dumps(index))
  words = r"disagrees with one.safetensors; only in the index: \['d'\], only in the shard: \['a'\]"
  with pytest.raises(ValueError, match=words):
    files.open_folder(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(sharded, text):
  (sharded / files.INDEX).write_text(text)
  with pytest.raises(ValueError, match="not an index"):
    files.open_folder(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_cannot_lead_out_of_its_folder(sharded, shard):
  (sharded / files.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
  with pytest.raises(ValueError, match="is not the name of a file in the same folder"):
    files.open_folder(sharded)
