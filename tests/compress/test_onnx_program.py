"""Models as ONNX files, run by an interpreter that has neither JAX nor this package."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import readme_commands
import tiny_encoder
from functions import normal

import lora_jax
from lora_jax import families
from lora_jax.compress import onnx_program
from lora_jax.models import mobilenet, ssdlite
from lora_jax.weights import Factored, Pruned
from lora_jax.weights.quantized import Format, quantized

jax2onnx = pytest.importorskip("jax2onnx", reason='needs jax2onnx: pip install -e ".[onnx]"')

RUN = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
given = dict(np.load(sys.argv[1] + "/given.npz"))
assert [x.name for x in session.get_inputs()] == list(given)
found = session.run(None, given)
names = [x.name for x in session.get_outputs()]
np.savez(sys.argv[1] + "/found.npz", **dict(zip(names, found)))
assert not {"jax", "lora_jax"} & set(sys.modules)
"""


def run(folder, **given) -> dict[str, np.ndarray]:
  np.savez(folder / "given.npz", **given)
  subprocess.run([sys.executable, "-I", "-c", RUN, str(folder)], check=True, cwd=folder)
  return dict(np.load(folder / "found.npz"))


def apply(variables, tokens):
  p = variables["params"]
  hidden = jnp.tanh(p["embed"][tokens] @ p["up"]) @ p["down"]
  return hidden @ p["embed"].T


IDS = jax.ShapeDtypeStruct((1, 3), jnp.int32)


@pytest.mark.parametrize("levels", ["int8", "nf4", "int4"])
def test_factors_masks_and_quantized_values_stay_as_they_are(tmp_path, levels):
  size = 256
  params = {
    "embed": normal(7, 8),
    "up": Factored(normal(8, 2), normal(2, size)),
    "down": Pruned(
      quantized(normal(size, 8), Format(levels=levels), (-2,)), jnp.abs(normal(size, 8)) > 0.1
    ),
  }
  adapted = lora_jax.adapt(apply)
  error = onnx_program.save(tmp_path / "model", adapted, params, inputs=IDS, tokens=7)
  assert error < 1e-5
  tokens = np.array([[0, 3, 5]], np.int32)
  found = run(tmp_path / "model", inputs=tokens)
  expected = adapted({"params": params}, tokens)
  np.testing.assert_allclose(found["output"], expected, rtol=1e-5, atol=1e-6)


IMAGES = {"width_multiplier": 0.1, "image_size": 64}
MODELS = {
  "bert": dataclasses.replace(tiny_encoder.SMALLEST, num_layers=2, scan_layers=True),
  "mobilenet": mobilenet.MobileNetV2Config(classes=("a", "b"), **IMAGES),
  "ssdlite": ssdlite.SSDLiteConfig(
    classes=("a", "b"), scales=((0.1, 0.2), (0.4,), (0.8,)), ratios=(1.0, 2.0), **IMAGES
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_outputs(tmp_path, name):
  config = MODELS[name]
  family = families.family_of(config)
  model, inputs = family.make_model(config), family.inputs(config, 2, 8 if name == "bert" else None)
  params = model.init(jax.random.key(0), jnp.zeros(inputs.shape, inputs.dtype))["params"]
  options = family.options(config)
  onnx_program.save(
    tmp_path / "model", model.apply, params, inputs=inputs, options=options, tokens=16
  )
  rng = np.random.default_rng(1)
  given = {"inputs": rng.standard_normal(inputs.shape).astype(np.float32)}
  if name == "bert":
    tokens = rng.integers(0, 16, inputs.shape).astype(np.int32)
    given = {"inputs": tokens, "mask_BT": tokens > 0, "types_BT": tokens % 2}
  found = run(tmp_path / "model", **given)
  x, *others = given.values()
  expected = model.apply({"params": params}, x, **dict(zip(options, others, strict=True)))
  for a, b in zip(found.values(), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, abs(b).max()))


def test_the_program_of_the_docs_runs(tmp_path):
  config, inputs = MODELS["mobilenet"], jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  model = mobilenet.MobileNetV2(config)
  params = model.init(jax.random.key(0), jnp.zeros(inputs.shape))["params"]
  onnx_program.save(tmp_path / "runs/onnx", model.apply, params, inputs=inputs)
  code = readme_commands.exported_program("runs in ONNX Runtime") + "assert logits.shape == (1, 2)"
  subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)


def test_large_parameters_are_a_file_of_their_own(tmp_path, monkeypatch):
  monkeypatch.setattr(onnx_program, "_ONE_FILE", 1000)
  params = {"embed": normal(7, 8), "up": normal(8, 256), "down": normal(256, 8)}
  onnx_program.save(tmp_path / "model", apply, params, inputs=IDS, tokens=7)
  assert (tmp_path / "model" / onnx_program.DATA).stat().st_size > 2 * 4 * 8 * 256 - 1
  tokens = np.array([[0, 3, 5]], np.int32)
  found = run(tmp_path / "model", inputs=tokens)
  np.testing.assert_allclose(found["output"], apply({"params": params}, tokens), atol=1e-5)


def test_a_program_that_differs_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
  convert = onnx_program.convert

  def wrong(*args, **kwargs):
    program = convert(*args, **kwargs)
    return program._replace(forward=lambda x: tuple(1.01 * y for y in program.forward(x)))

  monkeypatch.setattr(onnx_program, "convert", wrong)
  params = {"embed": normal(7, 8), "up": normal(8, 6), "down": normal(6, 8)}
  with pytest.raises(ValueError, match=r"differs by 9\.9e-03 of the largest output"):
    onnx_program.save(tmp_path / "model", apply, params, inputs=IDS, tokens=7)
  assert not (tmp_path / "model").exists()


def test_an_operation_that_is_not_known_is_refused_with_the_reason(tmp_path):
  def unknown(variables, tokens):
    rows = variables["params"]["embed"][tokens]
    return jax.pure_callback(np.sin, rows, rows)

  with pytest.raises(ValueError, match=r"jax2onnx .* cannot convert this program: .*pure_callback"):
    onnx_program.save(tmp_path / "model", unknown, {"embed": normal(7, 8)}, inputs=IDS)
  assert not (tmp_path / "model").exists()
