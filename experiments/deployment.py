"""How the weights of a finished model lie in memory while it answers: the flag --resident.

_RESIDENT = deployment.define_resident()             # at the head of a main program
weights = deployment.deploy(weights, _RESIDENT.value)
"""

import sys
from typing import Any

import jax
from absl import flags

from lora_jax.compress import merging

PyTree = Any

flags.disclaim_key_flags()  # the flag is the main program's, not this module's


def define_resident() -> flags.FlagHolder[bool]:
  """Defines --resident for the calling program."""
  return flags.DEFINE_bool(
    "resident",
    False,
    "Keep a dequantized copy of quantized values: as fast and as large as a dense model. Without, "
    "they are dequantized at each use: as small as they are, and slower where the device has no "
    "product of such values. The sizes of both are printed.",
  )


def deploy(weights: PyTree, resident: bool) -> PyTree:
  """Returns weights for inference: adapters merged where nothing grows by it, no masks.

  Prints the bytes of both settings of --resident to standard error, if they differ.
  """
  kept = merging.keep_smaller(weights)
  small, copied = (
    _megabytes(jax.eval_shape(lambda x=x: merging.deployed(kept, resident=x)))
    for x in (False, True)
  )
  if small != copied:
    print(
      f"weights: {small:,.1f} MB if quantized values are dequantized at each use, {copied:,.1f} MB "
      f"with a dequantized copy; --resident={resident}",
      file=sys.stderr,  # standard output is for answers
    )
  return merging.deployed(kept, resident=resident)


def _megabytes(shapes: PyTree) -> float:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / 1e6
