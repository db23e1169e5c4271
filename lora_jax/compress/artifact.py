"""A model as an exported program and its parameters, which run without this package.

    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    artifact.save("runs/small/artifact", lora_jax.adapt(model.apply), params, inputs=tokens)

    program.bin           the forward pass, as `jax.export` writes it: StableHLO, with its versions
    params.safetensors    its parameters, by name
    tokenizer.json, ...   the tokenizer, if one is given

Running it needs only JAX and safetensors, on any platform that it was lowered for:

    program = jax.export.deserialize(bytearray(open("program.bin", "rb").read()))
    params = safetensors.numpy.load_file("params.safetensors")
    logits = program.call(params, tokens)               # int32 [rows, length], padded on the right

An encoder's program also takes which tokens are no padding, bool, and, where its config has types
of tokens, which text of a pair each belongs to, int32: `program.call(params, tokens, mask, types)`.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lora_jax import tree
from lora_jax.io import outputs, safetensors
from lora_jax.io.tokenizer import Tokenizer

PyTree = Any

PROGRAM, PARAMS = "program.bin", "params.safetensors"


def save(
  folder: str | Path,
  apply: Callable,
  params: PyTree,
  *,
  inputs: jax.ShapeDtypeStruct,
  platforms: Sequence[str] = ("cpu",),
  tokenizer: Tokenizer | None = None,
  options: Mapping[str, DTypeLike] = types.MappingProxyType({}),
) -> None:
  """Writes a model's forward pass to a new or empty folder, completely or not at all.

  Args:
    folder: the folder to write.
    apply: `apply({"params": params}, inputs) -> logits`; adapted, for params with Weights.
    params: arrays and Weights. Masks, quantized values and scales are arrays of the file. Values in
      fp8 are stored as bytes, since numpy's safetensors has no such dtype.
    inputs: the shape and dtype of the program's inputs: tokens, int32 [rows, length], or images.
    platforms: the platforms to lower for: "cpu", "cuda", "tpu".
    tokenizer: the model's tokenizer, written to the folder as well.
    options: {name: dtype} of the arguments that `apply` takes by name in addition to the inputs,
      in their shape. The program takes them after the inputs, in this order.

  Raises:
    FileExistsError: if the folder is not empty.
  """
  folder = outputs.new_folder(folder)
  leaves = tree.flatten(params)
  dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
  arrays = {name: _as_stored(np.asarray(leaf)) for name, leaf in leaves.items()}
  structure = jax.tree.structure(params)

  def forward(arrays, inputs, *others):
    leaves = [_as_used(arrays[name], dtype) for name, dtype in dtypes.items()]
    named = dict(zip(options, others, strict=True))
    made = apply({"params": jax.tree.unflatten(structure, leaves)}, inputs, **named)
    return tuple(made) if isinstance(made, tuple) else made  # no class of this package's

  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
  given = [inputs, *(jax.ShapeDtypeStruct(inputs.shape, x) for x in options.values())]
  program = jax.export.export(jax.jit(forward), platforms=tuple(platforms))(shapes, *given)
  with outputs.whole_folder(folder) as partial:
    outputs.write_bytes(partial / PROGRAM, program.serialize())
    safetensors.save_file(arrays, partial / PARAMS)
    if tokenizer is not None:
      tokenizer.save(partial)


def _as_stored(array: np.ndarray) -> np.ndarray:
  return array.view(np.uint8) if array.dtype == jnp.float8_e4m3fn else array


def _as_used(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)
