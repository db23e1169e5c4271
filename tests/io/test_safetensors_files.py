"""Safetensors against the library's own files, in one piece and in shards, and damaged ones."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from peers import torch, torch_files

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
  torch_files.save_file(tensors, path)
  return path


@pytest.fixture
def sharded(tensors, tmp_path):
  folder = tmp_path / "sharded"
  folder.mkdir()
  places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
  for shard in set(places.values()):
    held = {name: tensors[name] for name, place in places.items() if place == shard}
    torch_files.save_file(held, folder / shard)
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
  found = torch_files.load_file(path)
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
  assert_same({name: x.load() for name, x in files.open_folder(folder).items()}, tensors)


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


@pytest.mark.parametrize("old_shards", ["there", "gone"])
def test_a_file_beside_an_index_of_other_tensors_is_read_as_transformers_does_and_said(
  sharded, tensors, caplog, old_shards
):
  newer = {name: tensor + 1 for name, tensor in tensors.items()}
  torch_files.save_file(newer, sharded / files.SINGLE)
  if old_shards == "gone":
    for shard in ("one", "two"):
      (sharded / f"{shard}.safetensors").unlink()
  assert_same({name: x.load() for name, x in files.open_folder(sharded).items()}, newer)
  assert "model.safetensors and also model.safetensors.index.json" in caplog.text
  assert "Delete the one that is not meant" in caplog.text


def test_an_index_that_leads_to_the_one_file_is_in_order(path, tensors, caplog):
  places = dict.fromkeys(tensors, files.SINGLE)
  (path.parent / files.INDEX).write_text(json.dumps({"weight_map": places}))
  assert_same({name: x.load() for name, x in files.open_folder(path.parent).items()}, tensors)
  assert not caplog.text


@pytest.mark.parametrize("shard", [["one.safetensors"], {"a": 1}, 3, None])
def test_an_index_that_names_no_file_is_refused(sharded, shard):
  (sharded / files.INDEX).write_text(json.dumps({"weight_map": {"a": shard, "b": "x"}}))
  with pytest.raises(ValueError, match="is not the name of a file in the same folder"):
    files.open_folder(sharded)


def test_an_index_nested_without_end_is_refused(sharded):
  (sharded / files.INDEX).write_text('{"weight_map": ' + "[" * 100_000)
  with pytest.raises(ValueError, match="not an index"):
    files.open_folder(sharded)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int64", "uint8"])
def test_float8_and_integers_are_read_as_torch_has_them(tmp_path, dtype):
  path = tmp_path / "eight.safetensors"
  tensor = torch.tensor([[1.0, 2.0, 16.0]]).to(getattr(torch, dtype))
  torch_files.save_file({"w": tensor}, path)
  found = files.load_file(path)["w"]
  assert found.dtype.name == dtype
  assert_same({"w": found}, {"w": tensor})


def test_a_tensor_of_a_dtype_that_is_not_read_is_refused_by_name(tmp_path):
  path = tmp_path / "bits.safetensors"
  torch_files.save_file({"w": torch.ones(3).to(torch.bool)}, path)
  with pytest.raises(ValueError, match=r"bits.safetensors: .*'w': dtype 'BOOL' is not read"):
    files.open_file(path)


def test_a_file_that_is_cut_while_it_is_read_is_said(path):
  tensor = files.open_file(path)["a"]
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match=r"model.safetensors: ends before byte \d+; it was cut"):
    tensor.load()


def test_a_header_larger_than_any_is_refused_unread(tmp_path):
  path = tmp_path / "long.safetensors"
  path.write_bytes((1 << 40).to_bytes(8, "little"))
  os.truncate(path, 1 << 41)  # a hole, which takes no room
  with pytest.raises(ValueError, match="its header is to be 1099511627776 bytes long"):
    files.open_file(path)


@pytest.mark.parametrize("name", [files.SINGLE, files.INDEX])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(ValueError, match="a pipe, a socket or a device and not a regular file"):
    files.open_folder(tmp_path)
