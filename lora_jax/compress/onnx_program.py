"""A model as an ONNX file, which runs in ONNX Runtime without JAX and without this package.

    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    error = onnx_program.save("runs/small/onnx", lora_jax.adapt(model.apply), params, inputs=images)

    model.onnx            the forward pass and its parameters, for inputs of this one shape
    tokenizer.json, ...   the tokenizer, if one is given

Running it needs onnxruntime and NumPy:

    session = onnxruntime.InferenceSession("runs/small/onnx/model.onnx")
    outputs = session.run(None, {"inputs": images})

The conversion is by the library jax2onnx. The file is run once, and kept if its outputs are JAX's.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.typing import DTypeLike

from lora_jax.io import outputs
from lora_jax.io.tokenizer import Tokenizer

PyTree = Any

MODEL, DATA = "model.onnx", "model.onnx.data"
INPUTS = "inputs"

TOLERANCE = 1e-4
"""The largest difference between the two programs' outputs, relative to the largest output."""

_ONE_FILE = 1 << 30
"""Bytes of parameters above which they are a file of their own; Protobuf ends at 2 GB."""


class Program(NamedTuple):
  """A converted forward pass.

  Attributes:
    model: the `onnx.ModelProto`.
    names: of its inputs, in their order.
    forward: the same in JAX, from these inputs to a tuple of outputs.
  """

  model: Any
  names: tuple[str, ...]
  forward: Callable[..., tuple[jax.Array, ...]]

  def session(self, model: str | bytes | None = None) -> Callable[..., Sequence[Any]]:
    """The forward pass in ONNX Runtime, from arrays in the order of `names` to a list of arrays.

    model: its file, or its bytes; None: this program's own.
    """
    import onnxruntime  # a dependency of jax2onnx, and slow to import

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    source = self.model.SerializeToString() if model is None else model
    run = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return lambda *given: run.run(
      None, {name: np.asarray(x) for name, x in zip(self.names, given, strict=True)}
    )


def convert(forward: Callable, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> Program:
  """Converts a function of arrays, with the parameters that it holds.

  Args:
    forward: the function, from the inputs in their order to an array or a tuple of arrays. The
      fields of a named tuple become the names of the outputs.
    inputs: {name: shape and dtype}.

  Raises:
    ImportError: if jax2onnx is not installed.
    ValueError: if jax2onnx does not know a primitive of the program.
  """
  jax2onnx = require_jax2onnx()
  fields: Sequence[str] = ()

  def outputs_of(*arrays):
    nonlocal fields
    made = forward(*arrays)
    fields = getattr(made, "_fields", ())
    return tuple(made) if isinstance(made, tuple) else (made,)

  shapes = list(inputs.values())
  # jax2onnx replaces functions of jax.numpy while it traces, which a model may rely on. A program
  # that is traced before has primitives alone.
  traced = jax.make_jaxpr(outputs_of)(*shapes)
  count = len(traced.out_avals)
  numbered = [f"output_{n}" for n in range(count)] if count > 1 else ["output"]
  try:
    model = jax2onnx.to_onnx(
      jaxpr_as_fun(traced),
      shapes,
      model_name="model",
      input_names=list(inputs),
      output_names=list(fields) or numbered,
    )
  except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
    raise ValueError(
      f"jax2onnx {metadata.version('jax2onnx')} cannot convert this program: {error!s:.400}"
    ) from error
  return Program(model, tuple(inputs), jax.jit(outputs_of))


def save(
  folder: str | Path,
  apply: Callable,
  params: PyTree,
  *,
  inputs: jax.ShapeDtypeStruct,
  options: Mapping[str, DTypeLike] = types.MappingProxyType({}),
  tokens: int = 2,
  tokenizer: Tokenizer | None = None,
) -> float:
  """Writes a model's forward pass to a new or empty folder, completely or not at all.

  Args:
    folder: the folder to write.
    apply: `apply({"params": params}, inputs) -> outputs`, an array or a tuple of arrays; adapted,
      for params with Weights.
    params: arrays and Weights. Factors and quantized values stay as they are.
    inputs: the shape and dtype of the inputs: tokens, int32 [rows, length], or images. The program
      calls them "inputs".
    options: {name: dtype} of the arguments that `apply` takes by name in addition to the inputs,
      in their shape. The program has them under these names.
    tokens: the size of the vocabulary, for inputs that are tokens.
    tokenizer: the model's tokenizer, written to the folder as well.

  Returns:
    The largest difference between ONNX Runtime's outputs and JAX's for random inputs, relative to
    the largest output.

  Raises:
    FileExistsError: if the folder is not empty.
    ImportError: if jax2onnx is not installed.
    ValueError: if it does not know a primitive of the program, or if the difference is more than
      TOLERANCE.
  """
  folder = outputs.new_folder(folder)

  def forward(inputs, *others):
    return apply({"params": params}, inputs, **dict(zip(options, others, strict=True)))

  further = {name: jax.ShapeDtypeStruct(inputs.shape, x) for name, x in options.items()}
  program = convert(forward, {INPUTS: inputs, **further})
  import onnx  # a dependency of jax2onnx

  apart = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > _ONE_FILE
  with outputs.whole_folder(folder) as partial:
    onnx.save_model(
      program.model,
      str(partial / MODEL),
      save_as_external_data=apart,
      location=DATA,
    )
    error = _difference(program, str(partial / MODEL), inputs, options, tokens)
    if not error <= TOLERANCE:
      raise ValueError(
        f"the program that jax2onnx {metadata.version('jax2onnx')} made differs by {error:.1e} of "
        f"the largest output, and no more than {TOLERANCE:.0e} is rounding; nothing was written"
      )
    if tokenizer is not None:
      tokenizer.save(partial)
  return error


def _difference(program: Program, file: str, inputs, options, tokens: int) -> float:
  rng = np.random.default_rng(0)
  if jnp.issubdtype(inputs.dtype, jnp.integer):
    first = rng.integers(0, tokens, inputs.shape).astype(inputs.dtype)
  else:
    first = rng.standard_normal(inputs.shape).astype(inputs.dtype)
  # Masks of padding and the kinds of tokens: at random, so that the program has to read them.
  others = (rng.integers(0, 2, inputs.shape).astype(dtype) for dtype in options.values())
  given = [first, *others]
  found, wanted = program.session(file)(*given), program.forward(*given)
  errors = []
  for a, b in zip(found, wanted, strict=True):
    b = np.asarray(b, np.float64)
    errors.append(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
  return float(np.max(errors))  # NaN if one is NaN


def require_jax2onnx() -> types.ModuleType:
  """Imports jax2onnx.

  Raises:
    ImportError: if it is not installed.
  """
  try:
    import jax2onnx  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError(
      f'ONNX programs are made by jax2onnx: pip install "lora_jax[onnx]" ({error})'
    ) from None
  return jax2onnx
