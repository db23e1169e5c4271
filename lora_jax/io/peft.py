"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    save("runs/quickstart/adapter", adapters, full={}, base_model="HuggingFaceTB/SmolLM2-135M")
    peft.PeftModel.from_pretrained(model, "runs/quickstart/adapter")

PEFT names tensors by the modules of the PyTorch model and stores lora_A as (rank, in) and lora_B as
(out, rank), the transposes of `a` and `b`. Layers that are stacked here are modules of their own
there.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_jax.io import names, peft_config, safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHARED = ("base_model.vera_A", "base_model.vera_B")
"""The names of tensors that belong to no module of the model."""
_PREFIX = "base_model.model."
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
  """An adapter's folder, its tensors still unread.

  Attributes:
    path: of the tensors' file, for messages.
    config: the fields that `peft_config` reads, with PEFT's defaults where they are absent.
    shapes: `{name: shape}` of the tensors; a module's name is that in the model without adapters.
  """

  path: Path
  config: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]

  def load(self, name: str) -> np.ndarray:
    """Returns a tensor as float32; raises ValueError where it holds what is not finite."""
    tensor = safetensors.read_tensor(self.path, _key(name))
    with np.errstate(over="ignore"):  # a float64 may be too large, and is not finite then
      tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
      raise ValueError(f"{self.path}: {name}: holds values that are not finite; it is damaged")
    return tensor


_LAYER = "{i}"


class LowRankFactors(Protocol):
  """What an adapter must have to be written: `scale * a @ b`."""

  a: Any
  b: Any
  scale: float


@dataclasses.dataclass(frozen=True)
class Factors:
  """One leaf's adapter as read from a file: `scale * a @ b`, with a [*layers, in, rank]."""

  a: np.ndarray
  b: np.ndarray
  scale: float


@dataclasses.dataclass(frozen=True)
class Loaded:
  """An adapter's files.

  Attributes:
    factors: `{path: Factors}` of the adapted kernels.
    full: `{path: array}` of the leaves that were trained in full.
    base_model: the name of the model that it was trained on.
  """

  factors: dict[str, Factors]
  full: dict[str, np.ndarray]
  base_model: str


def save(
  folder: str | Path,
  adapters: Mapping[str, LowRankFactors],
  *,
  full: Mapping[str, Any],
  base_model: str,
  table: names.Table = names.LLAMA_HF,
) -> None:
  """Writes an adapter that `peft` loads; the folder appears whole or not at all.

  The scale is written as `lora_alpha = scale * rank`, whatever rule it came from, since that is all
  that PEFT makes of it.

  Args:
    folder: replaced if it is an adapter's folder already.
    adapters: `{path: adapter}` with kernels of one input and one output axis, layers perhaps
      stacked in front.
    full: `{path: array}` of leaves trained in full, written as `modules_to_save`.
    base_model: goes into `base_model_name_or_path`.
    table: tensor names of the PyTorch model, as in `lora_jax.io.names`.

  Raises:
    ValueError: when there is no adapter, or a leaf has no counterpart in the table or more axes
      than PEFT's linear layers.
    FileExistsError: when the folder holds something else.
  """
  folder = Path(folder)
  if not adapters:
    raise ValueError(f"{folder}: there is no adapter to save")
  if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
    raise FileExistsError(f"{folder}: holds something that is no adapter; name another folder")
  modules: dict[str, Factors] = {}
  for path, name in names.file_names(adapters, table).items():
    adapter = adapters[path]
    a, b = np.asarray(adapter.a, np.float32), np.asarray(adapter.b, np.float32)
    for layer_name, (layer_a, layer_b) in _per_layer(path, name, (a, b), ndim=2):
      modules[_module(layer_name)] = Factors(layer_a, layer_b, adapter.scale)
  saved: dict[str, np.ndarray] = {}
  for path, name in names.file_names(full, table).items():
    leaf = np.asarray(full[path])
    for layer_name, (layer,) in _per_layer(path, name, (leaf,), ndim=leaf.ndim - (_LAYER in name)):
      saved[layer_name] = layer.T if path.endswith("/kernel") else layer

  tensors = {_PREFIX + name: tensor for name, tensor in saved.items()}
  for module, factors in modules.items():
    tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.a.T
    tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.b.T
  partial = folder.with_name(f".{folder.name}.{os.getpid()}")
  partial.mkdir(parents=True)
  try:
    config = _config(modules, sorted({_module(name) for name in saved}), base_model)
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    safetensors.save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
    if folder.exists():
      shutil.rmtree(folder)
    partial.replace(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def load(
  folder: str | Path, paths: Iterable[str], *, table: names.Table = names.LLAMA_HF
) -> Loaded:
  """Reads a LoRA adapter as `peft` or `save` wrote it.

  Args:
    folder: with both files.
    paths: the model's paths; where they are of stacked layers (`blocks/...`), so are the factors.
    table: as in `save`.

  Raises:
    FileNotFoundError: when a file is missing.
    ValueError: when a file is damaged, the adapter is of another kind than plain LoRA, or its
      tensors do not fit the model; all of them are listed.
  """
  folder = Path(folder)
  config = _read_config(folder / CONFIG)
  tensors = safetensors.load_file(folder / TENSORS)
  by_name = {name: path for path, name in names.file_names(paths, table).items()}
  factors: dict[str, dict[int | None, Factors]] = {}
  full: dict[str, dict[int | None, np.ndarray]] = {}
  unknown = []
  for key, tensor in tensors.items():
    name = key.removeprefix(_PREFIX)
    if key.endswith(".lora_B.weight"):
      if key.replace("lora_B", "lora_A") not in tensors:
        unknown.append(f"{key} (it has no lora_A)")
      continue
    module = name.removesuffix(".lora_A.weight")
    place = _find(f"{module}.weight" if module != name else name, by_name)
    if place is None or not key.startswith(_PREFIX):
      unknown.append(key)
      continue
    path, layer = place
    if module == name:
      full.setdefault(path, {})[layer] = tensor.T if path.endswith("/kernel") else tensor
      continue
    b_key = key.replace("lora_A", "lora_B")
    if b_key not in tensors:
      unknown.append(f"{key} (it has no lora_B)")
      continue
    a, b = tensor, tensors[b_key]
    rank, alpha = (_of_module(config, kind, module) for kind in ("rank", "alpha"))
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
      raise ValueError(
        f"{folder / TENSORS}: {module}: lora_A {a.shape} and lora_B {b.shape} are not (rank, in) "
        f"and (out, rank) of the rank {rank} that {CONFIG} says"
      )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    factors.setdefault(path, {})[layer] = Factors(a.T, b.T, scale)
  if unknown:
    raise ValueError(
      f"{folder / TENSORS}: {len(unknown)} tensors fit nothing in the model: "
      + ", ".join(unknown[:8])
    )
  return Loaded(
    factors={path: _stack_factors(path, layers) for path, layers in factors.items()},
    full={path: _stack(path, layers) for path, layers in full.items()},
    base_model=config.get("base_model_name_or_path") or "",
  )


def _per_layer(path: str, name: str, arrays: tuple[np.ndarray, ...], ndim: int):
  """(name, arrays) of each layer of a leaf; of the leaf itself where it is not stacked."""
  if {x.ndim for x in arrays} != {ndim + (_LAYER in name)}:
    raise ValueError(
      f"{path}: {', '.join(str(x.shape) for x in arrays)} are not the factors of a linear layer "
      "with one input and one output axis, which is what PEFT's layout holds"
    )
  if _LAYER not in name:
    return [(name, arrays)]
  return [
    (name.replace(_LAYER, str(i)), layer) for i, layer in enumerate(zip(*arrays, strict=True))
  ]


def _module(tensor_name: str) -> str:
  return tensor_name.removesuffix(".weight")


def _config(modules: Mapping[str, Factors], saved: list[str], base_model: str) -> dict[str, Any]:
  ranks = {module: factors.a.shape[1] for module, factors in modules.items()}
  alphas = {module: factors.scale * ranks[module] for module, factors in modules.items()}
  rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": sorted(modules),
    "modules_to_save": saved or None,
    "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
    "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
  }


def _read_config(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; an adapter's folder holds {CONFIG}")
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path}: not a LoRA adapter's config ({error!r})") from None
  plain = {"use_dora": False, "bias": "none", "fan_in_fan_out": False}
  other = [f"{field}={config[field]}" for field, x in plain.items() if config.get(field, x) != x]
  if kind != "LORA" or other:
    raise ValueError(
      f"{path}: peft_type {kind!r} {' '.join(other)} is not read; only plain LoRA (with rsLoRA, "
      "rank and alpha patterns and modules_to_save) is"
    )
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
    raise ValueError(f"{path}: r {rank!r} and lora_alpha {alpha!r} must be numbers, r at least 1")
  return config


def _of_module(config: Mapping[str, Any], kind: str, module: str):
  """A module's rank or alpha: that of the first pattern which ends its name, or the common one."""
  for pattern, value in (config.get(f"{kind}_pattern") or {}).items():
    if module == pattern or module.endswith("." + pattern):
      return value
  return config["r" if kind == "rank" else "lora_alpha"]


def _find(name: str, by_name: Mapping[str, str]) -> tuple[str, int | None] | None:
  """The path of a tensor, and its layer where the path is of stacked layers."""
  if name in by_name:
    return by_name[name], None
  parts = name.split(".")
  for n, part in enumerate(parts):
    stacked = ".".join([*parts[:n], _LAYER, *parts[n + 1 :]])
    if part.isdecimal() and stacked in by_name:
      return by_name[stacked], int(part)
  return None


def _stack(path: str, layers: Mapping[int | None, np.ndarray]) -> np.ndarray:
  if None in layers:
    return layers[None]
  if sorted(layers) != list(range(len(layers))):
    raise ValueError(f"{path}: the adapter has the layers {sorted(layers)}; all or none must be")
  return np.stack([layers[i] for i in range(len(layers))])


def _stack_factors(path: str, layers: Mapping[int | None, Factors]) -> Factors:
  scales = {factors.scale for factors in layers.values()}
  shapes = {factors.a.shape for factors in layers.values()}
  if len(scales) != 1 or len(shapes) != 1:
    raise ValueError(
      f"{path}: its layers have the scales {sorted(scales)} and the shapes {sorted(shapes)} of A; "
      "stacked layers must agree, so load the model with scan_layers=False"
    )
  return Factors(
    _stack(path, {i: factors.a for i, factors in layers.items()}),
    _stack(path, {i: factors.b for i, factors in layers.items()}),
    scales.pop(),
  )


def read(folder: str | Path) -> AdapterFile:
  """Reads an adapter's config and the header of its tensors.

  Raises:
    FileNotFoundError: when a file is missing.
    ValueError: when a file is damaged, the config asks for what is not supported, or a tensor has a
      name or a dtype that no adapter's has.
  """
  folder = Path(folder)
  path = folder / CONFIG
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; an adapter's folder holds {CONFIG}")
  try:
    config = peft_config.parse(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  path = folder / TENSORS
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such file; pickled weights (adapter_model.bin) are not read: load the adapter "
      "in peft and write it again with `save_pretrained`"
    )
  kinds = safetensors.tensor_kinds(path)
  strange = [
    f"{name[:120]} ({dtype})"
    for name, (_, dtype) in kinds.items()
    if dtype not in _DTYPES or not (name.startswith(_PREFIX) or name in SHARED)
  ]
  if strange:
    raise ValueError(
      f"{path}: {len(strange)} tensors are not named {_PREFIX}… or of no dtype of "
      f"{', '.join(_DTYPES)}: {', '.join(strange[:8])}"
    )
  shapes = {name.removeprefix(_PREFIX): shape for name, (shape, _) in kinds.items()}
  return AdapterFile(path, config, shapes)


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
  """Writes an adapter that `peft` loads; the folder appears whole or not at all.

  Args:
    folder: replaced if it is an adapter's folder already.
    config: the fields of adapter_config.json.
    tensors: `{name: array}`, by names as in `AdapterFile.shapes`.

  Raises:
    FileExistsError: when the folder holds something else.
  """
  folder = Path(folder)
  if folder.exists():
    others = {path.name for path in folder.iterdir()} - {CONFIG, TENSORS, "README.md"}
    if others:
      raise FileExistsError(
        f"{folder}: holds {', '.join(sorted(others)[:4])}, which is no adapter's; name another "
        "folder"
      )
  partial = folder.with_name(f".{folder.name}.{os.getpid()}")
  partial.mkdir(parents=True)
  try:
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = {_key(name): tensor for name, tensor in tensors.items()}
    safetensors.save_file(named, partial / TENSORS, metadata={"format": "pt"})
    if folder.exists():
      shutil.rmtree(folder)
    partial.replace(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _key(name: str) -> str:
  return name if name in SHARED else _PREFIX + name
