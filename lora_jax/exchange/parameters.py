"""Parameters outside of linear layers, which PEFT adapts by `target_parameters`.

The experts of a layer are one parameter of three axes, `mlp.experts.gate_up_proj`, and a router is
a matrix without a linear layer. PEFT wraps the module that owns them once per parameter, with
nested wrappers, and names the factors by the nesting:

    model.layers.0.mlp.experts.base_layer.lora_A.weight    of gate_up_proj, which was wrapped first
    model.layers.0.mlp.experts.lora_A.weight               of down_proj, or of a single parameter

Elsewhere in `lora_jax.exchange` a parameter is the weight of a module with its own name. This
module converts the names. A is (experts * rank, in), B is (out, rank * experts).
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.exchange import peft_files
from lora_jax.exchange.modules import Module, module_of

FACTORS = ("lora_A.weight", "lora_B.weight")
_LISTED = 8

Nested = dict[str, str]
"""`{PEFT's name of a factor: its name if the parameter were a module's weight}`."""


def unnested(file: peft_files.AdapterFile, modules: Mapping[str, Module]) -> peft_files.AdapterFile:
  """The file with the factors of parameters named like those of modules.

  Raises:
    ValueError: if a parameter that the config names is missing.
  """
  wanted = file.config.get("target_parameters") or []
  if not wanted:
    return file
  targets = {
    key: name for key, name in _keys(modules).items() if any(_ends(key, x) for x in wanted)
  }
  unmet = [x for x in wanted if not any(_ends(key, x) for key in targets)]
  names = _nested(targets, modules)
  missing = [name for name in names if name not in file.tensors]
  if unmet or missing:
    listed = ", ".join(x[:120] for x in [*unmet, *missing][:_LISTED])
    raise ValueError(
      f"{len(unmet) + len(missing)} of target_parameters and their factors are not there: {listed}"
    )
  tensors = {names.get(name, name): tensor for name, tensor in file.tensors.items()}
  return peft_files.AdapterFile(file.path, file.config, tensors)


def nested(
  tensors: Mapping[str, Any], adapted: Collection[str], modules: Mapping[str, Module]
) -> dict[str, Any]:
  """The tensors with the factors of parameters named by PEFT's nesting.

  adapted: the keys of the adapted parameters.
  """
  targets = {key: name for key, name in _keys(modules).items() if key in set(adapted)}
  names = {flat: name for name, flat in _nested(targets, modules).items()}
  return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _keys(modules: Mapping[str, Module]) -> dict[str, str]:
  """`{parameter: its name here}`, in the order in which PyTorch registers them."""
  own = [module for module in modules.values() if module.parameter]
  found = {}
  for module in sorted(own, key=lambda module: module.place):
    found |= {module.key(layer): name for layer, name in module.by_layer().items()}
  return found


def _nested(targets: Mapping[str, str], modules: Mapping[str, Module]) -> Nested:
  owners = defaultdict(list)
  for key, name in targets.items():
    owners[module_of(key)].append(module_of(name))
  return {
    f"{owner}.{'base_layer.' * depth}{factor}": f"{own}.{factor}"
    for owner, parameters in owners.items()
    for depth, own in enumerate(reversed(parameters))
    for factor in FACTORS
  }


def _ends(key: str, target: str) -> bool:
  """True if PEFT matches a parameter to a target: by its name, or its end after a dot."""
  return key == target or key.endswith(f".{target}")
