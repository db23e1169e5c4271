"""A model as a compiled-to-be program and its numbers, which run without this package.

    artifact.save("runs/small/artifact", lora_jax.adapt(model.apply), params, rows=1, length=128)

    program.bin           the forward pass, as `jax.export` writes it: StableHLO, with its versions
    params.safetensors    the arrays that it takes, by name

Whoever has JAX and safetensors runs it, on any of the platforms that it was lowered for:

    program = jax.export.deserialize(open("program.bin", "rb").read())
    params  = safetensors.numpy.load_file("params.safetensors")
    logits  = program.call(params, tokens)               # int32 [rows, length], padded on the right
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.io import safetensors

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
) -> None:
  """Writes a folder with a model's forward pass, new or empty, which appears whole or not at all.

  Args:
    folder: to write.
    apply: `apply({"params": params}, tokens) -> logits`; adapted, for params with Weights.
    params: of arrays and Weights; masks, codes and scales are arrays of the file.
    rows, length: of the tokens that the program takes, int32 [rows, length].
    platforms: what it is lowered for: "cpu", "cuda", "tpu".

  Raises:
    FileExistsError: when the folder holds something.
    TypeError: when an array is of a dtype that safetensors lacks (fp8, as numpy has it).
  """
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"{folder}: holds something already; name a new or an empty folder")
  arrays = tree.flatten(params)
  for name, array in arrays.items():
    if array.dtype == jnp.float8_e4m3fn:
      raise TypeError(f"{name}: numpy's safetensors hold no fp8; quantise to int8 instead")
  structure = jax.tree.structure(params)
  names = list(arrays)

  def forward(arrays, tokens):
    leaves = [arrays[name] for name in names]
    return apply({"params": jax.tree.unflatten(structure, leaves)}, tokens)

  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  program = jax.export.export(jax.jit(forward), platforms=tuple(platforms))(shapes, tokens)
  partial = folder.with_name(f".{folder.name}.{os.getpid()}")
  partial.mkdir(parents=True)
  try:
    (partial / PROGRAM).write_bytes(program.serialize())
    safetensors.save_file({name: np.asarray(x) for name, x in arrays.items()}, partial / PARAMS)
    partial.replace(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
