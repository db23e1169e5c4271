"""PEFT's form of what trains alongside adapters: whole leaves, embedding rows, tied heads."""

import collections
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.exchange.formats import IN_THE_HEAD, ROWS, ROWS_BESIDE, WHOLE, Format
from lora_jax.exchange.modules import Module, module_of
from lora_jax.weights import Full, TokenRows

Whole = Mapping[str, Full]
Rows = Mapping[str, TokenRows]
Modules = Mapping[str, Module]
Leaves = Mapping[str, Any]

HEADS = ("classifier",)
"""Modules with submodules, such as RoBERTa's classifier, that PEFT saves whole for `SEQ_CLS`."""

# The kinds for which PEFT can tie the head's adapter to the embedding's.
_TYING = ("LORA", "ADALORA")


class Folder(NamedTuple):
  """The contents to write: the config's fields, and the tensors by their names in the model."""

  config: dict[str, Any]
  tensors: dict[str, np.ndarray]

  def __or__(self, other: "Folder") -> "Folder":
    return Folder(self.config | other.config, self.tensors | other.tensors)


def targets(adapted: Collection[str], modules: Modules) -> list[str] | str:
  """The modules by full name; a regular expression if one name is the end of another."""
  adapted = set(adapted)
  others = {module_of(name) for x in modules.values() for name in x.by_layer().values()} - adapted
  if any(endings(other) & adapted for other in others):
    return "|".join(map(re.escape, sorted(adapted)))
  return sorted(adapted)


def endings(module: str) -> set[str]:
  """The suffixes of a module's name that start after a dot."""
  parts = module.split(".")
  return {".".join(parts[n:]) for n in range(1, len(parts))}


def full(
  format: Format, full: Whole, adapted: Collection[str], modules: Modules, leaves: Leaves
) -> Folder:
  """Leaves trained in full: biases are stored alone, for other leaves the whole module."""
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
          f"{ending} is trained in full, but PEFT would match {owner} too, whose name ends with it"
        )
  saved = _whole_heads(saved, adapted, modules)
  names = {next((x for x in HEADS if is_within(owner, x)), owner) for owner in saved}
  config: dict[str, Any] = {"modules_to_save": sorted(names) or None}
  if format.biases:
    config["bias"] = "all" if biases else "none"
  return Folder(config, _whole({**saved, **biases}.values(), full, modules, leaves))


def _whole_heads(saved: dict, adapted: Collection[str], modules: Modules) -> dict:
  """The saved modules, completed to whole heads: PEFT saves a head of several modules as one."""
  owners = _parameters(modules)
  for head in HEADS:
    within = [owner for owner in owners if is_within(owner, head)]
    if not saved.keys() & set(within):
      continue
    if both := [owner for owner in within if any(x in adapted for x, _ in owners[owner].values())]:
      raise ValueError(
        f"{both[0]}: has an adapter, but PEFT saves its module {head!r} whole, since a part of it "
        "is trained in full; train it in full too, or merge both into the model"
      )
    saved = saved | {owner: owners[owner] for owner in within}
  return saved


def is_within(owner: str, module: str) -> bool:
  """True if a module is part of another one, by the parts of its name between dots."""
  return f".{module}." in f".{owner}"


def full_alone(full: Whole, modules: Modules, leaves: Leaves) -> Folder:
  """Leaves trained in full without adapters: PEFT's LN_TUNING, which tunes any module."""
  saved = {
    owner: parameters
    for owner, parameters in _parameters(modules).items()
    if any(path in full for path, _ in parameters.values())
  }
  tensors = _whole(saved.values(), full, modules, leaves)
  within = {f"{module_of(x)}.{WHOLE}{x.rpartition('.')[2]}": tensors[x] for x in tensors}
  return Folder({"peft_type": "LN_TUNING", "target_modules": targets(set(saved), modules)}, within)


def _parameters(modules: Modules) -> dict[str, dict[str, tuple[str, int | None]]]:
  """`{module: {name of a parameter: (path, layer)}}`."""
  found = collections.defaultdict(dict)
  for path, module in modules.items():
    for layer, name in module.by_layer().items():
      found[module_of(name)][name] = path, layer
  return found


def _whole(parameters, full: Whole, modules: Modules, leaves: Leaves) -> dict[str, np.ndarray]:
  """The values of parameters, changed or not, in float32."""
  tensors, values = {}, {}
  for name, (path, layer) in (item for each in parameters for item in each.items()):
    if path not in values:
      value = modules[path].values(leaves[path])
      if path in full:
        value = value + np.asarray(full[path].dw, np.float32)
      values[path] = modules[path].weights(value)
    tensors[name] = values[path][layer]
  return tensors


def rows_beside(format: Format, rows: Rows, modules: Modules, leaves: Leaves) -> Folder:
  """Rows of embeddings, alongside adapters."""
  if rows and format.peft_type != "LORA":
    raise ValueError(
      f"{next(iter(rows))}: PEFT trains rows of tokens alongside LORA or alone, not alongside "
      f"{format.peft_type}; save them to a folder of their own"
    )
  ids = {module_of(modules[path].name): list(x.ids) for path, x in rows.items()}
  tensors = _row_tensors(rows, modules, leaves, ROWS_BESIDE)
  return Folder({"trainable_token_indices": ids} if ids else {}, tensors)


def rows_alone(rows: Rows, modules: Modules, leaves: Leaves) -> Folder:
  """Rows of embeddings alone, which is also a kind of adapter."""
  ids = {x.ids: path for path, x in rows.items()}
  if len(ids) > 1:
    raise ValueError(
      f"{' and '.join(ids.values())}: PEFT trains the same rows of all embeddings; save them to "
      "folders of their own"
    )
  config = {
    "peft_type": "TRAINABLE_TOKENS",
    "target_modules": targets({module_of(modules[path].name) for path in rows}, modules),
    "token_indices": list(next(iter(ids))),
  }
  return Folder(config, _row_tensors(rows, modules, leaves, ROWS))


def _row_tensors(rows: Rows, modules: Modules, leaves: Leaves, suffix: str):
  """The values of the rows."""
  tensors = {}
  for path, adapter in rows.items():
    module = modules[path]
    rest = module.weight_letters[1]
    weight = module.weights(module.values(leaves[path]))[None]
    change = module.to_tensor(np.asarray(adapter.dw, np.float32), f"r{rest}", f"r{rest}")
    tensors[f"{module_of(module.name)}.{suffix}"] = weight[list(adapter.ids)] + change
  return tensors


def heads(written: Folder, tied: Collection[Module]) -> Folder:
  """The changes of an embedding, repeated for the head that is tied to it."""
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
      if suffix == ROWS_BESIDE:  # PEFT ties these itself
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
      if suffix.startswith(WHOLE):  # two separate modules with the same values
        config["target_modules"] = [*written.config["target_modules"], head]
  return Folder(config, tensors)
