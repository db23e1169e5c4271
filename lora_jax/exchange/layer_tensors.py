"""Adapters from PEFT's tensors: the parts of each layer, and those of a leaf of several layers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import OLoRA, PiSSA
from lora_jax.exchange import lokr, peft_files, peft_patterns
from lora_jax.exchange.formats import ADALORA_EPSILON, FORMATS, RECENTRED, Format
from lora_jax.exchange.modules import Module, module_of
from lora_jax.weights import Adapted, DoRA, LoKr, LowRank, Recentred

# The values of `init_lora_weights` for which training starts at the unchanged base, and those for
# which it starts at a residual that PEFT computes whenever it loads the adapter.
_ON_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
_ON_A_RESIDUAL = {"pissa": PiSSA, "olora": OLoRA}

Layer = int | None
Kinds = Mapping[str, str]
"""The names of one layer's tensors, by suffix: {"lora_A.weight": name}."""
Parts = dict[str, np.ndarray]


def format_of(config: Mapping[str, Any]) -> Format | None:
  """The format of a file's adapters; None for a kind that adapts no layers.

  Raises:
    ValueError: if they belong to a base that cannot be recovered from the file.
  """
  start, dora = config.get("init_lora_weights", True), config.get("use_dora", False)
  if start in _ON_A_RESIDUAL and not dora:
    return RECENTRED
  if start not in _ON_THE_BASE:
    raise ValueError(
      f"init_lora_weights is {start!r}: the factors belong to a base that was changed before the "
      "training, and how is not in the file; write the adapter again in peft with "
      "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, or load the changed "
      "base and set init_lora_weights to true in adapter_config.json"
    )
  return FORMATS.get("DORA" if dora else config["peft_type"])


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads the adapters of a file; create it with `Reader.of`."""

  file: peft_files.AdapterFile
  format: Format
  ranks: peft_patterns.Patterns
  alphas: peft_patterns.Patterns
  shared: Parts

  @classmethod
  def of(cls, file: peft_files.AdapterFile, format: Format) -> "Reader":
    """The reader of a file; raises ValueError if the parts that all layers share are missing."""
    config = file.config
    missing = [part.suffix for part in format.shared if part.suffix not in file.shapes]
    if missing:
      raise ValueError(
        f"{' and '.join(missing)} are not in the file, and PyTorch's random numbers cannot be "
        "reproduced here; write the adapter again in peft with save_projection=True"
      )
    masks = config["peft_type"] == "ADALORA"  # where other kinds have patterns
    patterns = [{} if masks else config.get(f"{x}_pattern", {}) for x in ("rank", "alpha")]
    shared = {part.field: file.load(part.suffix) for part in format.shared}
    ranks, alphas = map(peft_patterns.compiled, patterns)
    return cls(file, format, ranks, alphas, shared)

  def adapter(self, module: Module, leaf: Any, tensors: Mapping[Layer, Kinds]) -> Adapted:
    """The adapter of a leaf with all its layers.

    Raises:
      ValueError: if its tensors are not those of its kind or do not fit the leaf.
    """
    if reason := self.format.unfit(module):
      raise ValueError(f"{module.name}: {reason}")
    names, layers, scales = module.by_layer(), {}, {}
    for layer, kinds in tensors.items():
      owner = module_of(names[layer])
      rank = self._rank(module.key(layer))
      if rank > module.inputs + module.outputs and not self.format.shared:
        raise ValueError(f"{owner}: rank {rank} is out of proportion to a kernel {module.shape}")
      layers[layer] = self._parts(module, owner, kinds, rank)
      scales[layer] = self._scale(module.key(layer), rank)
      if self.format.kind is Recentred:
        layers[layer] |= self._start(module, leaf, layer, rank, scales[layer])
    # A leaf has one scale, of which the others are multiples; zero has no multiple but itself.
    counted = [scale for scale in scales.values() if scale] or [0.0]
    scale = max(counted, key=counted.count)
    parts = layers.get(None)
    if parts is None:
      ratios = {n: own / scale if scale else 1.0 for n, own in scales.items()}
      parts = self._stacked(module, leaf, layers, ratios)
    arrays = {field: jnp.asarray(part) for field, part in parts.items()}
    settings: dict[str, Any] = {"scale": scale} if self.format.alpha else {}
    if self.format.kind is LowRank:
      settings["dropout"] = self.file.config["lora_dropout"]
    if self.format.kind is LoKr:
      settings["order"] = lokr.order(module)
    return self.format.kind(w=None, roles=module.roles.lstrip("s"), **arrays, **settings)

  # ---- a module's settings in the config

  def _rank(self, owner: str) -> int:
    config = self.file.config
    if config["peft_type"] == "ADALORA":
      mask = config["rank_pattern"].get(f"{owner}.lora_E")
      return config["init_r"] if mask is None else sum(mask)
    return peft_patterns.first_match(self.ranks, owner, config["r"])

  def _scale(self, owner: str, rank: int) -> float:
    config = self.file.config
    if self.format.alpha is None:
      return 1.0
    alpha = peft_patterns.first_match(self.alphas, owner, config[self.format.alpha])
    if config["peft_type"] == "ADALORA":  # the remaining ranks do not change it
      alpha = alpha if alpha > 0 else config["init_r"]  # as in PEFT
      return alpha / (config["init_r"] + ADALORA_EPSILON)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

  # ---- one layer

  def _parts(self, module: Module, owner: str, kinds: Kinds, rank: int) -> Parts:
    if self.format.kind is LoKr:
      return lokr.parts(module, kinds, self.file.shapes, rank, self._load)
    parts = self.format.parts_of(module)
    expected = {part.suffix for part in parts}
    tucker = {"hada_t1", "hada_t2"} & kinds.keys()
    if kinds.keys() - tucker != expected or len(tucker) not in (0, len(self.format.others)):
      raise ValueError(
        f"{owner}: has {', '.join(sorted(kinds))}; an adapter of its kind has "
        f"{', '.join(sorted(expected))}"
      )
    if tucker:
      return self._tucker(module, kinds, rank)
    found = {}
    for part in parts:
      shape = module.tensor_shape(part.letters, rank, self.format.window)
      tensor = self._load(kinds[part.suffix], shape)
      if rank == 0:  # AdaLoRA has removed it
        tensor = np.zeros(module.tensor_shape(part.letters, 1), np.float32)
      layout = self.format.layout(part.field, module)
      found[part.field] = module.to_part(tensor, part.letters, layout, max(1, rank))
    for part in self.format.shared:
      tensor = self.shared[part.field]
      shape = module.tensor_shape(part.letters, rank)
      within = tuple(map(slice, shape))
      if tensor.ndim != 2 or tensor[within].shape != shape:
        raise ValueError(f"{part.suffix}: shape {tensor.shape} is too small for {owner}, {shape}")
      layout = self.format.layout(part.field, module)
      found[part.field] = module.to_part(tensor[within], part.letters, layout, rank)
    return found

  def _tucker(self, module: Module, kinds: Kinds, rank: int) -> Parts:
    """The parts of a convolution's LoHa whose factors are tensors of three modes each.

    The inner rank and the channels are joined into one factor of all inputs: (window, channels,
    rank).
    """
    window, channels = module.window(), module.inputs // math.prod(module.window())
    core = (rank, rank, *window, *[1] * (2 - len(window)))
    found = {}
    for n in "12":
      b = self._load(kinds[f"hada_w{n}_a"], (rank, module.outputs))
      side = self._load(kinds[f"hada_w{n}_b"], (rank, channels))
      a = np.einsum("ij...,jn->in...", self._load(kinds[f"hada_t{n}"], core), side)
      found[f"a{n}"] = module.to_part(a, "ri", self.format.layout(f"a{n}", module), rank)
      found[f"b{n}"] = module.to_part(b, "ro", self.format.layout(f"b{n}", module), rank)
    return found

  def _start(self, module: Module, leaf, layer: Layer, rank: int, scale: float) -> Parts:
    """The start of a layer's factors, computed from the base as in PEFT."""
    method = _ON_A_RESIDUAL[self.file.config["init_lora_weights"]]
    w = module.layer(jnp.asarray(module.values(leaf)), layer)
    start = method(rank=rank, alpha=scale * rank).init(
      jax.random.key(0), module.path, w, module.layer_roles
    )
    return {"a0": np.asarray(start.a), "b0": np.asarray(start.b)}

  def _load(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return load(self.file, name, shape)

  # ---- all layers

  def _stacked(
    self, module: Module, leaf, layers: Mapping[Layer, Parts], ratios: Mapping[Layer, float]
  ) -> Parts:
    """The parts of all layers, with the largest rank and a common scale; zeros without an adapter.

    The padding is zero and has zero gradients, so it stays zero in training.
    """
    fields = {frozenset(parts) for parts in layers.values()}
    if len(fields) > 1:
      raise ValueError(
        f"{module.path}: its layers have different parts, "
        f"{' and '.join(', '.join(sorted(x)) for x in fields)}; load the model with "
        "scan_layers=False"
      )
    assert module.layers is not None  # a single layer has no others
    stacked = {}
    for field in next(iter(layers.values())):
      sizes = np.max([parts[field].shape for parts in layers.values()], axis=0)
      stacked[field] = np.zeros((module.layers, *sizes), np.float32)
      for layer, parts in layers.items():
        within = (layer, *map(slice, parts[field].shape))
        factor = ratios[layer] if field in self.format.scaled else 1
        stacked[field][within] = parts[field] * np.float32(factor)
    absent = set(range(module.layers)) - set(layers)
    for field in self.shared:
      stacked[field][:] = next(iter(layers.values()))[field]
    if absent and self.format.kind is DoRA:  # an output with the base's length is unchanged
      weights = module.weights(module.values(leaf))
      for layer in absent:
        lengths = np.linalg.norm(module.rows_of_outputs(weights[layer]), axis=1)
        stacked["magnitude"][layer] = module.to_part(lengths, "o", "o")
    return stacked


def load(file: peft_files.AdapterFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of a file; raises ValueError for another shape, before it is read."""
  if file.shapes[name] != shape:
    raise ValueError(f"{name}: shape {file.shapes[name]}, where the model and the rank say {shape}")
  return file.load(name)
