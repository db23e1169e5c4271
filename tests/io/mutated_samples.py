"""Small whole files of every kind that is read, and what a reader makes of them.

samples = write(folder)             # {"gguf": Sample, ...}
sample.observe(sample.path)         # {"config/width": 32, "params/norm/scale": array, ...}
"""

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import traverse_util
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import lora_jax
from lora_jax import exchange, families, is_weight
from lora_jax.compress import storage
from lora_jax.io import export, gguf, gguf_model, names, pretrained, safetensors
from lora_jax.io import tokenizer as tokenizers_lib
from lora_jax.models import bert, llama
from lora_jax.models.experts import ExpertConfig
from lora_jax.weights import Factored, Pruned
from lora_jax.weights.quantized import Format, quantized

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["Ġt", "he", "Ġthe", "in", "er"]
SPECIAL = ["<|endoftext|>", "<|im_end|>"]
CONFIG = llama.LlamaConfig(
  vocab_size=len(ALPHABET) + len(WORDS) + len(SPECIAL),
  width=32,
  mlp_width=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_length=64,
  tie_embeddings=True,
)
# gpt-oss, whose experts have kernels of one block a row.
EXPERTS = dataclasses.replace(
  CONFIG,
  family="gpt_oss",
  qkv_bias=True,
  out_bias=True,
  attn_sinks=True,
  tie_embeddings=False,
  window=16,
  mlp_width=32,
  experts=ExpertConfig(num_experts=2, per_token=1, width=32, clamped=True, biases=True),
)
TEXTS = ("the inner 12 things.<|im_end|>", " ünï\n\ncode ", "")
METHODS = {
  "lora": [("attention", lora_jax.LoRA(rank=2, alpha=3.0)), ("norm", lora_jax.Full())],
  "rslora": [("all-linear", lora_jax.LoRA(rank=4, alpha=8.0, rslora=True))],
  "dora": [("attention", lora_jax.DoRA(rank=2, alpha=3.0))],
  "adalora": [("attention", lora_jax.AdaLoRA(rank=4, alpha=6.0))],
  "vera": [(".*/query/kernel", lora_jax.VeRA(rank=5))],
  "loha": [("attention", lora_jax.LoHa(rank=2, alpha=3.0))],
  "lokr": [("attention", lora_jax.LoKr(rank=1, alpha=3.0))],
  "rows": [("embed/.*", lora_jax.TokenRows(ids=(5, 9)))],
}


@dataclasses.dataclass(frozen=True)
class Sample:
  """A file or folder, the files of it that are damaged, and its reader.

  Attributes:
    path: what the reader is given.
    damaged: names below `path`; "" for the path itself.
    observe: `{name: value}` of all that the reader makes of a path.
    may_differ: the groups (see `group`) in which an accepted file may differ from the whole one,
      because nothing in the file could tell.
    shares: whether its leaves have arrays in common, which one damage changes in all.
  """

  path: Path
  damaged: tuple[str, ...]
  observe: Callable[[Path], dict[str, Any]]
  may_differ: tuple[str, ...]
  shares: bool = False


def _tokenizer_json() -> str:
  vocabulary = {token: i for i, token in enumerate([*ALPHABET, *WORDS])}
  merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r")]
  words = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  words.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  words.decoder = decoders.ByteLevel()
  words.add_special_tokens([AddedToken(x, normalized=False) for x in SPECIAL])
  return words.to_str()


def _params(config: families.Config = CONFIG) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  leaves = {
    path: jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)
    for path, shape in families.param_shapes(config).items()
  }
  return traverse_util.unflatten_dict(leaves, sep="/")


def _compressed(params: dict[str, Any]) -> dict[str, Any]:
  rng = np.random.default_rng(1)
  formats = {
    "query": Format(levels="int8"),
    "key": Format(levels="fp8"),
    "value": Format(levels="nf4", block=8, double=True),
  }

  def leaf(path: str, w: Any) -> Any:
    name = path.split("/")[-2]
    if name in formats:
      return quantized(w, formats[name], (-2,)).with_path(path)
    if name == "gate":
      return Factored(w[:, :2], w[:2], path=path)
    return Pruned.of(w, jnp.asarray(rng.random(w.shape) > 0.5), path) if name == "down" else w

  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict({p: leaf(p, w) for p, w in flat.items()}, sep="/")


def write(folder: Path, kinds: Collection[str] | None = None) -> dict[str, Sample]:
  """Writes one of each kind; the adapters among them only where they are asked for."""
  words = folder / "words"
  words.mkdir()
  (words / "tokenizer.json").write_text(_tokenizer_json())
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[1]}
  settings |= {"bos_token": {"content": SPECIAL[0]}, "chat_template": "{{ x }}"}
  (words / "tokenizer_config.json").write_text(json.dumps(settings))
  (words / "generation_config.json").write_text(json.dumps({"eos_token_id": [262, 261]}))
  tokenizer = tokenizers_lib.from_folder(words)
  params = _params(CONFIG)
  export.save(folder / "model", params, CONFIG, tokenizer)
  export.save(folder / "mxfp4", _params(EXPERTS), EXPERTS, tokenizer)
  _in_mxfp4(folder / "mxfp4")
  _shard(folder / "model", folder / "sharded")
  gguf_model.save(folder / "f32.gguf", params, CONFIG, tokenizer)
  gguf_model.save(folder / "q8.gguf", params, CONFIG, tokenizer, dtype="q8_0")
  storage.save(folder / "small", _compressed(params), CONFIG, tokenizer)
  _encoder(folder / "encoder")
  of_config = ("heads", "rope", "config/norm_eps", "config/max_length")
  sizes = tuple(f"config/{x}" for x in ("vocab_size", "width", "mlp_width", "num_layers"))
  return {
    "gguf": Sample(folder / "f32.gguf", ("",), _of_model, (*of_config, "params", "tokenizer")),
    "gguf q8": Sample(folder / "q8.gguf", ("",), _of_model, (*of_config, "params", "tokenizer")),
    "safetensors": Sample(folder / "model", ("model.safetensors",), _of_model, ("params",)),
    "index": Sample(folder / "sharded", (safetensors.INDEX,), _of_model, ()),
    "shards": Sample(
      folder / "sharded", ("one.safetensors", "two.safetensors"), _of_model, ("params",)
    ),
    "mxfp4": Sample(folder / "mxfp4", ("model.safetensors",), _of_model, ("params",)),
    "config": Sample(folder / "model", ("config.json",), _of_model, (*of_config, "tokenizer")),
    "inspect": Sample(
      folder / "model", ("config.json",), _of_shapes,
      (*of_config, *sizes, "config/tie_embeddings", "tokenizer"),
    ),
    "tokenizer": Sample(
      words, ("tokenizer.json", "tokenizer_config.json", "generation_config.json"), _of_words,
      ("tokenizer",),
    ),
    "compressed": Sample(
      folder / "small", ("compressed.json", "compressed.safetensors", "config.json"),
      _of_compressed, (*of_config, "params", "settings", "tokenizer"),
    ),
    "encoder": Sample(
      folder / "encoder", ("config.json", "vocab.txt", "tokenizer_config.json"), _of_model,
      ("heads", "config/norm_eps", "config/activation", "tokenizer"),
    ),
    **_adapters(folder, params, kinds),
  }  # fmt: skip


def _encoder(folder: Path) -> None:
  """A BERT's folder with a vocab.txt and no tokenizer.json."""
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdehint12.", "the", "in", "##er"]
  folder.mkdir()
  (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
  settings = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "do_lower_case": True}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  config = bert.BertConfig(
    vocab_size=len(tokens),
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    head_dim=4,
    max_length=64,
  )
  export.save(folder.with_name("made"), _params(config), config, tokenizers_lib.from_folder(folder))
  for name in ("config.json", safetensors.SINGLE):
    (folder / name).write_bytes((folder.with_name("made") / name).read_bytes())


def _adapters(folder: Path, params: Any, kinds: Collection[str] | None) -> dict[str, Sample]:
  found = {}
  axes = lora_jax.trace_axes(
    lambda p, t: llama.Llama(CONFIG).apply({"params": p}, t), params, jnp.zeros((1, 3), jnp.int32)
  )

  def observe(path: Path) -> dict[str, Any]:
    return _of_adapters(exchange.load(path, params, axes, table=names.LLAMA_HF))

  for name, rules in METHODS.items():
    asked = {f"peft {name}"} | ({"gguf lora"} if name == "lora" else set())
    if kinds is not None and asked.isdisjoint(kinds):
      continue
    specs = lora_jax.match(params, rules, axes)
    made = lora_jax.init(jax.random.key(0), params, specs, axes)
    made = jax.tree.map(lambda x: x + 0.01, made)
    exchange.save(folder / name, made, params, axes, base_model="base", table=names.LLAMA_HF)
    found[f"peft {name}"] = Sample(
      folder / name,
      ("adapter_config.json", "adapter_model.safetensors"),
      observe,
      ("params", "settings", "kinds", "rows"),
      shares=name == "vera",
    )
    if name == "lora":
      low = {path: x for path, x in made.items() if path.endswith("kernel")}
      exchange.save_gguf(folder / "lora.gguf", low, params, axes, config=CONFIG)
      found["gguf lora"] = Sample(folder / "lora.gguf", ("",), _of_gguf, ("metadata", "params"))
  return found


def _shard(folder: Path, target: Path) -> None:
  target.mkdir()
  for path in folder.iterdir():
    if path.suffix == ".json":
      (target / path.name).write_bytes(path.read_bytes())
  tensors = safetensors.load_file(folder / safetensors.SINGLE)
  names = list(tensors)
  places = {name: "one" if i < len(names) // 2 else "two" for i, name in enumerate(names)}
  for shard in ("one", "two"):
    held = {name: tensors[name] for name in names if places[name] == shard}
    safetensors.save_file(held, target / f"{shard}.safetensors")
  index = {
    "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
    "weight_map": {name: f"{place}.safetensors" for name, place in places.items()},
  }
  (target / safetensors.INDEX).write_text(json.dumps(index))


def _in_mxfp4(folder: Path) -> None:
  path, rng = folder / safetensors.SINGLE, np.random.default_rng(2)
  tensors = safetensors.load_file(path)
  for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
    experts, inputs, outputs = tensors.pop(name).shape
    shape = (experts, outputs, inputs // 32)
    tensors[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
    tensors[f"{name}_scales"] = rng.integers(120, 125, shape, dtype=np.uint8)
  safetensors.save_file(tensors, path)


# ---- what a reader makes of a file


def group(name: str) -> str:
  """What an observed value belongs to: one damage may change one of these."""
  if name in ("config/num_heads", "config/num_kv_heads", "config/head_dim", "config/value_dim"):
    return "heads"
  if name.startswith("config/rope"):
    return "rope"
  if name.startswith(("settings/", "kinds/", "rows/", "tokenizer/")):
    return name.partition("/")[0]
  return name


def _of_words(path: Path, tokenizer: Any = None) -> dict[str, Any]:
  tokenizer = tokenizer or tokenizers_lib.from_folder(path)
  encoded = [tokenizer.encode(text) for text in TEXTS]
  encoded += [tokenizer.encode(text, special_tokens=False) for text in TEXTS]
  pair = tokenizer.encode_pair([("the", True)], [(" in<|im_end|>", False)])
  return {
    "tokenizer/vocabulary": tokenizer.vocabulary,
    "tokenizer/encoded": encoded,
    "tokenizer/pair": tuple(pair),
    "tokenizer/decoded": [tokenizer.decode(ids) for ids in encoded],
    "tokenizer/special": tokenizer.special,
    "tokenizer/templates": tokenizer.chat_templates,
  }


def _of_config(found: pretrained.Pretrained) -> dict[str, Any]:
  fields = {f.name: getattr(found.config, f.name) for f in dataclasses.fields(found.config)}
  return {f"config/{k}": x for k, x in fields.items()} | _of_words(Path(), found.tokenizer)


def _of_model(path: Path) -> dict[str, Any]:
  found = pretrained.load(path)
  return _of_config(found) | _of_params(found.params)


def _of_shapes(path: Path) -> dict[str, Any]:
  return _of_config(pretrained.inspect(path))


def _of_compressed(path: Path) -> dict[str, Any]:
  found = storage.load(path)
  return _of_config(found) | _of_params(found.params)


def _of_adapters(adapters: dict[str, Any]) -> dict[str, Any]:
  seen = _of_params(adapters)
  return seen | {"settings/paths": sorted(adapters)}


def _of_params(tree: Any) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for path, leaf in lora_jax.tree.flatten(tree, is_leaf=is_weight).items():
    if not is_weight(leaf):
      found[f"params/{path}"] = np.asarray(leaf)
      continue
    found[f"kinds/{path}"] = type(leaf).__name__
    for field in dataclasses.fields(leaf):
      value = getattr(leaf, field.name)
      if field.name == "ids":
        found[f"rows/{path}"] = value
      elif field.metadata.get("static"):
        found[f"settings/{path}/{field.name}"] = value
      elif value is not None:
        found[f"params/{path}"] = (
          *found.get(f"params/{path}", ()),
          *map(np.asarray, jax.tree.leaves(value)),
        )
  return found


def _of_gguf(path: Path) -> dict[str, Any]:
  file = gguf.read(path)
  found: dict[str, Any] = {f"metadata/{key}": value for key, value in file.metadata.items()}
  return found | {f"params/{name}": x.load() for name, x in file.tensors.items()}


def same(x: Any, y: Any) -> bool:
  """Whether two observed values are one, to the bit."""
  if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
  if isinstance(x, tuple) and isinstance(y, tuple) and type(x) is type(y):
    return len(x) == len(y) and all(map(same, x, y))
  return type(x) is type(y) and x == y


def finite(value: Any) -> bool:
  """Whether an observed value holds nothing but finite numbers."""
  if isinstance(value, tuple):
    return all(map(finite, value))
  if isinstance(value, np.ndarray) and value.dtype.kind not in "biu":
    return bool(np.isfinite(value.astype(np.float32)).all())
  return True
