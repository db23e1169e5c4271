"""A compressed model's folder: what is written is read again, and nothing hostile is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lora_jax import families, is_weight, tree
from lora_jax.compress import storage
from lora_jax.io import pretrained, safetensors
from lora_jax.models import llama
from lora_jax.weights import Factored, LowRank, Pruned
from lora_jax.weights.quantized import Format, quantized

CONFIG = llama.LlamaConfig(
  vocab_size=49152,
  width=8,
  mlp_width=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  value_dim=3,
  max_length=16,
  tie_embeddings=True,
)
FORMATS = {
  "query": Format(levels="int8"),
  "key": Format(levels="fp8"),
  "value": Format(levels="nf4", block=4, double=True),
}


@pytest.fixture(scope="module")
def tokenizer():
  return pretrained.inspect(pretrained.DEFAULT).tokenizer


def model():
  """A tree with every kind of leaf, among them factors and pruned numbers that are quantised."""
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    name = path.split("/")[-2]
    if name in FORMATS:
      return quantized(w, FORMATS[name], (-2,)).with_path(path)
    mask = jnp.asarray(rng.random(shape) > 0.5)
    if name == "gate":
      return Factored(w[:, :2], w[:2], path=path)
    if name == "up":
      a, b = (quantized(x, Format(levels="int8"), (-2,)) for x in (w[:, :2], w[:2]))
      return Factored(a, b, path=path)
    if name == "down":
      return Pruned.of(w, mask, path)
    if name == "out":
      return Pruned(quantized(jnp.where(mask, w, 0), Format(levels="int8"), (-2,)), mask, path=path)
    return w

  leaves = {path: leaf(path, shape) for path, shape in families.param_shapes(CONFIG).items()}
  return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.fixture
def folder(tmp_path, tokenizer):
  storage.save(tmp_path / "model", model(), CONFIG, tokenizer, steps=["factorize"])
  return tmp_path / "model"


def test_every_kind_of_leaf_is_read_as_it_was_written(folder):
  found = storage.load(folder)
  assert storage.is_compressed(folder) and not storage.is_compressed(folder.parent)
  assert (found.config.value_dim, found.config.width) == (3, 8)
  expected = model()
  assert jax.tree.structure(found.params) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_the_configuration_and_the_dense_shapes_are_known_without_the_tensors(folder):
  found = storage.load(folder, dtype=jnp.bfloat16)
  (folder / storage.TENSORS).unlink()
  shapes = storage.inspect(folder, dtype=jnp.bfloat16)
  assert shapes.config == found.config and shapes.source == found.source
  assert shapes.tokenizer.to_json() == found.tokenizer.to_json()
  leaves = tree.flatten(found.params, is_leaf=is_weight)
  assert {path: (x.shape, x.dtype) for path, x in tree.flatten(shapes.params).items()} == {
    path: (tuple(x.shape), jnp.bfloat16) for path, x in leaves.items()
  }
  stacked = storage.inspect(folder, scan_layers=True)
  assert tree.flatten(stacked.params)["blocks/mlp/gate/kernel"].shape == (2, 8, 16)


def test_the_steps_are_known_without_the_model_and_taken_for_hostile(folder):
  assert storage.steps_of(folder) == ("factorize",)
  structure = json.loads((folder / storage.STRUCTURE).read_text())
  (folder / storage.STRUCTURE).write_text(json.dumps(structure | {"steps": ["prune", {"a": 1}]}))
  with pytest.raises(ValueError, match="are not names"):
    storage.steps_of(folder)


def test_what_a_mask_hides_takes_no_room(folder):
  kinds = safetensors.tensor_kinds(folder / storage.TENSORS)
  mask = model()["block_0"]["mlp"]["down"]["kernel"].mask
  assert kinds["block_0/mlp/down/kernel#w"][0] == (int(mask.sum()),)
  assert kinds["block_0/mlp/down/kernel#mask"] == ((mask.size // 8,), "U8")
  written = sum(
    np.prod(shape) * {"F32": 4, "U8": 1, "I8": 1}[dtype] for shape, dtype in kinds.values()
  )
  assert written == storage.size(model())


def test_another_dtype_changes_floats_and_no_codes(folder):
  found = tree.flatten(storage.load(folder, dtype=jnp.bfloat16).params, is_leaf=is_weight)
  kernel = found["block_0/attn/query/kernel"]
  assert kernel.codes.dtype == jnp.int8 and kernel.dtype == jnp.bfloat16
  assert found["block_0/mlp/gate/kernel"].a.dtype == jnp.bfloat16


def test_layers_that_are_compressed_alike_are_stacked_and_others_refused(
  folder, tmp_path, tokenizer
):
  params = model()
  for block in ("block_0", "block_1"):
    del params[block]["mlp"]["up"]
    params[block]["mlp"]["up"] = params[block]["mlp"]["gate"]
  storage.save(tmp_path / "alike", params, CONFIG, tokenizer)
  stacked = storage.load(tmp_path / "alike", scan_layers=True)
  gate = stacked.params["blocks"]["mlp"]["gate"]["kernel"]
  assert gate.a.shape == (2, 8, 2) and gate.shape == (2, 8, 16)
  w = params["block_1"]["mlp"]["gate"]["kernel"]
  params["block_1"]["mlp"]["gate"]["kernel"] = Factored(w.a[:, :1], w.b[:1])
  storage.save(tmp_path / "unlike", params, CONFIG, tokenizer)
  with pytest.raises(ValueError, match=r"not compressed alike .* set scan_layers to False"):
    storage.load(tmp_path / "unlike", scan_layers=True)


def test_what_cannot_be_stored_is_refused_and_nothing_is_written(tmp_path, tokenizer):
  params = model()
  w = params["block_0"]["mlp"]["gate"]["kernel"]
  params["block_0"]["mlp"]["gate"]["kernel"] = LowRank(w, w.a, w.b)
  with pytest.raises(TypeError, match="gate/kernel: a LowRank cannot be stored"):
    storage.save(tmp_path / "model", params, CONFIG, tokenizer)
  assert not (tmp_path / "model").exists()
  (tmp_path / "full").mkdir()
  (tmp_path / "full/file").touch()
  with pytest.raises(FileExistsError, match="holds something already"):
    storage.save(tmp_path / "full", model(), CONFIG, tokenizer)


def change_leaf(path, **fields):
  def change(structure):
    structure["leaves"][path] |= fields

  return change


GATE = "block_0/mlp/gate/kernel"
DOWN = "block_0/mlp/down/kernel"


HOSTILE = [
  (lambda s: s.update(version=2), "not the structure"),
  (lambda s: s.update(code="import os"), "not the structure"),
  (lambda s: s.update(leaves=[]), "leaves is a list"),
  (lambda s: s.update(value_dim=5), "value_dim 5 must be"),
  (lambda s: s["leaves"].pop(GATE), f"missing: .*{GATE}"),
  (lambda s: s["leaves"].update({"block_0/evil": 1}), "unexpected: .*block_0/evil"),
  (change_leaf(GATE, kind="LowRank"), "describes no Weight of Factored, Pruned, Quantized"),
  (change_leaf(GATE, kind="os.system"), "describes no Weight"),
  (change_leaf(GATE, settings={"path": "x"}), "a Factored has no setting 'path'"),
  (change_leaf(GATE, settings={"roles": "ioo"}), "do not fit each other|the configuration says"),
  (lambda s: s["leaves"][GATE]["parts"].update(w=s["leaves"]["norm/scale"]), "no part 'w'"),
  (lambda s: s["leaves"][GATE]["parts"].pop("b"), "does not hold the tensors"),
  (
    lambda s: s["leaves"][GATE]["parts"]["a"].update(tensor="../../etc/passwd"),
    "does not hold the tensors",
  ),
  (lambda s: s["leaves"][GATE]["parts"]["a"].update(dtype="object"), "describes no tensor"),
  (lambda s: s["leaves"][GATE]["parts"]["a"].update(shape=[8, -2]), "is not a shape"),
  (lambda s: s["leaves"][GATE]["parts"]["a"].update(shape=[4, 4]), "says float32"),
  (
    lambda s: s["leaves"][DOWN]["parts"]["mask"].update(shape=[10**9]),
    "does not hold 1000000000 bits",
  ),
  (lambda s: s["leaves"]["norm/scale"].update(dtype="int8"), "says int8"),
  (lambda s: s["leaves"].pop("norm/scale"), "None describes no leaf"),
  (lambda s: s["leaves"].update({"norm/scale": 2}), "2 describes no leaf"),
]


@pytest.mark.parametrize(
  ("change", "words"),
  # At every commit every second one.
  [pytest.param(*x, marks=pytest.mark.slow) if n % 2 else x for n, x in enumerate(HOSTILE)],
)
def test_a_hostile_structure_is_refused(folder, change, words):
  path = folder / storage.STRUCTURE
  structure = json.loads(path.read_text())
  change(structure)
  path.write_text(json.dumps(structure))
  with pytest.raises(ValueError, match=words):
    storage.load(folder)


@pytest.mark.parametrize(
  ("name", "value", "words"),
  [
    (f"{GATE}#a", np.full((8, 2), np.nan, np.float32), "holds values that are not finite"),
    (f"{DOWN}#w", np.zeros(3, np.float32), "says float32"),
    ("extra", np.zeros(3, np.float32), "unexpected: .*extra"),
  ],
)
def test_a_damaged_tensor_is_refused(folder, name, value, words):
  tensors = safetensors.load_file(folder / storage.TENSORS)
  safetensors.save_file(tensors | {name: value}, folder / storage.TENSORS)
  with pytest.raises(ValueError, match=words):
    storage.load(folder)


def test_a_file_that_is_cut_short_is_refused(folder):
  path = folder / storage.TENSORS
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    storage.load(folder)
