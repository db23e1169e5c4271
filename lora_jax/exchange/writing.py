"""From `{path: adapter}` to the config and the tensors of a folder in PEFT's layout.

What PEFT cannot say is refused with the reason: nothing is left out of a file, and nothing is
written as something near it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.exchange import lokr
from lora_jax.exchange.formats import (
  ADALORA_EPSILON,
  FORMATS,
  IN_THE_HEAD,
  ROWS,
  ROWS_BESIDE,
  WHOLE,
  Format,
)
from lora_jax.exchange.modules import Module, module_of
from lora_jax.weights import Adapted, DoRA, Full, LoKr, NotFactored, TokenRows, materialize

Adapters = Mapping[str, Adapted]
Modules = Mapping[str, Module]
Leaves = Mapping[str, Any]

# The kinds of which PEFT can tie the adapter of the head to that of the embedding.
_TYING = ("LORA", "ADALORA")


class Folder(NamedTuple):
  """What is written: the fields of the config, and the tensors by their names in the model."""

  config: dict[str, Any]
  tensors: dict[str, np.ndarray]

  def __or__(self, other: "Folder") -> "Folder":
    return Folder(self.config | other.config, self.tensors | other.tensors)


def folder(adapters: Adapters, modules: Modules, leaves: Leaves) -> Folder:
  """The adapters as PEFT has them; errors as in `lora_jax.exchange.save`."""
  _check(adapters, modules, leaves)
  full = {path: x for path, x in adapters.items() if isinstance(x, Full)}
  rows = {path: x for path, x in adapters.items() if isinstance(x, TokenRows)}
  factored = {path: x for path, x in adapters.items() if path not in full | rows}
  if factored:
    format, factored = _one_format(factored)
    written = _factored(format, factored, modules)
    written |= _full(format, full, set(factored), modules, leaves)
    written |= _rows_beside(format, rows, modules, leaves)
  elif not rows:
    written = _full_alone(full, modules, leaves)
  elif not full:
    written = _rows_alone(rows, modules, leaves)
  else:
    raise ValueError(
      f"{next(iter(rows))} and {next(iter(full))}: PEFT trains rows of tokens and other leaves in "
      "full beside adapters only; save them to folders of their own"
    )
  tied = [modules[path] for path in adapters if modules[path].is_head_too]
  return written | _heads(written, tied)


def _check(adapters: Adapters, modules: Modules, leaves: Leaves) -> None:
  """Raises ValueError for adapters that are not those of these leaves."""
  if not adapters:
    raise ValueError("there is no adapter to save")
  for path, adapter in adapters.items():
    if path not in modules:
      raise ValueError(f"{path}: no tensor name in the table leads to this leaf")
    module = modules[path]
    if module.stacks_oddly:
      raise ValueError(f"{path}: its axes are {module.roles!r}, and PEFT knows no stack but layers")
    if not dataclasses.replace(adapter, w=leaves[path]).fits():
      shapes = " and ".join(str(part.shape) for part in adapter.parts.values())
      raise ValueError(f"{path}: the adapter's parts {shapes} do not fit {module.shape}")


def _one_format(adapters: Adapters) -> tuple[Format, Adapters]:
  """How the adapters are written, if need be as the plain low-rank ones that they come down to."""
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
  """One layer's adapter: its parts, and what they are parts of."""

  module: Module
  adapter: Adapted
  parts: dict[str, np.ndarray]

  def rank(self, format: Format) -> int:
    part = next(x for x in format.parts if "r" in x.letters)
    return self.parts[part.field].shape[self.module.rank_axis(format.layout(part.field))]


def _factored(format: Format, adapters: Adapters, modules: Modules) -> Folder:
  tensors, layers = {}, {}
  for path, adapter in adapters.items():
    module = modules[path]
    if adapter.roles != module.roles.lstrip("s"):
      raise ValueError(
        f"{path}: the adapter was made for the axes {adapter.roles!r}, and those that were traced "
        f"are {module.roles!r}"
      )
    if reason := format.unfit(module):
      raise ValueError(f"{path}: {reason}; merge the adapter into the model")
    parts = {name: np.asarray(part, np.float32) for name, part in adapter.parts.items()}
    for layer, name in module.by_layer().items():
      own = parts if layer is None else {field: part[layer] for field, part in parts.items()}
      layers[module_of(name)] = _Layer(module, adapter, own)
  for owner, layer in layers.items():
    tensors |= {f"{owner}.{x}": tensor for x, tensor in _tensors(format, layer).items()}
  tensors |= _shared(format, layers)
  config = {"peft_type": format.peft_type, "target_modules": _targets(layers, modules)}
  if format.peft_type == "LORA":
    config |= {
      "init_lora_weights": True,
      "lora_dropout": _dropout(adapters),
      "fan_in_fan_out": all(modules[path].fan_in_fan_out for path in adapters),
      "use_dora": format.kind is DoRA,
    }
  return Folder(config | _numbers(format, layers, tensors), tensors)


def _tensors(format: Format, layer: "_Layer") -> dict[str, np.ndarray]:
  """The tensors of one layer's adapter by the ends of their names."""
  module, parts = layer.module, layer.parts
  if format.kind is LoKr:
    return lokr.tensors(module, layer.adapter, parts)
  found = {}
  for part in format.parts_of(module):
    tensor = module.to_tensor(parts[part.field], format.layout(part.field), part.letters)
    shape = module.tensor_shape(part.letters, layer.rank(format), format.window)
    found[part.suffix] = tensor.reshape(shape)
  return found


def _shared(format: Format, layers: Mapping[str, "_Layer"]) -> dict[str, np.ndarray]:
  """What all layers have in common, as large as the largest of them needs."""
  found = {}
  for part in format.shared:
    layout = format.layout(part.field)
    own = {
      owner: x.module.to_tensor(x.parts[part.field], layout, part.letters)
      for owner, x in layers.items()
    }
    largest = max(own.values(), key=np.size)
    for owner, tensor in own.items():
      if not np.array_equal(largest[tuple(map(slice, tensor.shape))], tensor):
        raise ValueError(
          f"{owner}: its {part.field} is no part of the one that all layers share in PEFT; save "
          "adapters of one seed and rank to a folder"
        )
    found[part.suffix] = largest
  return found


def _targets(adapted: Collection[str], modules: Modules) -> list[str] | str:
  """The modules by their whole names; a regular expression where one ends another's name."""
  adapted = set(adapted)
  others = {module_of(name) for x in modules.values() for name in x.by_layer().values()} - adapted
  if any(_endings(other) & adapted for other in others):
    return "|".join(map(re.escape, sorted(adapted)))
  return sorted(adapted)


def _endings(module: str) -> set[str]:
  """What ends a module's name from a dot on."""
  parts = module.split(".")
  return {".".join(parts[n:]) for n in range(1, len(parts))}


def _numbers(
  format: Format, layers: Mapping[str, "_Layer"], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """The fields of the ranks and of the scales."""
  fields = {}
  if format.kind is LoKr:
    splits = {owner: lokr.split(layer.module, layer.parts) for owner, layer in layers.items()}
    ranks, fields = lokr.ranks_and_settings(splits)
  else:
    ranks = {owner: layer.rank(format) for owner, layer in layers.items()}
  rank, rank_pattern = _with_exceptions(ranks)
  if format.alpha is None:
    return {"r": rank}  # of all layers, since they share what has it
  scales = {owner: layer.adapter.scale for owner, layer in layers.items()}
  if format.peft_type == "ADALORA":
    return _adalora_fields(ranks, scales, tensors)
  alphas = {module: _numerator(scales[module], r) for module, r in ranks.items()}
  if format.peft_type == "LORA":
    stabilised = {module: _numerator(scales[module], math.sqrt(r)) for module, r in ranks.items()}
    fields["use_rslora"] = _are_whole(stabilised) and not _are_whole(alphas)
    alphas = stabilised if fields["use_rslora"] else alphas
  alpha, alpha_pattern = _with_exceptions(alphas)
  return fields | {
    "r": rank, format.alpha: alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
  }  # fmt: skip


def _adalora_fields(
  ranks: Mapping[str, int], scales: Mapping[str, float], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """The fields of AdaLoRA's ranks; other scales than the commonest go into the singular values."""
  rank, scale = max(ranks.values()), _with_exceptions(scales)[0]
  for module, own in scales.items():
    tensors[f"{module}.lora_E"] = tensors[f"{module}.lora_E"] * np.float32(own / scale)
  masks = {
    f"{module}.lora_E": [n < own for n in range(rank)]
    for module, own in ranks.items()
    if own < rank
  }
  return {
    "init_r": rank, "target_r": rank, "rank_pattern": masks or None, "total_step": 1,
    "lora_alpha": scale * (rank + ADALORA_EPSILON),
  }  # fmt: skip


def _are_whole(alphas: Mapping[str, float]) -> bool:
  return all(float(alpha).is_integer() for alpha in alphas.values())


def _numerator(scale: float, denominator: float) -> int | float:
  """What gives the scale when it is divided, to the bit where there is such a number."""
  alpha = scale * denominator
  near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
  return next((x for x in near if x / denominator == scale), alpha)


def _with_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The commonest value, and a pattern for every module with another one."""
  ((common, _),) = collections.Counter(values.values()).most_common(1)
  ends = collections.Counter(ending for module in values for ending in _endings(module))
  return common, {
    f"^{re.escape(module)}" if ends[module] else module: value
    for module, value in values.items()
    if value != common
  }


def _dropout(adapters: Adapters) -> float:
  shares = {getattr(adapter, "dropout", 0.0): path for path, adapter in adapters.items()}
  if len(shares) > 1:
    listed = " and ".join(f"{share} ({path})" for share, path in shares.items())
    raise ValueError(
      f"PEFT has one dropout for all modules, and here are {listed}; it does nothing after the "
      "training, so give all adapters the same, `dataclasses.replace(adapter, dropout=0.0)`"
    )
  return next(iter(shares))


# ---- what is trained beside adapters


def _full(
  format: Format, full: Adapters, adapted: Collection[str], modules: Modules, leaves: Leaves
) -> Folder:
  """Leaves trained in full: a bias is stored by itself, of any other leaf the whole module."""
  saved, biases = {}, {}  # {module: {name: (path, layer)}}
  for owner, parameters in _parameters(modules).items():
    changed = {name for name, (path, _) in parameters.items() if path in full}
    is_adapted = any(path in adapted for path, _ in parameters.values())
    if changed == {f"{owner}.bias"} and len(parameters) > 1 and format.biases:
      within = f"{owner}.base_layer.bias" if is_adapted else f"{owner}.bias"
      biases[owner] = {within: parameters[f"{owner}.bias"]}
    elif changed and is_adapted:
      raise ValueError(
        f"{', '.join(sorted(changed))}: PEFT has no {format.peft_type} of a module of which "
        "another parameter is trained in full; merge them into the model"
      )
    elif changed:
      saved[owner] = parameters
  for module in modules.values():
    for owner in map(module_of, module.by_layer().values()):
      ending = next((x for x in saved if owner not in saved and owner.endswith(x)), None)
      if ending:
        raise ValueError(
          f"{ending} is trained in full, and PEFT would take {owner} for it, whose name ends so too"
        )
  config = {"modules_to_save": sorted(saved) or None}
  if format.biases:
    config["bias"] = "all" if biases else "none"
  return Folder(config, _whole({**saved, **biases}.values(), full, modules, leaves))


def _full_alone(full: Adapters, modules: Modules, leaves: Leaves) -> Folder:
  """Leaves trained in full and nothing else: what PEFT calls LN_TUNING tunes any module."""
  saved = {
    owner: parameters
    for owner, parameters in _parameters(modules).items()
    if any(path in full for path, _ in parameters.values())
  }
  tensors = _whole(saved.values(), full, modules, leaves)
  within = {f"{module_of(x)}.{WHOLE}{x.rpartition('.')[2]}": tensors[x] for x in tensors}
  return Folder({"peft_type": "LN_TUNING", "target_modules": _targets(set(saved), modules)}, within)


def _parameters(modules: Modules) -> dict[str, dict[str, tuple[str, int | None]]]:
  """`{module: {name of a parameter: (path, layer)}}`."""
  found = collections.defaultdict(dict)
  for path, module in modules.items():
    for layer, name in module.by_layer().items():
      found[module_of(name)][name] = path, layer
  return found


def _whole(parameters, full: Adapters, modules: Modules, leaves: Leaves) -> dict[str, np.ndarray]:
  """Parameters as they stand, changed or not, in float32."""
  tensors, values = {}, {}
  for name, (path, layer) in (item for each in parameters for item in each.items()):
    if path not in values:
      value = np.asarray(materialize(leaves[path]), np.float32)
      if path in full:
        value = value + np.asarray(full[path].dw, np.float32)
      values[path] = modules[path].weights(value)
    tensors[name] = values[path][layer]
  return tensors


def _rows_beside(format: Format, rows: Adapters, modules: Modules, leaves: Leaves) -> Folder:
  """Rows of embeddings beside adapters."""
  if rows and format.peft_type != "LORA":
    raise ValueError(
      f"{next(iter(rows))}: PEFT trains rows of tokens beside LORA or alone, not beside "
      f"{format.peft_type}; save them to a folder of their own"
    )
  ids = {module_of(modules[path].name): list(x.ids) for path, x in rows.items()}
  tensors = _row_tensors(rows, modules, leaves, ROWS_BESIDE)
  return Folder({"trainable_token_indices": ids} if ids else {}, tensors)


def _rows_alone(rows: Adapters, modules: Modules, leaves: Leaves) -> Folder:
  """Rows of embeddings, which is a kind of adapter too."""
  ids = {x.ids: path for path, x in rows.items()}
  if len(ids) > 1:
    raise ValueError(
      f"{' and '.join(ids.values())}: PEFT trains the same rows of all embeddings; save them to "
      "folders of their own"
    )
  config = {
    "peft_type": "TRAINABLE_TOKENS",
    "target_modules": _targets({module_of(modules[path].name) for path in rows}, modules),
    "token_indices": list(next(iter(ids))),
  }
  return Folder(config, _row_tensors(rows, modules, leaves, ROWS))


def _row_tensors(rows: Adapters, modules: Modules, leaves: Leaves, suffix: str):
  """The rows as they stand."""
  tensors = {}
  for path, adapter in rows.items():
    module = modules[path]
    rest = module.weight_letters[1]
    weight = module.weights(np.asarray(materialize(leaves[path]), np.float32))[None]
    change = module.to_tensor(np.asarray(adapter.dw, np.float32), f"r{rest}", f"r{rest}")
    tensors[f"{module_of(module.name)}.{suffix}"] = weight[list(adapter.ids)] + change
  return tensors


def _heads(written: Folder, tied: Collection[Module]) -> Folder:
  """What is done to an embedding, for the head that is tied to it."""
  config, tensors = {}, {}
  kind = written.config["peft_type"]
  for module in tied:
    if module.tied is None:
      raise ValueError(
        f"{module.path}: is the head too, and the table has no name for that; give the head a row, "
        f'"lm_head.weight": "{module.path}"'
      )
    owner, head = module_of(module.name), module_of(module.tied)
    for name in [name for name in written.tensors if name.startswith(f"{owner}.")]:
      suffix = name.removeprefix(f"{owner}.")
      if suffix == ROWS_BESIDE:  # which PEFT ties by itself
        continue
      if suffix in IN_THE_HEAD:
        tensors[f"{head}.{IN_THE_HEAD[suffix]}"] = written.tensors[name].T
      elif suffix in (ROWS, f"{WHOLE}weight") or (suffix == "weight" and kind in _TYING):
        tensors[f"{head}.{suffix}"] = written.tensors[name]
      else:
        raise ValueError(
          f"{module.path}: is the head too, and PEFT cannot tie the two in its {kind}; load the "
          "model with a head of its own, or merge the adapter into it"
        )
      if kind in _TYING:
        config["ensure_weight_tying"] = True
      if suffix.startswith(WHOLE):  # two modules of their own, with the same values
        config["target_modules"] = [*written.config["target_modules"], head]
  return Folder(config, tensors)
