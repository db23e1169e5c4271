"""The folder of a compressed model: the parts of its Weights, without code.

    storage.save("runs/small/model", params, config, tokenizer)
    pretrained = storage.load("runs/small/model")           # params with Weights again

    compressed.json            for each leaf its kind, settings and names of tensors
    compressed.safetensors     the tensors; a mask takes one bit a value, masked values nothing
    config.json, tokenizer.json, ...    as in the dense model's folder

Nothing is pickled. Files are treated as hostile: kinds, settings, names, dtypes and shapes are
checked before use, and a folder is loaded completely or not at all.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax import families
from lora_jax.checks import shown
from lora_jax.io import casting, json_files, outputs, safetensors
from lora_jax.io.pretrained import Pretrained
from lora_jax.io.tokenizer import Tokenizer, from_folder
from lora_jax.models import encoder_attention, layers
from lora_jax.weights import Factored, Pruned, is_weight, materialize
from lora_jax.weights.quantized import Quantized

PyTree = Any
Stored = Mapping[str, safetensors.StoredTensor]

STRUCTURE, TENSORS = "compressed.json", "compressed.safetensors"
VERSION = 1
KINDS = {kind.__name__: kind for kind in (Factored, Pruned, Quantized)}

# The dtypes of arrays, and their substitutes for those that numpy's safetensors lacks.
_DTYPES = {
  "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
  "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
  "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
_AS_BYTES = ("bool", "float8_e4m3fn")
_CODES = {
  "nf4": "uint8", "int4": "uint8", "int8": "int8", "uint8": "uint8", "fp8": "float8_e4m3fn",
}  # fmt: skip


def is_compressed(source: str | Path) -> bool:
  """True if a source is the folder of a compressed model."""
  return (Path(source).expanduser() / STRUCTURE).exists()


def steps_of(folder: str | Path) -> tuple[str, ...]:
  """Returns the steps that compressed a model, in order; raises ValueError as `load` does."""
  path = Path(folder).expanduser() / STRUCTURE
  steps = _read_structure(path)["steps"]
  if not all(isinstance(step, str) for step in steps):
    raise ValueError(f"{path}: steps {shown(steps)} are not names")
  return tuple(steps)


def save(
  folder: str | Path,
  params: Mapping[str, Any],
  config: families.Config,
  tokenizer: Tokenizer | None,
  *,
  steps: Sequence[str] = (),
) -> None:
  """Writes a model to a new or empty folder, completely or not at all.

  Args:
    folder: the folder to write.
    params: nested dicts of arrays and of Weights of the kinds in KINDS, with unstacked layers.
    config: the model's configuration.
    tokenizer: the model's tokenizer; None for a model that takes no text.
    steps: the steps that compressed it, in order, for `steps_of`.

  Raises:
    FileExistsError: if the folder is not empty.
    TypeError: if a leaf is neither an array nor one of these Weights.
    ValueError: if values are not finite, and for Linformer's attention.
  """
  encoder_attention.check_storable(config)
  folder = outputs.new_folder(folder)
  tensors: dict[str, np.ndarray] = {}
  leaves = traverse_util.flatten_dict(dict(params), sep="/")
  nodes = {path: _written(path, leaf, tensors) for path, leaf in leaves.items()}
  casting.check_finite(tensors)
  with outputs.whole_folder(folder) as partial:
    safetensors.save_file(tensors, partial / TENSORS)
    # The one size without a field in config.json. Families without such heads do not have it.
    value_dim = getattr(config, "value_dim", None)
    structure = {
      "version": VERSION, "steps": list(steps), "value_dim": value_dim, "leaves": nodes,
    }  # fmt: skip
    dense = config if value_dim is None else dataclasses.replace(config, value_dim=None)
    said = dict(tokenizer.files.config) if tokenizer else {}
    described = said | families.family_of(dense).write_config(dense)
    written = {STRUCTURE: structure, "config.json": described}
    if tokenizer and tokenizer.files.generation is not None:
      written["generation_config.json"] = dict(tokenizer.files.generation)
    for name, fields in written.items():
      outputs.write_text(partial / name, json.dumps(fields, indent=1) + "\n")
    if tokenizer:
      tokenizer.save(partial)


def size(params: Mapping[str, Any]) -> int:
  """The bytes of the tensors that `save` would write for a tree."""
  tensors: dict[str, np.ndarray] = {}
  for path, leaf in traverse_util.flatten_dict(dict(params), sep="/").items():
    _written(path, leaf, tensors)
  return sum(tensor.nbytes for tensor in tensors.values())


def _written(name: str, leaf: Any, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  """The description of a leaf; adds its tensors."""
  if not is_weight(leaf):
    return _array(name, leaf, tensors)
  kind = type(leaf).__name__
  if KINDS.get(kind) is not type(leaf):
    raise TypeError(
      f"{name}: a {kind} cannot be stored in a compressed model; merge adapters first, or save "
      "them to a folder of their own"
    )
  parts, settings = {}, {}
  for field in dataclasses.fields(leaf):
    value = getattr(leaf, field.name)
    if field.name == "path":
      continue
    if field.metadata.get("static"):
      settings[field.name] = value
    elif value is not None:
      parts[field.name] = value
  if kind == "Pruned" and not is_weight(leaf.w):
    parts["w"] = np.asarray(leaf.w)[np.asarray(leaf.mask)]  # masked values are zero
  nodes = {part: _written(f"{name}#{part}", x, tensors) for part, x in parts.items()}
  return {"kind": kind, "settings": settings, "parts": nodes}


def _array(name: str, leaf: Any, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  if not isinstance(leaf, jax.Array | np.ndarray):
    raise TypeError(f"{name}: a {type(leaf).__name__} is neither an array nor a Weight")
  array = np.asarray(leaf)
  dtype = array.dtype.name
  if dtype not in _DTYPES:
    raise TypeError(f"{name}: arrays of {dtype} cannot be stored in a compressed model")
  stored = array
  if dtype in _AS_BYTES:
    stored = np.packbits(array) if dtype == "bool" else array.view(np.uint8)
  tensors[name] = stored
  return {"tensor": name, "dtype": dtype, "shape": list(array.shape)}


# ---- reading


def inspect(
  folder: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool = False,
  remat_policy: Callable[..., bool] | None = None,
  constrain: Callable[[jax.Array], jax.Array] | None = None,
) -> Pretrained:
  """Returns the result of `load` with the shapes of dense parameters; no tensor is read.

  Args, Raises: those of `load`, as far as its configuration and its tokenizer are concerned.
  """
  folder = Path(folder).expanduser()
  structure = _read_structure(folder / STRUCTURE)
  try:
    config = families.parse_config(json_files.read_json(folder / "config.json"))
    if structure["value_dim"] is not None:
      if not hasattr(config, "value_dim"):
        raise ValueError(f"value_dim {structure['value_dim']}: {config.family!r} has no such heads")
      config = dataclasses.replace(config, value_dim=structure["value_dim"])
    options = {"remat_policy": remat_policy, "constrain": constrain, "scan_layers": scan_layers}
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, **options)
    if not len(structure["leaves"]) >= config.num_layers:  # bounds the time to trace the model
      raise ValueError(f"there are {config.num_layers} layers and fewer leaves")
    tokenizer = from_folder(folder) if families.family_of(config).has_tokenizer else None
    if tokenizer and (most := tokenizer.vocab_size) > config.vocab_size:
      raise ValueError(
        f"the tokenizer has ids up to {most - 1}, the embedding only {config.vocab_size} rows"
      )
    shapes = families.param_shapes(config)
    # The norms are never compressed, so they have the dtype of the original model.
    norm = min((path for path in shapes if path.endswith("norm/scale")), key=len)
    _names(structure["leaves"].get(norm))
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from None
  leaves = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}
  return Pretrained(
    config=config,
    family=families.family_of(config),
    params=traverse_util.unflatten_dict(leaves, sep="/"),
    tokenizer=tokenizer,
    source=str(folder),
    stored_dtype=structure["leaves"][norm].get("dtype", "float32"),
  )


def load(folder: str | Path, *, scan_layers: bool = False, **options: Any) -> Pretrained:
  """Loads a folder that `save` wrote, as `io.pretrained.load` loads a dense model.

  Args:
    folder: the model's folder.
    scan_layers: True to stack the layers, which must then be compressed alike, with equal ranks.
    options: as in `inspect`; quantized values keep their own dtype.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is damaged, has unknown contents, or does not fit the model.
  """
  found = inspect(folder, scan_layers=scan_layers, **options)
  folder = Path(folder).expanduser()
  nodes = _read_structure(folder / STRUCTURE)["leaves"]
  try:
    shapes = families.param_shapes(dataclasses.replace(found.config, scan_layers=False))
    leaves = _read_leaves(folder / TENSORS, nodes, shapes, found.config.dtype)
    params = traverse_util.unflatten_dict(leaves, sep="/")
    params = _stacked(params) if scan_layers else params
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from None
  return dataclasses.replace(found, params=params)


def _read_structure(path: Path) -> dict[str, Any]:
  structure = json_files.read_json(path, what="the structure of a compressed model")
  wanted = {
    "version": (int,), "steps": (list,), "value_dim": (int, type(None)), "leaves": (dict,),
  }  # fmt: skip
  if set(structure) != set(wanted) or structure["version"] != VERSION:
    raise ValueError(f"{path}: not the structure of a compressed model of version {VERSION}")
  for name, kinds in wanted.items():
    if type(structure[name]) not in kinds:
      raise ValueError(f"{path}: {name} is a {type(structure[name]).__name__}")
  return structure


def _read_leaves(path: Path, nodes, shapes: Mapping[str, tuple[int, ...]], dtype) -> dict[str, Any]:
  if set(nodes) != set(shapes):
    raise ValueError(
      "the leaves are not those of the configuration; "
      f"missing: {shown(sorted(set(shapes) - set(nodes)))}, "
      f"unexpected: {shown(sorted(set(nodes) - set(shapes)))}"
    )
  stored = safetensors.open_file(path)
  named = [name for node in nodes.values() for name in _names(node)]
  if sorted(named) != sorted(stored):
    raise ValueError(
      f"{TENSORS} does not hold the tensors of {STRUCTURE}, each once; "
      f"missing: {shown(sorted(set(named) - set(stored)))}, "
      f"unexpected: {shown(sorted(set(stored) - set(named)))}"
    )
  leaves = {}
  for name, node in nodes.items():
    leaf = _made(stored, name, node, shapes[name])
    leaf = _cast(name, leaf, jnp.dtype(dtype))
    leaves[name] = leaf.with_path(name) if is_weight(leaf) else leaf
  return leaves


def _made(stored: Stored, name: str, node: Mapping[str, Any], wanted: tuple[int, ...]) -> Any:
  """A leaf, which must represent an array of this shape, for any shapes of its parts."""
  try:
    leaf = _read(stored, name, node)
    found, shape = jax.eval_shape(materialize, leaf), tuple(leaf.shape)
  except Exception as error:  # arithmetic on parts that do not fit may raise anything
    raise ValueError(f"{name}: its parts do not fit each other: {str(error)[:300]}") from None
  if tuple(found.shape) != wanted or shape != wanted:
    raise ValueError(f"{name}: shape {tuple(found.shape)}, the configuration says {wanted}")
  if not jnp.issubdtype(found.dtype, jnp.floating):
    raise ValueError(f"{name}: its dtype {found.dtype} is not a float")
  return leaf


def _names(node: Any) -> list[str]:
  """The tensors that a description names, at any depth; checks its form on the way."""
  if not isinstance(node, dict):
    raise ValueError(f"{STRUCTURE}: {shown(node)} describes no leaf")
  if set(node) == {"tensor", "dtype", "shape"}:
    sizes = node["shape"]
    if not isinstance(node["tensor"], str) or str(node["dtype"]) not in _DTYPES:
      raise ValueError(f"{STRUCTURE}: {shown(node)} describes no tensor")
    if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for n in sizes):
      raise ValueError(f"{STRUCTURE}: {shown(node['tensor'])}: {shown(sizes)} is not a shape")
    return [node["tensor"]]
  if set(node) != {"kind", "settings", "parts"} or str(node["kind"]) not in KINDS:
    raise ValueError(f"{STRUCTURE}: {shown(node)} describes no Weight of {', '.join(KINDS)}")
  if not isinstance(node["settings"], dict) or not isinstance(node["parts"], dict):
    raise ValueError(f"{STRUCTURE}: {shown(node)}: its settings or its parts are not an object")
  fields = {field.name: field for field in dataclasses.fields(KINDS[node["kind"]])}
  for part in node["parts"]:
    if part not in fields or fields[part].metadata.get("static"):
      raise ValueError(f"{STRUCTURE}: a {node['kind']} has no part {shown(part)}")
  for name in node["settings"]:
    if name not in fields or not fields[name].metadata.get("static") or name == "path":
      raise ValueError(f"{STRUCTURE}: a {node['kind']} has no setting {shown(name)}")
  return [name for part in node["parts"].values() for name in _names(part)]


def _read(stored: Stored, leaf: str, node: Mapping[str, Any]) -> Any:
  if "tensor" in node:
    return jnp.asarray(_read_array(stored, node))
  settings = {name: _setting(leaf, name, x) for name, x in node["settings"].items()}
  parts = {part: _read(stored, leaf, x) for part, x in node["parts"].items()}
  codes = _CODES.get(settings.get("levels", ""))
  for part, x in parts.items():
    fits = {"codes": x.dtype.name == codes, "mask": x.dtype == bool}
    if not fits.get(part, jnp.issubdtype(x.dtype, jnp.floating)):
      raise ValueError(f"{leaf}: its part {part} is of {x.dtype}")
  if node["kind"] == "Pruned":
    _check_parts(leaf, parts, ("w", "mask"))
    if not is_weight(parts["w"]):
      parts["w"] = _unhidden(leaf, np.asarray(parts["w"]), np.asarray(parts["mask"]))
  required = [
    field.name
    for field in dataclasses.fields(KINDS[node["kind"]])
    if not field.metadata.get("static") and field.default is dataclasses.MISSING
  ]
  _check_parts(leaf, parts, required)
  return KINDS[node["kind"]](**parts, **settings)


def _check_parts(leaf: str, parts: Mapping[str, Any], required) -> None:
  missing = [name for name in required if name not in parts]
  if missing:
    raise ValueError(f"{leaf}: lacks {', '.join(missing)}")


def _setting(leaf: str, name: str, value: Any) -> Any:
  """A setting in its original type: JSON has lists for tuples."""
  if isinstance(value, list) and all(type(x) is int for x in value):
    return tuple(value)
  if type(value) in (str, int, float, bool) or value is None:
    return value
  raise ValueError(f"{leaf}: the setting {name} is {shown(value)}")


def _read_array(tensors: Stored, node: Mapping[str, Any]) -> np.ndarray:
  name, dtype, shape = node["tensor"], node["dtype"], tuple(node["shape"])
  stored = tensors[name].load()
  size = math.prod(shape)
  if dtype == "bool":
    if stored.dtype != np.uint8 or stored.shape != (-(-size // 8),):
      raise ValueError(f"{name}: does not hold {size} bits")
    return np.unpackbits(stored, count=size).astype(bool).reshape(shape)
  if dtype in _AS_BYTES and stored.dtype == np.uint8:
    stored = stored.view(_DTYPES[dtype])
  if stored.dtype != _DTYPES[dtype] or stored.shape != shape:
    raise ValueError(
      f"{name}: is {stored.dtype} {stored.shape}, {STRUCTURE} says {dtype} {list(shape)}"
    )
  is_float = jnp.issubdtype(stored.dtype, jnp.floating)
  if is_float and not np.isfinite(stored.astype(np.float32)).all():
    raise ValueError(f"{name}: holds values that are not finite; the file is damaged")
  return stored


def _unhidden(leaf: str, kept: np.ndarray, mask: np.ndarray) -> jax.Array:
  if mask.dtype != bool or kept.shape != (int(mask.sum()),):
    raise ValueError(f"{leaf}: {kept.shape} values do not fit a mask of {int(mask.sum())}")
  w = np.zeros(mask.shape, kept.dtype)
  w[mask] = kept
  return jnp.asarray(w)


def _cast(name: str, leaf: Any, dtype: jnp.dtype) -> Any:
  """The leaf in another dtype; a quantized leaf keeps its quantized values and their scales."""
  if isinstance(leaf, Quantized):
    return leaf.astype(dtype)
  if isinstance(leaf, Factored):
    return dataclasses.replace(leaf, a=_cast(name, leaf.a, dtype), b=_cast(name, leaf.b, dtype))
  if isinstance(leaf, Pruned):
    return dataclasses.replace(leaf, w=_cast(name, leaf.w, dtype))
  return casting.cast({name: leaf}, dtype)[name]


def _stacked(params: PyTree) -> PyTree:
  """The parameters with stacked layers."""
  bare = jax.tree.map(lambda x: x.with_path("") if is_weight(x) else x, params, is_leaf=is_weight)
  blocks = [bare[name] for name in bare if name.startswith("block_")]
  kinds = [(jax.tree.structure(x), [leaf.shape for leaf in jax.tree.leaves(x)]) for x in blocks]
  if any(kind != kinds[0] for kind in kinds):
    raise ValueError(
      "its layers are not compressed alike (their ranks differ, for example), so they cannot be "
      "stacked; set scan_layers to False"
    )
  return layers.stack_layers(bare)
