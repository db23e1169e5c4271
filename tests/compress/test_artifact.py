"""An exported program, run by an interpreter that never sees this package."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder
from functions import normal

import lora_jax
from lora_jax import families
from lora_jax.compress import artifact
from lora_jax.models import bert
from lora_jax.weights import Factored, Pruned
from lora_jax.weights.quantized import Format, quantized

RUN = """
import sys, numpy as np, jax, jax.export, safetensors.numpy
program = jax.export.deserialize(bytearray(open(sys.argv[1] + "/program.bin", "rb").read()))
params = safetensors.numpy.load_file(sys.argv[1] + "/params.safetensors")
logits = program.call(params, np.array([[0, 3, 5]], np.int32))
np.save(sys.argv[1] + "/logits.npy", np.asarray(logits))
assert not any(name.startswith("lora_jax") for name in sys.modules)
"""


def apply(variables, tokens):
  p = variables["params"]
  hidden = jnp.tanh(p["embed"][tokens] @ p["up"]) @ p["down"]
  return hidden @ p["embed"].T


@pytest.mark.parametrize(("levels", "dtype"), [("int8", jnp.float32), ("fp8", jnp.bfloat16)])
def test_it_computes_the_logits_without_this_package(tmp_path, levels, dtype):
  params = {
    "embed": normal(7, 8).astype(dtype),
    "up": Factored(normal(8, 2), normal(2, 6)),
    "down": Pruned(
      quantized(normal(6, 8), Format(levels=levels), (-2,)), jnp.abs(normal(6, 8)) > 0.1
    ),
  }
  adapted = lora_jax.adapt(apply)
  artifact.save(tmp_path / "model", adapted, params, inputs=jax.ShapeDtypeStruct((1, 3), jnp.int32))
  subprocess.run(
    [sys.executable, "-I", "-c", RUN, str(tmp_path / "model")], check=True, cwd=tmp_path
  )
  found = np.load(tmp_path / "model/logits.npy")
  expected = adapted({"params": params}, jnp.array([[0, 3, 5]]))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  names = set(lora_jax.tree.flatten(params))
  assert "up/a" in names and len(names) == len(jax.tree.leaves(params))


RUN_ENCODER = """
import sys, numpy as np, jax, jax.export, safetensors.numpy
program = jax.export.deserialize(bytearray(open(sys.argv[1] + "/program.bin", "rb").read()))
params = safetensors.numpy.load_file(sys.argv[1] + "/params.safetensors")
tokens = np.array([[1, 3, 5, 0], [2, 0, 0, 0]], np.int32)
logits = program.call(params, tokens, tokens > 0, tokens % 2)
np.save(sys.argv[1] + "/logits.npy", np.asarray(logits))
assert not any(name.startswith("lora_jax") for name in sys.modules)
"""


def test_an_encoders_program_takes_where_padding_is_and_which_text_a_token_is_of(tmp_path):
  config = tiny_encoder.SMALLEST
  model, tokens = bert.Bert(config), np.array([[1, 3, 5, 0], [2, 0, 0, 0]], np.int32)
  params = model.init(jax.random.key(0), tokens)["params"]
  options = families.family_of(config).options(config)
  assert list(options) == ["mask_BT", "types_BT"]
  inputs = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
  artifact.save(tmp_path / "model", model.apply, params, inputs=inputs, options=options)
  command = [sys.executable, "-I", "-c", RUN_ENCODER, str(tmp_path / "model")]
  subprocess.run(command, check=True, cwd=tmp_path)
  found = np.load(tmp_path / "model/logits.npy")
  expected = model.apply({"params": params}, tokens, mask_BT=tokens > 0, types_BT=tokens % 2)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert abs(found - model.apply({"params": params}, tokens)).max() > 1e-3


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(FileExistsError, match="holds something already"):
    artifact.save(
      tmp_path, apply, {"embed": normal(7, 8)}, inputs=jax.ShapeDtypeStruct((1, 3), jnp.int32)
    )
