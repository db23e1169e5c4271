"""GGUF files against the `gguf` package's own reader and writer, and damaged ones."""

import random
import struct

import gguf as peer
import numpy as np
import pytest

from lora_jax.io import gguf, pretrained
from lora_jax.io.assets import resolve


@pytest.fixture(scope="module")
def real_path():
  return resolve(pretrained.DEFAULT)


def quantized(kind: peer.GGMLQuantizationType) -> np.ndarray:
  return peer.quants.quantize(np.random.default_rng(0).normal(size=(3, 64)), kind)


@pytest.fixture
def small_path(tmp_path):
  path = tmp_path / "small.gguf"
  writer = peer.GGUFWriter(path, "llama")
  writer.add_uint32("llama.block_count", 3)
  writer.add_float32("llama.eps", 0.5)
  writer.add_bool("yes", True)
  writer.add_int64("negative", -(1 << 40))
  writer.add_string("name", "Größe")
  writer.add_array("words", ["a", "", "ç"])
  writer.add_array("numbers", [1, -2, 3])
  writer.add_array("nested", [[1, 2], [3]])
  writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
  writer.add_tensor("f16", np.arange(4, dtype=np.float16))
  kinds = peer.GGMLQuantizationType
  for kind in (kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q5_1):
    writer.add_tensor(kind.name, quantized(kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def assert_equal_to_peer(path):
  ours, theirs = gguf.read(path), peer.GGUFReader(path)
  fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
  assert ours.metadata.keys() == fields.keys()
  for key, value in fields.items():
    if key != "nested":  # the peer flattens arrays within arrays
      assert ours.metadata[key] == value, key
  assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
  for tensor in theirs.tensors:
    loaded = ours.tensors[tensor.name].load()
    assert loaded.dtype == np.float32
    assert loaded.shape == tuple(tensor.shape[::-1])
    np.testing.assert_array_equal(
      loaded, peer.quants.dequantize(tensor.data, tensor.tensor_type).reshape(loaded.shape)
    )


def test_a_small_file_reads_as_the_peer_reads_it(small_path):
  assert_equal_to_peer(small_path)
  assert gguf.read(small_path).metadata["nested"] == [[1, 2], [3]]


@pytest.mark.slow
def test_the_real_file_reads_as_the_peer_reads_it(real_path):
  assert_equal_to_peer(real_path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none.gguf: no such file"):
    gguf.read(tmp_path / "none.gguf")


@pytest.mark.parametrize(
  ("data", "words"),
  [
    (b"", "is empty"),
    (b"PK\x03\x04" + bytes(60), r"starts with b'PK\\x03\\x04' and not b'GGUF'"),
    (b"GGUF" + struct.pack("<I", 9) + bytes(60), "version is 9, known are 2 and 3"),
    (b"GGUF" + struct.pack("<I", 3), "byte 8 wants 8 more bytes, 0 are left"),
  ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, data, words):
  path = tmp_path / "bad.gguf"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=words):
    gguf.read(path)


def test_a_file_cut_short_anywhere_is_refused(small_path):
  data = small_path.read_bytes()
  # The last tensor ends before the padding that the writer puts after it.
  ends = [*range(1, 400, 7), *range(400, len(data) - 32, 97)]
  for end in ends:
    small_path.write_bytes(data[:end])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
      gguf.read(small_path)


def test_the_real_file_cut_short_is_refused_before_it_is_loaded(real_path, tmp_path):
  path = tmp_path / "cut.gguf"
  with real_path.open("rb") as file:
    path.write_bytes(file.read(50_000_000))
  with pytest.raises(ValueError, match=r"tensor '.*' of shape .* ends at byte"):
    pretrained.load(path)


@pytest.mark.timeout(60)
def test_a_changed_byte_gives_the_file_or_a_value_error_and_nothing_else(small_path):
  data = small_path.read_bytes()
  rng = random.Random(0)
  refused = 0
  for _ in range(3000):
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
      changed[rng.randrange(1200)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    small_path.write_bytes(changed)
    try:
      for tensor in gguf.read(small_path).tensors.values():
        tensor.load()
    except ValueError:
      refused += 1
  assert refused > 100


@pytest.mark.timeout(10)
@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("item", [0, 8, 9])
def test_a_false_length_ends_at_the_end_of_the_file(tmp_path, item, count):
  key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, item, count)
  path = tmp_path / "long.gguf"
  path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(4096))
  with pytest.raises(ValueError, match=r"more bytes, \d+ are left"):
    gguf.read(path)


def test_a_tensor_larger_than_the_file_is_refused_by_name_and_shape(small_path):
  data = small_path.read_bytes()
  rows = struct.pack("<QQ", 3, 2)
  assert data.count(b"f32" + struct.pack("<I", 2) + rows) == 1
  small_path.write_bytes(data.replace(rows, struct.pack("<QQ", 1 << 60, 1 << 62)))
  with pytest.raises(ValueError, match=r"tensor 'f32' of shape \(\d{19}, \d{19}\) ends at byte"):
    gguf.read(small_path)


def test_a_kind_without_dequantisation_is_refused_with_a_remedy(tmp_path):
  path = tmp_path / "integers.gguf"
  writer = peer.GGUFWriter(path, "llama")
  writer.add_tensor("i8", np.arange(4, dtype=np.int8))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match=r"i8: the `gguf` package cannot dequantize I8; take"):
    gguf.read(path).tensors["i8"].load()
