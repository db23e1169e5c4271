"""From `{path: adapter}` to the config and the tensors of a folder in PEFT's layout.

Adapters without an equivalent in PEFT are refused with the reason: nothing is left out of a file,
and nothing is approximated.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.exchange import lokr, parameters, whole_leaves
from lora_jax.exchange.formats import (
  ADALORA_EPSILON,
  FORMATS,
  Format,
)
from lora_jax.exchange.modules import Module, module_of
from lora_jax.weights import (
  AdaLoRA,
  Adapted,
  DoRA,
  Full,
  LoHa,
  LoKr,
  LowRank,
  NotFactored,
  TokenRows,
  materialize,
)

Adapters = Mapping[str, Adapted]
Modules = Mapping[str, Module]
Leaves = Mapping[str, Any]


def folder(adapters: Adapters, modules: Modules, leaves: Leaves) -> whole_leaves.Folder:
  """The adapters in PEFT's form; errors as in `lora_jax.exchange.save`."""
  _check(adapters, modules, leaves)
  adapters = {path: _in_peft(x, modules[path], leaves[path]) for path, x in adapters.items()}
  full = {path: x for path, x in adapters.items() if isinstance(x, Full)}
  rows = {path: x for path, x in adapters.items() if isinstance(x, TokenRows)}
  factored = {path: x for path, x in adapters.items() if path not in full | rows}
  if factored:
    format, factored = _one_format(factored)
    written = _factored(format, factored, modules)
    written |= whole_leaves.full(format, full, set(factored), modules, leaves)
    written |= whole_leaves.rows_beside(format, rows, modules, leaves)
  elif not rows:
    written = whole_leaves.full_alone(full, modules, leaves)
  elif not full:
    written = whole_leaves.rows_alone(rows, modules, leaves)
  else:
    raise ValueError(
      f"{next(iter(rows))} and {next(iter(full))}: PEFT trains rows of tokens and other leaves in "
      "full only alongside adapters; save them to folders of their own"
    )
  tied = [modules[path] for path in adapters if modules[path].is_head_too]
  return written | whole_leaves.heads(written, tied)


def _check(adapters: Adapters, modules: Modules, leaves: Leaves) -> None:
  """Raises ValueError for adapters that do not fit these leaves."""
  if not adapters:
    raise ValueError("there is no adapter to save")
  of_experts = {module_of(x.parameter or "") for x in modules.values() if x.has_experts}
  for path, adapter in adapters.items():
    if path not in modules:
      raise ValueError(f"{path}: no tensor name in the table leads to this leaf")
    module = modules[path]
    if module.stacks_oddly:
      raise ValueError(f"{path}: its axes are {module.roles!r}, and PEFT knows no stack but layers")
    own = module.parameter if module.has_experts else module.name
    assert own is not None  # only a parameter has experts
    if isinstance(adapter, Full) and module_of(own) in of_experts:
      raise ValueError(
        f"{path}: is trained in full, and PEFT saves a module whole, here with all its experts; "
        "merge it into the model"
      )
    if not dataclasses.replace(adapter, w=leaves[path]).fits():
      shapes = " and ".join(str(part.shape) for part in adapter.parts.values())
      raise ValueError(f"{path}: the adapter's parts {shapes} do not fit {module.shape}")


def _in_peft(adapter: Adapted, module: Module, leaf: Any) -> Adapted:
  """The adapter in PEFT's form; for a convolution with several groups, the whole changed kernel.

  PEFT's A for such a layer reads the channels of all groups, which no change of the kernel can do.
  The kernel is small, so it is saved whole.
  """
  if module.groups == 1 or isinstance(adapter, Full):
    return adapter
  base = jnp.asarray(module.values(leaf))
  changed = materialize(dataclasses.replace(adapter, w=base))
  return Full(w=None, dw=changed - base)


def _one_format(adapters: Adapters) -> tuple[Format, Adapters]:
  """The format to write the adapters in, and the adapters, in low-rank form if necessary."""
  kinds = {type(adapter) for adapter in adapters.values()}
  for format in FORMATS.values():
    if kinds == {format.kind}:
      return format, adapters
  try:
    return FORMATS["LORA"], {path: adapter.as_low_rank() for path, adapter in adapters.items()}
  except NotFactored as error:
    examples = {type(adapter).__name__: path for path, adapter in adapters.items()}
    listed = " and ".join(f"{kind} ({path})" for kind, path in examples.items())
    raise ValueError(
      f"PEFT has one kind of adapter in a folder, and here are {listed}: {error}; save them to "
      "folders of their own, or merge them into the model"
    ) from None


# ---- adapters


class _Layer(NamedTuple):
  """One layer's adapter, its module and its parts."""

  owner: str
  module: Module
  adapter: Adapted
  parts: dict[str, np.ndarray]

  def rank(self, format: Format) -> int:
    part = next(x for x in format.parts if "r" in x.letters)
    layout = format.layout(part.field, self.module)
    axis = self.module.rank_axis(layout)
    assert axis is not None  # part has letters with the rank
    return self.parts[part.field].shape[axis]


def _factored(format: Format, adapters: Adapters, modules: Modules) -> whole_leaves.Folder:
  tensors, layers = {}, {}
  for path, adapter in adapters.items():
    module = modules[path]
    if adapter.roles != module.roles.lstrip("s"):
      raise ValueError(
        f"{path}: the adapter was made for the axes {adapter.roles!r}, and the traced axes are "
        f"{module.roles!r}"
      )
    if reason := format.unfit(module):
      raise ValueError(f"{path}: {reason}; merge the adapter into the model")
    parts = {name: np.asarray(part, np.float32) for name, part in adapter.parts.items()}
    for layer, name in module.by_layer().items():
      own = parts if layer is None else {field: part[layer] for field, part in parts.items()}
      layers[module.key(layer)] = _Layer(module_of(name), module, adapter, own)
  for layer in layers.values():
    tensors |= {f"{layer.owner}.{x}": tensor for x, tensor in _tensors(format, layer).items()}
  tensors |= _shared(format, layers)
  config = {"peft_type": format.peft_type} | _targets(layers, modules)
  tensors = parameters.nested(tensors, config.get("target_parameters", ()), modules)
  if format.peft_type == "LORA":
    config |= {
      "init_lora_weights": True,
      "lora_dropout": _dropout(adapters, modules),
      "fan_in_fan_out": all(
        modules[path].fan_in_fan_out and not modules[path].parameter for path in adapters
      ),
      "use_dora": format.kind is DoRA,
    }
  return whole_leaves.Folder(config | _numbers(format, layers, tensors), tensors)


def _targets(layers: Mapping[str, _Layer], modules: Modules) -> dict[str, Any]:
  """The config's fields for the targets; parameters are listed separately from modules."""
  linear = {path: module for path, module in modules.items() if not module.parameter}
  own = {key for key, layer in layers.items() if layer.module.parameter}
  fields = {"target_modules": whole_leaves.targets(layers.keys() - own, linear)}
  return fields | ({"target_parameters": sorted(own)} if own else {})


def _tensors(format: Format, layer: "_Layer") -> dict[str, np.ndarray]:
  """The tensors of one layer's adapter by suffix."""
  module, parts = layer.module, layer.parts
  if isinstance(layer.adapter, LoKr):
    return lokr.tensors(module, layer.adapter, parts)
  found = {}
  for part in format.parts_of(module):
    layout = format.layout(part.field, module)
    tensor = module.to_tensor(parts[part.field], layout, part.letters)
    shape = module.tensor_shape(part.letters, layer.rank(format), format.window)
    found[part.suffix] = tensor.reshape(shape)
  return found


def _shared(format: Format, layers: Mapping[str, "_Layer"]) -> dict[str, np.ndarray]:
  """The parts that all layers share, as large as the largest layer needs."""
  found = {}
  for part in format.shared:
    own = {
      owner: x.module.to_tensor(
        x.parts[part.field], format.layout(part.field, x.module), part.letters
      )
      for owner, x in layers.items()
    }
    largest = max(own.values(), key=np.size)
    for owner, tensor in own.items():
      if not np.array_equal(largest[tuple(map(slice, tensor.shape))], tensor):
        raise ValueError(
          f"{owner}: its {part.field} is not a part of the one that all layers share in PEFT; save "
          "adapters of one seed and rank to a folder"
        )
    found[part.suffix] = largest
  return found


def _scale(adapter: Adapted) -> float:
  """The scale of an adapter whose format has one."""
  assert isinstance(adapter, LowRank | DoRA | AdaLoRA | LoHa | LoKr)
  return adapter.scale


def _numbers(
  format: Format, layers: Mapping[str, "_Layer"], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """The config's fields for ranks and scales."""
  fields = {}
  if format.kind is LoKr:
    splits = {owner: lokr.split(layer.module, layer.parts) for owner, layer in layers.items()}
    ranks, fields = lokr.ranks_and_settings(splits)
  else:
    ranks = {owner: layer.rank(format) for owner, layer in layers.items()}
  rank, rank_pattern = _with_exceptions(ranks)
  if format.alpha is None:
    return {"r": rank}  # of all layers, since they share the parts
  scales = {owner: _scale(layer.adapter) for owner, layer in layers.items()}
  if format.peft_type == "ADALORA":
    return _adalora_fields(ranks, scales, tensors)
  alphas = {module: _numerator(scales[module], r) for module, r in ranks.items()}
  if format.peft_type == "LORA":
    stabilized = {module: _numerator(scales[module], math.sqrt(r)) for module, r in ranks.items()}
    fields["use_rslora"] = _are_whole(stabilized) and not _are_whole(alphas)
    alphas = stabilized if fields["use_rslora"] else alphas
  alpha, alpha_pattern = _with_exceptions(alphas)
  return fields | {
    "r": rank,
    format.alpha: alpha,
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
  }


def _adalora_fields(
  ranks: Mapping[str, int], scales: Mapping[str, float], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """The config's fields for AdaLoRA's ranks; less common scales go into the singular values."""
  # PEFT replaces an alpha that is not above zero by the rank.
  positive = {module: own for module, own in scales.items() if own > 0}
  rank, scale = max(ranks.values()), _with_exceptions(positive or {"": 1.0})[0]
  for module, own in scales.items():
    tensors[f"{module}.lora_E"] = tensors[f"{module}.lora_E"] * np.float32(own / scale)
  masks = {
    f"{module}.lora_E": [n < own for n in range(rank)]
    for module, own in ranks.items()
    if own < rank
  }
  return {
    "init_r": rank,
    "target_r": rank,
    "rank_pattern": masks or None,
    "total_step": 1,
    "lora_alpha": scale * (rank + ADALORA_EPSILON),
  }


def _are_whole(alphas: Mapping[str, float]) -> bool:
  return all(float(alpha).is_integer() for alpha in alphas.values())


def _numerator(scale: float, denominator: float) -> int | float:
  """The number that yields the scale when divided, bit for bit if one exists."""
  alpha = scale * denominator
  near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
  return next((x for x in near if x / denominator == scale), alpha)


def _with_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The most common value, and a pattern for every module with another one."""
  ((common, _),) = collections.Counter(values.values()).most_common(1)
  ends = collections.Counter(ending for module in values for ending in whole_leaves.endings(module))
  return common, {
    f"^{re.escape(module)}" if ends[module] else module: value
    for module, value in values.items()
    if value != common
  }


def _dropout(adapters: Adapters, modules: Modules) -> float:
  for path, adapter in adapters.items():
    if modules[path].parameter and getattr(adapter, "dropout", 0.0):
      raise ValueError(
        f"{path}: PEFT has no dropout of {modules[path].parameter}, a parameter, nor of leaves "
        "adapted with it; it has no effect after training, so remove it from all adapters, "
        "`dataclasses.replace(adapter, dropout=0.0)`"
      )
  shares = {getattr(adapter, "dropout", 0.0): path for path, adapter in adapters.items()}
  if len(shares) > 1:
    listed = " and ".join(f"{share} ({path})" for share, path in shares.items())
    raise ValueError(
      f"PEFT has one dropout for all modules, and here are {listed}; it has no effect after "
      "training, so give all adapters the same, `dataclasses.replace(adapter, dropout=0.0)`"
    )
  return next(iter(shares))
