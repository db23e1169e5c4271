"""From a folder in PEFT's layout to `{path: adapter}`.

First every tensor is assigned by its name, then missing tensors are detected, then shapes are
compared with the leaves; only then are tensors read.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.exchange import parameters, peft_files
from lora_jax.exchange.formats import IN_THE_HEAD, ROWS, ROWS_BESIDE, WHOLE, Format
from lora_jax.exchange.layer_tensors import Layer, Reader, format_of, load
from lora_jax.exchange.modules import Module, module_of
from lora_jax.weights import Adapted, Full, TokenRows

_ITSELF, _BASE, _COPY, _ORIGINAL = "", "base_layer.", "modules_to_save.", "original_module."
_UNDER_ROWS = "token_adapter."
_EITHER = frozenset({"classifier", "score"})  # PEFT lists both, and a model has one of them
_LISTED = 8
_RESIZED = (
  "its vocabulary was resized: give the base the same new tokens first, by model.new_tokens or "
  "lora_jax.new_tokens.add"
)

Tensors = dict[Layer, dict[str, str]]
"""The names of a leaf's tensors in a file, by layer and by suffix: "lora_A.weight", or `_ITSELF`,
or the `_BASE` that is stored with an adapted embedding. After the vocabulary was resized, `peft`
stores a fully trained leaf a second time, as the `_COPY`, and the `_ORIGINAL` as well."""


def adapters(
  file: peft_files.AdapterFile, modules: Mapping[str, Module], leaves: Mapping[str, Any]
) -> dict[str, Adapted]:
  """The adapters in a file, in the order of the tree; errors as in `lora_jax.exchange.load`."""
  format = format_of(file.config)
  file = parameters.unnested(file, modules)
  places, heads = _places(file.shapes, modules, format)
  _check_complete(file.config, modules, places, heads)
  reader = Reader.of(file, format) if format else None
  found = {}
  vocabularies = {x.weight_shape()[0] for x in modules.values() if x.is_embedding}
  for path in modules:
    if path not in places and path not in heads:
      continue
    module, tensors = modules[path], places.get(path, {})
    if module.stacks_oddly:
      raise ValueError(f"{path}: its axes are {module.roles!r}, and PEFT knows no stack but layers")
    for own in (*tensors.values(), heads.get(path, {})):
      _check_copy(file, own)
    _check_rows(file, module, tensors, vocabularies)
    if module.is_head_too:
      _check_head(file, module, tensors.get(None, {}), heads.get(path, {}))
    bases = _check_base(file, module, leaves[path], tensors)
    kinds = set().union(*tensors.values())
    if kinds == {_ITSELF}:
      found[path] = _full(file, module, leaves[path], tensors)
    elif kinds <= {ROWS, ROWS_BESIDE}:
      found[path] = _rows(file, module, leaves[path], tensors[None], bases.get(None))
    elif reader is None:
      raise ValueError(f"{module.name}: {file.config['peft_type']} adapts no layers")
    else:
      found[path] = reader.adapter(module, leaves[path], tensors).seal()
  return found


# ---- the tensors in the file


def _places(
  shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, Module], format: Format | None
) -> tuple[dict[str, Tensors], dict[str, dict[str, str]]]:
  """The tensors of each leaf by its path, and those of the tied head.

  Raises:
    ValueError: if a tensor belongs to no leaf.
  """
  owners: dict[str, tuple[str, Layer]] = {}
  heads: dict[str, str] = {}
  for path, module in modules.items():
    owners |= {name: (path, layer) for layer, name in module.by_layer().items()}
    heads |= {module.tied: path} if module.tied else {}
  suffixes = [ROWS_BESIDE, ROWS, *(format.suffixes if format else ())]
  places: dict[str, Tensors] = defaultdict(lambda: defaultdict(dict))
  of_heads: dict[str, dict[str, str]] = defaultdict(dict)
  unknown = []
  for name in shapes:
    if format and name in {part.suffix for part in format.shared}:
      continue
    kind = next((suffix for suffix in suffixes if name.endswith(f".{suffix}")), None)
    if kind:
      owner = name.removesuffix(kind) + "weight"
    else:  # a parameter of the model; in an adapted layer it has another prefix
      owner = name.replace(f".{_UNDER_ROWS}", ".")
      for within in (_BASE, _COPY, _ORIGINAL, WHOLE):
        owner = owner.replace(f".{within}", ".")
      kind = next((x for x in (_COPY, _ORIGINAL) if f".{x}" in name), _ITSELF)
      kind = _BASE if name.endswith(f".{_BASE}weight") else kind
    if owner in owners:
      path, layer = owners[owner]
      tensors = places[path][layer]
    elif owner in heads:
      tensors = of_heads[heads[owner]]
    else:
      unknown.append(name)
      continue
    if kind in tensors:
      raise ValueError(f"{name} and {tensors[kind]} are the same parameter")
    if kind != _ORIGINAL:  # the values before training
      tensors[kind] = name
  if unknown:
    raise ValueError(f"{len(unknown)} tensors fit nothing in the model: {_listed(unknown)}")
  return {path: dict(tensors) for path, tensors in places.items()}, dict(of_heads)


def _check_complete(
  config: Mapping[str, Any],
  modules: Mapping[str, Module],
  places: Mapping[str, Tensors],
  heads: Mapping[str, Mapping[str, str]],
) -> None:
  """Raises ValueError if the config names modules that are not in the file."""
  saved = config["modules_to_save"] or []
  targets, excluded = config["target_modules"], config["exclude_modules"] or []
  countable = isinstance(targets, list) and isinstance(excluded, list)
  if countable:
    countable = config["layers_to_transform"] is None
    targets, excluded = frozenset(targets), frozenset(excluded)
  missing, unmet = [], set(saved)
  for path, module in modules.items():
    for layer, name in module.by_layer().items():
      owner, _, parameter = name.rpartition(".")
      kinds = places.get(path, {}).get(layer, {})
      hits = {ending for ending in saved if _is_saved(owner, ending)}
      unmet -= hits
      if hits and not kinds:
        missing.append(f"{name} of modules_to_save")
      elif countable and parameter == "weight" and not kinds and _ends(owner, targets):
        missing += [] if _ends(owner, excluded) else [f"{name} of target_modules"]
    if module.tied:  # the head is the same leaf, and may be saved as a separate module
      hits = {ending for ending in saved if module_of(module.tied).endswith(ending)}
      unmet -= hits
      if hits and path not in heads:
        missing.append(f"{module.tied} of modules_to_save")
  if not unmet >= _EITHER and {*saved} >= _EITHER:
    unmet -= _EITHER
  missing += [f"{name} of modules_to_save" for name in sorted(unmet)]
  if missing:
    raise ValueError(
      f"{len(missing)} parameters that the config names are not there: {_listed(missing)}"
    )


def _is_saved(owner: str, ending: str) -> bool:
  """True if a module is in `modules_to_save` or within one; names match by suffix, as in peft."""
  parts = owner.split(".")
  return any(".".join(parts[:n]).endswith(ending) for n in range(1, len(parts) + 1))


def _ends(module: str, endings: Collection[str]) -> bool:
  """True if one of the endings is a suffix of a module's name after a dot, as in PEFT's lists."""
  parts = module.split(".")
  return any(".".join(parts[n:]) in endings for n in range(len(parts)))


def _check_rows(file, module: Module, tensors: Tensors, vocabularies: Collection[int]) -> None:
  """Raises ValueError for a whole embedding or head with another number of tokens."""
  own = module.weight_shape()
  names = [kinds[x] for kinds in tensors.values() for x in (_ITSELF, _BASE) if x in kinds]
  for name in names if len(own) == 2 and own[0] in vocabularies else ():
    stored = file.shapes[name]
    if len(stored) == 2 and stored[1] == own[1] and stored[0] != own[0]:
      remedy = _RESIZED if stored[0] > own[0] else "load the base that the adapter is for"
      raise ValueError(
        f"{name}: has {stored[0]} rows, and the base's {module.path} has {own[0]}; {remedy}"
      )


def _check_head(file, module: Module, own: Mapping[str, str], head: Mapping[str, str]) -> None:
  """Raises ValueError unless an embedding and the head tied to it change in the same way.

  Here they are one leaf; in PEFT each has its own adapter, tied on request.
  """
  expected = {IN_THE_HEAD.get(kind, kind): kind for kind in own}
  for kind in expected.keys() | head.keys():
    if kind in expected and kind in head:
      tensor, other = file.load(own[expected[kind]]), file.load(head[kind])
      same = np.array_equal(other, tensor.T if expected[kind] in IN_THE_HEAD else tensor)
    else:  # PEFT itself ties rows alongside another adapter
      same = kind in expected and kind in (ROWS_BESIDE, _BASE)
    if not same:
      raise ValueError(
        f"{module.name} is the head too ({module.tied or 'not named by the table'}), and the "
        "adapter treats the two differently, where the model here has one array for both; train it "
        "with ensure_weight_tying=True, or load the model with a head of its own"
      )


# ---- the adapters


def _full(file, module: Module, leaf, tensors: Tensors) -> Full:
  """The change of a leaf that is stored whole; zero in layers that are not stored."""
  base = module.weights(module.values(leaf))
  change = {layer: np.zeros_like(weight) for layer, weight in base.items()}
  for layer, kinds in tensors.items():
    change[layer] = load(file, kinds[_ITSELF], module.weight_shape()) - base[layer]
  return Full(w=None, dw=jnp.asarray(module.leaf(change)))


def _rows(file, module: Module, leaf, kinds: Mapping[str, str], base: Any) -> TokenRows:
  """The change of an embedding's rows, which are stored with their values.

  base: the embedding that they belong to, if it is stored too.
  """
  (name,) = kinds.values()
  ids = _ids(file, module, kinds)
  tokens, rest = module.weight_letters
  weight = module.weights(module.values(leaf))[None]
  if ids and max(ids) >= len(weight):
    raise ValueError(
      f"{name}: has rows up to {max(ids)}, and the base's {module.path} has {len(weight)}; "
      f"{_RESIZED}"
    )
  if len(set(ids)) != len(ids) or not all(0 <= n < len(weight) for n in ids):
    raise ValueError(f"{name}: the rows {ids[:8]} are not each once and of the {len(weight)} there")
  rows = load(file, name, (len(ids), weight.shape[1]))
  if base is not None:
    # Rows from resizing without training; they are part of the adapter's base.
    others = _differing(base, weight, leaf.dtype, ignored=ids)
    ids, rows = [*ids, *others], np.concatenate([rows, base[others]])
  change = module.to_part(rows - weight[ids], f"r{rest}", f"r{rest}", len(ids))
  roles = module.roles.translate({ord(tokens): "i", ord(rest): "o"})
  return TokenRows(w=None, dw=jnp.asarray(change), ids=tuple(ids), roles=roles)


def _ids(file, module: Module, kinds: Collection[str]) -> list[int]:
  """The rows of an embedding that are stored, according to the config."""
  if not {ROWS, ROWS_BESIDE} & set(kinds):
    return []
  ids = file.config["token_indices" if ROWS in kinds else "trainable_token_indices"] or []
  if isinstance(ids, dict):
    owner = module_of(module.name)
    ids = next((rows for ending, rows in ids.items() if owner.endswith(ending)), [])
  return ids


def _check_copy(file, tensors: dict[str, str]) -> None:
  """Raises ValueError if a fully trained parameter is stored twice with different values."""
  if _COPY not in tensors:
    return
  copy = tensors.pop(_COPY)
  name = tensors.setdefault(_ITSELF, copy)
  if name != copy and not (
    file.shapes[name] == file.shapes[copy] and np.array_equal(file.load(name), file.load(copy))
  ):
    raise ValueError(f"{name} and {copy} are the same parameter, and differ")


def _check_base(file, module: Module, leaf, tensors: Tensors) -> dict[Layer, np.ndarray]:
  """The bases that are stored with the adapters of a leaf.

  Raises ValueError if one differs from the current base; with rows of tokens, from the first of
  these rows on it may differ.
  """
  bases = {}
  for layer, kinds in tensors.items():
    if _BASE not in kinds:
      continue
    name = kinds.pop(_BASE)
    weight = module.weights(module.values(leaf))[layer]
    bases[layer] = load(file, name, module.weight_shape())
    others = _differing(bases[layer], weight, leaf.dtype)
    ids = _ids(file, module, kinds)
    if len(others) and not (ids and others[0] >= min(ids)):
      raise ValueError(
        f"{name} is not the {module.path} that is here: the adapter is for a base with another "
        "one; load that base"
      )
  return bases


def _differing(
  stored: np.ndarray, weight: np.ndarray, dtype: Any, ignored: Sequence[int] = ()
) -> list[int]:
  """The rows in which two weights differ, in the dtype of the current one.

  ignored: rows that are not compared.
  """
  stored = stored.astype(dtype).astype(np.float32)
  differs = ~(stored == weight).reshape(len(weight), -1).all(axis=1)
  differs[list(ignored)] = False
  return np.flatnonzero(differs).tolist()


def _listed(items: list[str]) -> str:
  shown = ", ".join(item[:120] for item in items[:_LISTED])
  return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
