"""A model as a compiled-to-be program and its numbers, which run without this package.

    artifact.save("runs/small/artifact", lora_jax.adapt(model.apply), params, rows=1, length=128)

    program.bin           the forward pass, as `jax.export` writes it: StableHLO, with its versions
    params.safetensors    the arrays that it takes, by name
    tokenizer.json, ...   what makes tokens of a text, where a tokenizer is given

Whoever has JAX and safetensors runs it, on any of the platforms that it was lowered for:

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
  rows: int,
  length: int,
  platforms: Sequence[str] = ("cpu",),
  tokenizer: Tokenizer | None = None,
  options: Mapping[str, DTypeLike] = types.MappingProxyType({}),
) -> None:
  """Writes a folder with a model's forward pass, new or empty, which appears whole or not at all.

  Args:
    folder: to write.
    apply: `apply({"params": params}, tokens) -> logits`; adapted, for params with Weights.
    params: of arrays and Weights; masks, codes and scales are arrays of the file, codes in fp8 as
      the bytes that they are, which numpy's safetensors hold.
    rows, length: of the tokens that the program takes, int32 [rows, length].
    platforms: what it is lowered for: "cpu", "cuda", "tpu".
    tokenizer: of the model, to be written beside it.
    options: {name: dtype} of what `apply` takes by name besides the tokens, of their shape; the
      program takes them after these, in this order.

  Raises:
    FileExistsError: when the folder holds something.
  """
  folder = outputs.new_folder(folder)
  leaves = tree.flatten(params)
  dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
  arrays = {name: _as_stored(np.asarray(leaf)) for name, leaf in leaves.items()}
  structure = jax.tree.structure(params)

  def forward(arrays, tokens, *others):
    leaves = [_as_used(arrays[name], dtype) for name, dtype in dtypes.items()]
    named = dict(zip(options, others, strict=True))
    made = apply({"params": jax.tree.unflatten(structure, leaves)}, tokens, **named)
    return tuple(made) if isinstance(made, tuple) else made  # no class of this package's

  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
  given = [jax.ShapeDtypeStruct((rows, length), x) for x in (jnp.int32, *options.values())]
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
