"""Adapters' folders: what is checked before a tensor is read, and what a write leaves behind."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from lora_jax.exchange import peft_files
from lora_jax.io import safetensors

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS = {NAME: np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture
def folder(tmp_path):
  peft_files.write(tmp_path / "adapter", CONFIG, TENSORS)
  return tmp_path / "adapter"


def write_tensors(folder, tensors):
  safetensors.save_file(tensors, folder / "adapter_model.safetensors")


def test_what_is_written_is_read(folder):
  file = peft_files.read(folder)
  assert file.config["r"] == 2
  assert file.shapes == {NAME: (2, 3)}
  np.testing.assert_array_equal(file.load(NAME), TENSORS[NAME])
  assert safetensors.tensor_names(folder / "adapter_model.safetensors") == [
    f"base_model.model.{NAME}"  # as peft has it
  ]
  assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floats_come_as_float32(folder, dtype):
  write_tensors(folder, {f"base_model.model.{NAME}": TENSORS[NAME].astype(dtype)})
  tensor = peft_files.read(folder).load(NAME)
  assert tensor.dtype == np.float32
  np.testing.assert_array_equal(tensor, TENSORS[NAME])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(folder, value):
  write_tensors(folder, {f"base_model.model.{NAME}": np.full((2, 3), value, np.float64)})
  with pytest.raises(ValueError, match=r"q_proj.lora_A.weight: holds values that are not finite"):
    peft_files.read(folder).load(NAME)


@pytest.mark.parametrize(
  ("tensors", "words"),
  [
    ({f"base_model.model.{NAME}": np.ones((2, 3), np.int32)}, r"lora_A.weight \(I32\)"),
    ({f"base_model.model.{NAME}": np.ones((2, 3), np.int8)}, r"lora_A.weight \(I8\)"),
    ({NAME: np.ones((2, 3), np.float32)}, "1 tensors are not named base_model.model"),
    ({"../../etc/passwd": np.ones(1, np.float32)}, "etc/passwd"),
    ({"base_model.vera_C": np.ones(1, np.float32)}, "vera_C"),
    ({"x" * 100_000: np.ones(1, np.float32)}, "are not named"),
  ],
)
def test_tensors_of_another_dtype_or_of_no_model_are_refused(folder, tensors, words):
  write_tensors(folder, tensors)
  with pytest.raises(ValueError, match=words) as error:
    peft_files.read(folder)
  assert len(str(error.value)) < 2000


def header(content: bytes, size: int | None = None, data: bytes = bytes(24)) -> bytes:
  return struct.pack("<Q", len(content) if size is None else size) + content + data


def entry(name=NAME, dtype="F32", shape=(2, 3), end=24) -> bytes:
  fields = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
  return f'"base_model.model.{name}": {json.dumps(fields)}'.encode()


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\x01",
    header(b"{", size=2**63),
    header(b"{", size=10**9),
    header(b"[" * 100_000),
    header(b"{}" + b" " * 100, size=50),
    header(b"{" + entry(end=1000) + b"}"),
    header(b"{" + entry(shape=(2, -3)) + b"}"),
    header(b"{" + entry(shape=(2**20, 2**40)) + b"}"),
    header(b"{" + entry(dtype="F33") + b"}"),
    header(b"{" + entry() + b", " + entry("x") + b"}"),
  ],
  ids=[
    "empty", "a byte", "endless header", "header past the end", "nested", "cut header",
    "offsets past the end", "negative size", "sizes that overflow", "unknown dtype", "overlap",
  ],
)  # fmt: skip
def test_a_file_that_is_no_whole_safetensors_file_is_refused(folder, content):
  (folder / "adapter_model.safetensors").write_bytes(content)
  with pytest.raises(ValueError, match=r"adapter_model.safetensors: not a whole safetensors file"):
    peft_files.read(folder)


def test_a_huge_config_is_refused_before_it_is_parsed(folder):
  os.truncate(folder / "adapter_config.json", 1 << 40)  # a hole, which takes no room
  with pytest.raises(ValueError, match=r"adapter_config.json: is larger than the 16,777,216 bytes"):
    peft_files.read(folder)


def test_missing_files_are_named_with_the_remedy(folder, tmp_path):
  (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
  with pytest.raises(
    FileNotFoundError, match=r"pickled weights \(adapter_model.bin\) are not read"
  ):
    peft_files.read(folder)
  (folder / "adapter_config.json").unlink()
  (folder / "adapter_config.json").mkdir()
  with pytest.raises(FileNotFoundError, match=r"adapter_config.json: no such file; an adapter's"):
    peft_files.read(folder)
  with pytest.raises(FileNotFoundError, match=r"nothing/adapter_config.json"):
    peft_files.read(tmp_path / "nothing")


def test_a_config_is_refused_with_its_path(folder):
  (folder / "adapter_config.json").write_text("{")
  with pytest.raises(ValueError, match=r"adapter/adapter_config.json: not JSON"):
    peft_files.read(folder)


def test_an_adapter_is_replaced_and_anything_else_is_not(folder):
  (folder / "README.md").write_text("written by peft")
  peft_files.write(folder, CONFIG | {"r": 3}, TENSORS)
  assert peft_files.read(folder).config["r"] == 3
  assert {path.name for path in folder.iterdir()} == {
    "adapter_config.json",
    "adapter_model.safetensors",
  }
  (folder / "notes.txt").write_text("mine")
  with pytest.raises(FileExistsError, match=r"holds notes.txt, which is no adapter's"):
    peft_files.write(folder, CONFIG, TENSORS)
  assert (folder / "notes.txt").read_text() == "mine"
  assert peft_files.read(folder).config["r"] == 3


def test_a_write_that_fails_leaves_what_was_there(folder):
  with pytest.raises(TypeError):
    peft_files.write(folder, {"peft_type": object()}, TENSORS)
  assert peft_files.read(folder).config["r"] == 2
  assert os.listdir(folder.parent) == ["adapter"]
