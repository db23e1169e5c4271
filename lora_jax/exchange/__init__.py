"""Adapters in and out of PEFT's layout.

    axes = lora_jax.trace_axes(model.apply, params, tokens)
    adapters = exchange.load("adapter", params, axes)
    exchange.save("copy", adapters, params, axes, base_model="HuggingFaceTB/SmolLM2-135M")

The table says which tensor of the PyTorch model is which leaf; see `lora_jax.io.names`. One of your
own is a dict:

    GPT2 = {"transformer.h.{i}.attn.c_attn.weight": "h_{i}/attn/c_attn/kernel", ...}
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_jax import tree
from lora_jax.axes import Axes
from lora_jax.exchange import modules, reading, writing
from lora_jax.io import names, peft
from lora_jax.weights import Adapted, is_weight

PyTree = Any


def load(
  folder: str | Path,
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  table: names.Table = names.LLAMA_HF,
  fan_in_fan_out: Collection[str] = (),
) -> dict[str, Adapted]:
  """Returns the adapters `{path: adapter}` in a folder that `peft` or `save` wrote."""
  file = peft.read(folder)
  found = modules.modules(params, axes, table, fan_in_fan_out)
  leaves = tree.flatten(params, is_leaf=is_weight)
  try:
    return reading.adapters(file, found, leaves)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from None


def save(
  folder: str | Path,
  adapters: Mapping[str, Adapted],
  params: PyTree,
  axes: Mapping[str, Axes],
  *,
  base_model: str,
  table: names.Table = names.LLAMA_HF,
  fan_in_fan_out: Collection[str] = (),
  task_type: str | None = "CAUSAL_LM",
) -> None:
  """Writes adapters to a folder that `peft` loads; it appears whole or not at all."""
  found = modules.modules(params, axes, table, fan_in_fan_out)
  try:
    written = writing.folder(adapters, found, tree.flatten(params, is_leaf=is_weight))
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from None
  common = {
    "base_model_name_or_path": base_model, "task_type": task_type, "inference_mode": True,
  }  # fmt: skip
  peft.write(folder, written.config | common, written.tensors)
