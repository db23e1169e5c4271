"""Adapters from and to other libraries: PEFT's folders, and GGUF files for llama.cpp.

    axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
    table = pretrained.table           # lora_jax.families.tensor_names(config)
    adapters = exchange.load("adapter", params, axes, table=table)
    exchange.save("copy", adapters, params, axes, base_model="owner/name", table=table)

A table says which tensor of the PyTorch model is which leaf here, by templates with `{i}` for the
number of a layer. `lora_jax.families` has that of each family; another model's is a dict:

    GPT2 = {
      "transformer.wte.weight": "wte/embedding",
      "transformer.h.{i}.attn.c_attn.weight": names.InOut("h_{i}/attn/c_attn/kernel"),
      ...
    }
    exchange.load("adapter", params, axes, table=GPT2)

Where layers are stacked in one leaf, its path has no `{i}`, or is `blocks/...` for `block_{i}/...`.
How a tensor lies in its leaf follows from the traced axes: what is multiplied by is (out, in) in
PyTorch with the heads of a projection joined, a convolution's channels come before its window, and
what is looked up is (tokens, width).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import families, tree
from lora_jax.axes import Axes
from lora_jax.exchange import gguf, modules, reading, writing
from lora_jax.io import gguf_configs, gguf_lora, names, peft
from lora_jax.weights import Adapted, is_weight

PyTree = Any


def load(
  folder: str | Path,
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  table: names.Table | None = None,
) -> dict[str, Adapted]:
  """Returns the adapters `{path: adapter}` in a folder that `peft` or `save` wrote.

  LoRA and rsLoRA with rank and alpha patterns, DoRA, PiSSA, OLoRA, AdaLoRA, VeRA, LoHa and LoKr, of
  linear layers, embeddings and convolutions; and, as `Full` and `TokenRows`, what was trained
  beside or without them: modules to save, biases, rows of tokens. The factors of PiSSA and OLoRA
  belong to a residual; it is computed from `params` again, as PEFT does.

  The file is taken for hostile: names, shapes, dtypes and every field of the config are checked
  before a tensor is read, and a folder is loaded as a whole or not at all.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    params: the base. Its values are needed where the file holds other values than changes (rows
      of tokens, modules to save) or starts from them (PiSSA); else shapes will do.
    axes: what `lora_jax.trace_axes` found.
    table: {name of a tensor: path of its leaf}; a leaf that several names lead to is tied, and
      `names.InOut` marks tensors that are (in, out): transformers' Conv1D. It must be given: no
      family's names are another's.

  Raises:
    TypeError: without a table.
    FileNotFoundError: when a file is missing.
    ValueError: when a file is damaged, asks for what is not supported, or does not fit the model.
  """
  table = _given(table)
  file = peft.read(folder)
  found = modules.modules(params, axes, table)
  try:
    return reading.adapters(file, found, tree.flatten(params, is_leaf=is_weight))
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from None


def save(
  folder: str | Path,
  adapters: Mapping[str, Adapted],
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  base_model: str,
  table: names.Table | None = None,
  task_type: str | None = "CAUSAL_LM",
) -> None:
  """Writes adapters to a folder that `peft` loads; it appears whole or not at all.

  Everything is float32. PiSSA and OLoRA are written as the LoRA of twice the rank that they are on
  the base as it was; so are adapters of several kinds that all come down to products of two
  factors. What trains in full is written as it stands, `params` plus the change.

  Args:
    folder: replaced if it is an adapter's folder already.
    adapters: `{path: adapter}`.
    params: the base. Its values are needed for leaves trained in full and for rows of tokens.
    axes: as in `load`.
    table: as in `load`.
    base_model: what the adapters belong to, the config's `base_model_name_or_path`.
    task_type: the config's; it chooses the class of PEFT's model.

  Raises:
    TypeError: without a table.
    ValueError: when there is no adapter, one does not fit its leaf, or PEFT cannot say it: the
      layers of a stack other than the model's, kinds that do not go together, a LoHa of an
      embedding.
    FileExistsError: when the folder holds something else.
  """
  config, tensors = _written(folder, adapters, params, axes, table)
  common = {
    "base_model_name_or_path": base_model, "task_type": task_type, "inference_mode": True,
  }  # fmt: skip
  peft.write(folder, config | common, tensors)


def check(
  adapters: Mapping[str, Adapted],
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  table: names.Table | None = None,
) -> None:
  """Raises what `save` would of these adapters, so that a training need not end with it.

  Of params shapes will do.
  """
  # Zeros without memory: what is refused depends on no value of the base.
  params = jax.tree.map(
    lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), params, is_leaf=is_weight
  )
  _written("the adapters", adapters, params, axes, table)


def save_gguf(
  path: str | Path,
  adapters: Mapping[str, Adapted],
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  config: families.Config,
  dtype: str = "float32",
) -> None:
  """Writes adapters to a GGUF file that llama.cpp loads beside its base, `--lora adapter.gguf`.

  Args:
    path: of the file; replaced if it is there.
    adapters: `{path: adapter}` that all come down to products of two factors: LoRA, PiSSA, OLoRA,
      AdaLoRA, VeRA, LoHa, LoKr.
    params: the base; shapes will do.
    axes: as in `load`.
    config: of the model, of a family that llama.cpp knows (`io.names.GGUF`).
    dtype: of the tensors: float32, float16 or bfloat16.

  Raises:
    ValueError: when an adapter is no such product, or of what llama.cpp cannot adapt.
  """
  try:
    architecture = gguf_configs.architecture(config)
    found = modules.modules(params, axes, families.family_of(config).names["gguf"])
    factors, alpha = gguf.factors(adapters, found, config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  gguf_lora.write(path, factors, alpha=alpha, architecture=architecture, dtype=dtype)


def _given(table: names.Table | None) -> names.Table:
  if table is None:
    raise TypeError(
      "table: the names of the model's tensors are needed, {name: path}; of a family of lora_jax "
      "they are lora_jax.families.tensor_names(config), or `.table` of what pretrained.load returns"
    )
  return table


def _written(where, adapters, params, axes, table):
  found = modules.modules(params, axes, _given(table))
  try:
    return writing.folder(adapters, found, tree.flatten(params, is_leaf=is_weight))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
