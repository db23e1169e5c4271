"""What tells a file that was replaced under its path."""

import hashlib
import json

import numpy as np
import pytest

from lora_jax.io import fingerprints, safetensors


def test_a_small_file_has_the_hash_of_all_of_it(tmp_path):
  path = tmp_path / "data.jsonl"
  path.write_text("one\n")
  digest = hashlib.sha256(b"one\n").hexdigest()
  assert fingerprints.of(path) == {"data.jsonl": f"4 bytes, sha256 {digest}"}
  path.write_text("two\n")
  assert fingerprints.of(path) != {"data.jsonl": f"4 bytes, sha256 {digest}"}


def test_of_a_large_file_the_size_the_ends_and_what_is_between_count(tmp_path):
  path, size = tmp_path / "large", 3 << 26
  with path.open("wb") as file:
    file.truncate(size)
  whole = fingerprints.of(path)
  assert whole["large"].startswith(f"{size} bytes, sha256 ")
  for place, changed in ((0, 1), (size // 2, 1 << 22), (size - 1, 1)):
    with path.open("r+b") as file:
      file.seek(place)
      file.write(b"x" * changed)
    assert fingerprints.of(path) != whole
    with path.open("r+b") as file:
      file.seek(place)
      file.write(b"\0" * changed)
  assert fingerprints.of(path) == whole
  with path.open("ab") as file:
    file.write(b"\0")
  assert fingerprints.of(path) != whole


def test_of_a_model_s_folder_only_what_is_read_counts(tmp_path):
  safetensors.save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text("{}")
  before = fingerprints.of(tmp_path)
  assert set(before) == {"model.safetensors", "config.json"}
  (tmp_path / "README.md").write_text("a word")
  (tmp_path / "trainer_state.json").write_text("{}")
  (tmp_path / "model.safetensors.index.json").write_text("stale")
  assert fingerprints.of(tmp_path) == before
  safetensors.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
  assert fingerprints.of(tmp_path)["model.safetensors"] != before["model.safetensors"]
  (tmp_path / "tokenizer.json").write_text("{}")
  assert "tokenizer.json" in fingerprints.of(tmp_path)


def test_of_a_sharded_model_every_shard_counts(tmp_path):
  for n in (1, 2):
    safetensors.save_file({f"{n}": np.ones(3, np.float32)}, tmp_path / f"{n}.safetensors")
  places = {"1": "1.safetensors", "2": "2.safetensors"}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  assert set(fingerprints.of(tmp_path)) == {*places.values(), "model.safetensors.index.json"}


def test_what_is_on_pypi_never_changes_and_what_is_missing_is_said():
  assert fingerprints.of("pypi://package==1.0/table.csv") == {}
  with pytest.raises(FileNotFoundError, match="no such file or folder"):
    fingerprints.of("nothing.csv")


def test_of_class_folders_of_pictures_names_and_contents_count(tmp_path):
  folder = tmp_path / "animals"
  (folder / "cat").mkdir(parents=True)
  (folder / "cat" / "1.png").write_bytes(b"one")
  found = [fingerprints.of(folder)]
  assert found[0]["animals/"].startswith("1 files, sha256 ")
  (folder / "cat" / "1.png").write_bytes(b"two")
  found.append(fingerprints.of(folder))
  (folder / "cat" / "1.png").rename(folder / "cat" / "2.png")
  found.append(fingerprints.of(folder))
  (folder / "dog").mkdir()
  (folder / "dog" / "1.png").write_bytes(b"two")
  found.append(fingerprints.of(folder))
  assert len({str(each) for each in found}) == 4 and fingerprints.of(folder) == found[-1]
