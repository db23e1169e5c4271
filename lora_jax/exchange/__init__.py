"""Adapters from and to other libraries: PEFT's folders, and GGUF files for llama.cpp.

    axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
    table = pretrained.table           # lora_jax.families.tensor_names(config)
    adapters = exchange.load("adapter", params, axes, table=table)
    exchange.save("copy", adapters, params, axes, base_model="owner/name", table=table)

A table maps the tensors of the PyTorch model to the leaves of the tree, by templates with `{i}` for
the index of a layer. `lora_jax.families` has a table for each family. The table of another model is
a dict:

    GPT2 = {
      "transformer.wte.weight": "wte/embedding",
      "transformer.h.{i}.attn.c_attn.weight": names.InOut("h_{i}/attn/c_attn/kernel"),
      ...
    }
    exchange.load("adapter", params, axes, table=GPT2)

The path of a leaf of stacked layers has no `{i}`, or is `blocks/...` for `block_{i}/...`. The order
of axes follows from the traced axes: a kernel is (out, in) in PyTorch, with the heads of a
projection joined; a convolution's channels come before its window; an embedding is (tokens, width).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import families, tree
from lora_jax.axes import Axes
from lora_jax.exchange import gguf, gguf_files, modules, peft_files, reading, writing
from lora_jax.io import gguf_configs, names
from lora_jax.weights import Adapted, is_weight

PyTree = Any


def load(
  folder: str | Path,
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  table: names.Table | None = None,
) -> dict[str, Adapted]:
  """Loads the adapters `{path: adapter}` from a folder that `peft` or `save` wrote.

  Supports LoRA and rsLoRA with rank and alpha patterns, DoRA, PiSSA, OLoRA, AdaLoRA, VeRA, LoHa and
  LoKr, of linear layers, embeddings and convolutions. Modules to save, biases and rows of tokens,
  trained with or without adapters, are loaded as `Full` and `TokenRows`. The factors of PiSSA and
  OLoRA belong to a residual, which is computed again from `params`, as in PEFT.

  The file is treated as hostile: names, shapes, dtypes and every field of the config are checked
  before a tensor is read, and a folder is loaded completely or not at all.

  Args:
    folder: the folder with adapter_config.json and adapter_model.safetensors.
    params: the base. Its values are needed if the file stores whole values (rows of tokens, modules
      to save) or an adapter starts from them (PiSSA); otherwise shapes suffice.
    axes: the result of `lora_jax.trace_axes`.
    table: {name of a tensor: path of its leaf}. A leaf with several names is tied. `names.InOut`
      marks tensors that are (in, out): transformers' Conv1D. It is required, since families have
      different names.

  Raises:
    TypeError: without a table.
    FileNotFoundError: if a file is missing.
    ValueError: if a file is damaged, has unsupported settings, or does not fit the model.
  """
  table = _given(table)
  file = peft_files.read(folder)
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
  """Saves adapters to a folder that `peft` loads; it is written completely or not at all.

  All values are float32. PiSSA and OLoRA are written as a LoRA of twice the rank on the original
  base. Adapters of several kinds that all have a low-rank form are written as LoRA too. Leaves
  trained in full are written with their values, `params` plus the change.

  Args:
    folder: replaced if it is an adapter's folder.
    adapters: `{path: adapter}`.
    params: the base. Its values are needed for leaves trained in full and for rows of tokens.
    axes: as in `load`.
    table: as in `load`.
    base_model: the name of the base, the config's `base_model_name_or_path`.
    task_type: the config's field of this name; it selects the class of PEFT's model.

  Raises:
    TypeError: without a table.
    ValueError: if there is no adapter, if one does not fit its leaf, or if PEFT has no equivalent:
      for stacks other than the model's layers, kinds that cannot be in one folder, a LoHa of an
      embedding.
    FileExistsError: if the folder holds something else.
  """
  config, tensors = _written(folder, adapters, params, axes, table)
  common = {
    "base_model_name_or_path": base_model,
    "task_type": task_type,
    "inference_mode": True,
  }
  peft_files.write(folder, config | common, tensors)


def check(
  adapters: Mapping[str, Adapted],
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  table: names.Table | None = None,
) -> None:
  """Raises the errors of `save` for these adapters, e.g. before they are trained.

  Args:
    adapters: as in `save`.
    params: as in `save`; shapes suffice.
    axes: as in `save`.
    table: as in `save`.

  Raises:
    ValueError: as `save` does.
  """
  # Zeros without memory, since no error depends on the values of the base.
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
  """Saves adapters to a GGUF file that llama.cpp loads with its base, `--lora adapter.gguf`.

  Args:
    path: the file to write; an existing one is replaced.
    adapters: `{path: adapter}`, of kinds with a low-rank form: LoRA, PiSSA, OLoRA, AdaLoRA, VeRA,
      LoHa, LoKr.
    params: the base; shapes suffice.
    axes: as in `load`.
    config: the model's configuration, of a family that llama.cpp supports (`io.names.GGUF`).
    dtype: the dtype of the tensors: float32, float16 or bfloat16.

  Raises:
    ValueError: if an adapter has no low-rank form, or if llama.cpp cannot adapt its leaf.
  """
  try:
    architecture = gguf_configs.architecture(config)
    found = modules.modules(params, axes, families.family_of(config).names["gguf"])
    factors, alpha = gguf.factors(adapters, found, config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  gguf_files.write(path, factors, alpha=alpha, architecture=architecture, dtype=dtype)


def _given(table: names.Table | None) -> names.Table:
  if table is None:
    raise TypeError(
      "table: the names of the model's tensors are needed, {name: path}; for a family of lora_jax "
      "they are lora_jax.families.tensor_names(config), or `pretrained.load(...).table`. For "
      'a model of your own, name the tensors of its PyTorch form, {"layers.{i}.fc.weight": '
      '"layers_{i}/fc/kernel"}; to save adapters for lora_jax alone, no table is needed: '
      "flax.serialization.to_bytes(adapters)"
    )
  return table


def _written(where, adapters, params, axes, table):
  found = modules.modules(params, axes, _given(table))
  try:
    return writing.folder(adapters, found, tree.flatten(params, is_leaf=is_weight))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
